"""Cutting trajectories into windows of equal length, each labelled at its last cycle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtlbalance.errors import DataError

from .config import PadMode
from .files import Floats, Ints, Trajectories


@dataclass(frozen=True)
class Windows:
    """Which rows make up each window.

    Args:
        rows: (N, T) row numbers; where a window starts before its engine, the first row is repeated.
        last_row: (N,) the row at which the window ends.
        is_last: (N,) whether the window ends at its engine's last recorded cycle.
    """

    rows: Ints
    last_row: Ints
    is_last: npt.NDArray[np.bool_]


def cut_windows(trajectories: Trajectories, window: int, pad: PadMode) -> Windows:
    """Cut windows with stride 1, in the order of the rows.

    Args:
        trajectories: whole engines.
        window: cycles in one window, T.
        pad: ``"short"``: only full windows, and one padded window for an engine shorter than that;
            ``"all"``: a window for every row, padded on the left.
    """
    starts, lengths = trajectories.starts, trajectories.lengths
    row = np.arange(len(trajectories))
    first_row = np.repeat(starts, lengths)
    last_of_engine = np.repeat(starts + lengths - 1, lengths)
    if pad == "short":
        # An engine with at least one full window keeps those; a shorter one keeps its last row.
        kept = (row - first_row >= window - 1) | (row == last_of_engine)
        row, first_row, last_of_engine = row[kept], first_row[kept], last_of_engine[kept]
    rows = np.maximum(row[:, None] + np.arange(1 - window, 1), first_row[:, None])
    return Windows(rows=rows, last_row=row, is_last=row == last_of_engine)


def check_window(trajectories: Trajectories, window: int) -> None:
    """Raise if no engine is as long as a window.

    Raises:
        DataError: naming the longest engine.
    """
    longest = int(trajectories.lengths.max())
    if window > longest:
        raise DataError(
            f"{trajectories.path}: window = {window} is longer than every engine (the longest has {longest} "
            f"cycles); set window to {longest} or less"
        )


def rul_of_rows(trajectories: Trajectories, rul_at_end_cycles: Floats) -> Floats:
    """Return (R,) the uncapped remaining useful life at each row, in cycles.

    Args:
        trajectories: whole engines up to some cycle.
        rul_at_end_cycles: (E,) the life left after each engine's last row: 0 where it ran to failure.
    """
    ends = trajectories.starts + trajectories.lengths - 1
    end_of_life = trajectories.cycle[ends] + rul_at_end_cycles
    return np.repeat(end_of_life, trajectories.lengths) - trajectories.cycle


def health_class(rul_cycles: Floats, thresholds: tuple[float, ...], cap: float) -> Ints:
    """Return the health class of each capped RUL: the number of thresholds that it is at or below.

    >>> health_class(np.array([81.0, 80.0, 31.0, 30.0, 0.0]), (80, 30), 125).tolist()
    [0, 1, 1, 2, 2]
    """
    capped = np.minimum(rul_cycles, cap)
    classes: Ints = np.count_nonzero(capped[:, None] <= np.array(thresholds), axis=1)
    return classes
