"""Reading NASA's text files: 26 columns of numbers separated by blanks, no header.

Unit, cycle, three operational settings, 21 sensors. A fault names the file and the line.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mtlbalance.caching import cached_arrays
from mtlbalance.errors import DataError

from .config import Subset

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NUM_SETTINGS = 3
NUM_SENSORS = 21
NUM_COLUMNS = 2 + NUM_SETTINGS + NUM_SENSORS

# Part of the key of what is kept: raise it with any change to the numbers read.
READER_VERSION = 1
_COLUMNS = ("unit", "cycle", "settings", "sensors")


@dataclass(frozen=True)
class Trajectories:
    """Engines from their first to their last recorded cycle, one row a cycle.

    Args:
        path: the file that they come from.
        unit: (R,) the engine of each row; rows of an engine follow each other.
        cycle: (R,) flights flown, from 1.
        settings: (R, 3) altitude in thousand feet, Mach number, throttle angle.
        sensors: (R, 21).
    """

    path: Path
    unit: Ints
    cycle: Ints
    settings: Floats
    sensors: Floats

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def starts(self) -> Ints:
        """(E,) the first row of each engine."""
        return np.flatnonzero(np.diff(self.unit, prepend=self.unit[0] - 1))

    @property
    def lengths(self) -> Ints:
        """(E,) the recorded cycles of each engine."""
        return np.diff(self.starts, append=len(self))

    def select(self, rows: npt.NDArray[np.bool_]) -> Trajectories:
        """Return only the rows that the mask keeps."""
        return replace(
            self,
            unit=self.unit[rows],
            cycle=self.cycle[rows],
            settings=self.settings[rows],
            sensors=self.sensors[rows],
        )


@dataclass(frozen=True)
class SubsetData:
    """The three files of a subset: ``test_rul_cycles`` is the life left after each test engine's last row."""

    train: Trajectories
    test: Trajectories
    test_rul_cycles: Floats


def file_names(subset: Subset) -> tuple[str, str, str]:
    """Return the names of the training, test and RUL files of a subset."""
    return f"train_{subset}.txt", f"test_{subset}.txt", f"RUL_{subset}.txt"


def read_subset(folder: Path, subset: Subset) -> SubsetData:
    """Read the three files of a subset; the numbers in files of the same content are read once and kept.

    Raises:
        DataError: a file is missing or malformed.
    """
    paths = [folder / name for name in file_names(subset)]
    try:
        contents = [path.read_bytes() for path in paths]
    except OSError:
        return _parse_subset(*paths)  # which says what is wrong
    key = {
        "reader": READER_VERSION,
        "sha256": [hashlib.sha256(content).hexdigest() for content in contents],
    }
    kept = cached_arrays(f"cmapss-{subset}", key, lambda: _to_arrays(_parse_subset(*paths)))
    return _from_arrays(kept, *paths[:2])


def _parse_subset(train_path: Path, test_path: Path, rul_path: Path) -> SubsetData:
    test = read_trajectories(test_path)
    return SubsetData(
        train=read_trajectories(train_path),
        test=test,
        test_rul_cycles=read_rul(rul_path, num_engines=len(test.starts), test_path=test_path),
    )


def _to_arrays(data: SubsetData) -> dict[str, npt.NDArray[Any]]:
    parts = {"train": data.train, "test": data.test}
    arrays = {f"{part}_{name}": getattr(rows, name) for part, rows in parts.items() for name in _COLUMNS}
    return arrays | {"test_rul_cycles": data.test_rul_cycles}


def _from_arrays(arrays: Mapping[str, npt.NDArray[Any]], train_path: Path, test_path: Path) -> SubsetData:
    train, test = (
        Trajectories(path, *(arrays[f"{part}_{name}"] for name in _COLUMNS))
        for part, path in (("train", train_path), ("test", test_path))
    )
    return SubsetData(train, test, arrays["test_rul_cycles"])


