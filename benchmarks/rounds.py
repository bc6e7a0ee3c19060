"""Interleaved rounds: what is compared runs in turn, a slice at a time, until its ratio is known well enough."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from measuring import paired_ratio

Clock = Callable[[], float]


def clock_of(device: torch.device) -> Clock:
    """Return what tells the time: CPU seconds of this process, or wall seconds once the device has finished."""
    if device.type != "cuda":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished


@dataclass(frozen=True)
class Rounds:
    """How long to measure.

    Args:
        least: rounds that everything gets.
        most: rounds at which measuring ends.
        tolerance: what is left out once its 95 % interval reaches no farther than this from the median, as a share of
            a ratio above 1.
        slice_seconds: about how long one of them runs in a round, at least one step.
        budget_seconds: no round begins after this, beyond the least.
    """

    least: int = 10
    most: int = 60
    tolerance: float = 0.01
    slice_seconds: float = 0.03
    budget_seconds: float = 600.0


@dataclass
class Entry:
    """Something to measure: each ``next`` of its steps takes one.

    Args:
        steps: as above.
        multiple_of: a slice has a multiple of so many steps, where not all are alike.
        may_fail: an error is a finding, not the end; for code of others.
    """

    steps: Iterator[None]
    multiple_of: int = 1
    may_fail: bool = False
    seconds: list[float] = field(default_factory=list)
    failure: str = ""
    slice_steps: int = 1
    slow: bool = False


def measure(entries: Mapping[str, Entry], baseline: str, rounds: Rounds, clock: Clock) -> None:
    """Fill in each entry's seconds of one step in every round, or its failure.

    Before a slice an entry takes a step that does not count, so that the caches hold its numbers and not those of the
    one before; slow steps do without. Python's garbage is collected between rounds only.
    """
    for entry in entries.values():
        _warm_up(entry, rounds, clock)
    left = {name: entry for name, entry in entries.items() if not entry.failure}
    shuffler, start = random.Random(0), time.monotonic()
    gc.collect()
    gc.freeze()  # what is there already is not looked through again and again
    gc.disable()
    try:
        for index in range(rounds.most):
            names = list(left)
            shuffler.shuffle(names)
            for name in names:
                _time_slice(left[name], clock)
                if left[name].failure:
                    del left[name]
            gc.collect()
            if index + 1 < rounds.least:
                continue
            left = {
                name: entry
                for name, entry in left.items()
                if name == baseline or not _known(entry, entries[baseline], rounds.tolerance)
            }
            if set(left) <= {baseline} or time.monotonic() - start > rounds.budget_seconds:
                return
    finally:
        gc.enable()
        gc.unfreeze()


def _warm_up(entry: Entry, rounds: Rounds, clock: Clock) -> None:
    """Take first steps, and find how many fit in a slice; optimizer states and memory pools are there afterwards."""
    try:
        start = clock()
        next(entry.steps)
        if clock() - start < 1.0:
            next(entry.steps)
        start = clock()
        for _ in range(entry.multiple_of):
            next(entry.steps)
        seconds = (clock() - start) / entry.multiple_of
    except Exception as error:
        _note_failure(entry, error)
        return
    wanted = max(1, round(rounds.slice_seconds / max(seconds, 1e-9)))
    entry.slice_steps = -(-wanted // entry.multiple_of) * entry.multiple_of
    entry.slow = seconds > 0.2


def _time_slice(entry: Entry, clock: Clock) -> None:
    try:
        if not entry.slow:
            next(entry.steps)
        start = clock()
        for _ in range(entry.slice_steps):
            next(entry.steps)
        entry.seconds.append((clock() - start) / entry.slice_steps)
    except Exception as error:
        _note_failure(entry, error)


def _note_failure(entry: Entry, error: Exception) -> None:
    if not entry.may_fail:
        raise error
    first_line = (str(error).strip().splitlines() or [""])[0]
    entry.failure = f"{type(error).__name__}: {first_line}"


def _known(entry: Entry, baseline: Entry, tolerance: float) -> bool:
    ratio = paired_ratio(entry.seconds, baseline.seconds)
    return ratio.half_width <= tolerance * max(ratio.median, 1.0)