def read_trajectories(path: Path) -> Trajectories:
    """Read a training or test file.

    Raises:
        DataError: the file is missing, or a line does not hold 26 finite numbers, or units and
            cycles do not count up from 1.
    """
    values = _read_numbers(path, NUM_COLUMNS)
    _check_counting(path, values[:, 0], values[:, 1])
    return Trajectories(
        path=path,
        unit=values[:, 0].astype(np.int64),
        cycle=values[:, 1].astype(np.int64),
        settings=values[:, 2 : 2 + NUM_SETTINGS],
        sensors=values[:, 2 + NUM_SETTINGS :],
    )


def read_rul(path: Path, num_engines: int, test_path: Path) -> Floats:
    """Read the life left after the last row of each test engine, in cycles.

    Raises:
        DataError: the file is missing or malformed, or its length is not the number of test engines.
    """
    rul_cycles = _read_numbers(path, 1)[:, 0]
    if (rul_cycles < 0).any():
        row = int(np.argmax(rul_cycles < 0))
        raise DataError(f"{path}:{line_of_row(path, row)}: remaining life {rul_cycles[row]:g} is negative")
    if len(rul_cycles) != num_engines:
        line = line_of_row(path, min(len(rul_cycles) - 1, num_engines))
        raise DataError(
            f"{path}:{line}: the file has {len(rul_cycles)} remaining lives, but {test_path.name} has "
            f"{num_engines} engines; one of the two is truncated or belongs to another subset"
        )
    return rul_cycles


def line_of_row(path: Path, row: int) -> int:
    """Return the line number (from 1) of a row (from 0): blank lines are no rows."""
    for index, (line, _) in enumerate(_filled_lines(path)):
        if index == row:
            return line
    raise IndexError(row)


def _read_numbers(path: Path, num_columns: int) -> Floats:
    import pandas as pd  # half a second that a run on kept numbers does not spend

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        # The C parser is some 30 times faster than a Python loop; only a fault needs the loop.
        frame = pd.read_csv(path, sep=r"\s+", header=None, dtype=np.float64)
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        _raise_fault(path, num_columns, str(error))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    values = frame.to_numpy()
    if values.shape[1] != num_columns or not np.isfinite(values).all():
        _raise_fault(path, num_columns, f"expected {num_columns} columns of finite numbers")
    return values


def _raise_fault(path: Path, num_columns: int, otherwise: str) -> NoReturn:
    """Find the line at fault and raise; ``otherwise`` says what the fast parser complained about."""
    empty = True
    for line, text in _filled_lines(path):
        empty = False
        fields = text.split()
        if len(fields) != num_columns:
            raise DataError(
                f"{path}:{line}: {len(fields)} columns instead of {num_columns}; the file is truncated here, "
                "or it is not one of NASA's text files"
            )
        for column, field in enumerate(fields, start=1):
            try:
                value = float(field)
            except ValueError:
                raise DataError(f"{path}:{line}: column {column} holds {field!r}, not a number") from None
            if not math.isfinite(value):
                raise DataError(f"{path}:{line}: column {column} holds {field!r}, not a finite number")
    raise DataError(f"{path}:1: the file is empty" if empty else f"{path}: cannot be read: {otherwise}")


def _filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, text


def _check_counting(path: Path, unit: Floats, cycle: Floats) -> None:
    """Units count 1, 2, 3, ...; within each, so do cycles: else rows are lost, doubled or out of order."""
    unit_step = np.diff(unit, prepend=0.0)
    new_engine = unit_step == 1
    expected_cycle = np.where(new_engine, 1.0, np.concatenate(([0.0], cycle[:-1])) + 1)
    bad_unit = ~(new_engine | (unit_step == 0))
    bad_unit[0] = unit[0] != 1
    fault = bad_unit | (cycle != expected_cycle)
    if not fault.any():
        return
    row = int(np.argmax(fault))
    place = f"{path}:{line_of_row(path, row)}"
    if bad_unit[row]:
        before = f"unit {unit[row - 1]:g}" if row else "the start of the file"
        raise DataError(f"{place}: unit {unit[row]:g} follows {before}; units must count 1, 2, 3")
    raise DataError(
        f"{place}: unit {unit[row]:g} has cycle {cycle[row]:g} where {expected_cycle[row]:g} is expected; "
        "rows are missing, doubled or out of order"
    )
