"""How ratios are measured: against a clock that only moves when it is told to, and allocations of known sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from types import ModuleType

import numpy as np
import pytest
import torch

Script = Callable[[str], ModuleType]


class FakeClock:
    """Tells the time that steps have taken so far."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def steps(self, *seconds: float) -> Iterator[None]:
        for duration in cycle(seconds):
            self.now += duration
            yield


def test_steps_of_known_duration_are_measured_exactly(script: Script) -> None:
    rounds, clock = script("rounds"), FakeClock()
    entries = {
        "plain": rounds.Entry(clock.steps(0.002)),
        "twice": rounds.Entry(clock.steps(0.004)),
        "a dear one in ten": rounds.Entry(clock.steps(*[0.002] * 9, 0.012), multiple_of=10),
        "slow": rounds.Entry(clock.steps(0.5)),
    }
    rounds.measure(entries, "plain", rounds.Rounds(3, 50, 0.01, slice_seconds=0.02), clock)
    seconds = {name: entry.seconds for name, entry in entries.items()}
    assert [entry.slice_steps for entry in entries.values()] == [10, 5, 10, 1]
    assert np.allclose(seconds["plain"], 0.002)
    assert np.allclose(seconds["twice"], 0.004)
    assert np.allclose(seconds["a dear one in ten"], 0.003)
    assert np.allclose(seconds["slow"], 0.5)
    assert {len(values) for values in seconds.values()} == {3}, (
        "all is known after the least number of rounds"
    )


def test_what_scatters_is_measured_longer_than_what_does_not(script: Script) -> None:
    rounds, clock = script("rounds"), FakeClock()
    scattered = np.random.default_rng(0).uniform(0.5, 1.5, size=100)
    entries = {
        "plain": rounds.Entry(clock.steps(1.0)),
        "steady": rounds.Entry(clock.steps(2.0)),
        "scattered": rounds.Entry(clock.steps(*scattered)),
    }
    rounds.measure(entries, "plain", rounds.Rounds(4, 30, 0.01, 0.5), clock)
    assert [len(entry.seconds) for entry in entries.values()] == [30, 4, 30]
    ratio = script("measuring").paired_ratio(entries["scattered"].seconds, entries["plain"].seconds)
    assert ratio.median == pytest.approx(np.median(entries["scattered"].seconds))
    assert ratio.low < ratio.median < ratio.high


def test_a_peer_that_raises_is_a_finding_and_ours_an_error(script: Script) -> None:
    rounds, clock = script("rounds"), FakeClock()

    def fails_later() -> Iterator[None]:
        for _ in range(7):
            clock.now += 0.3
            yield
        raise ValueError("no such thing\nand more")

    entries = {
        "plain": rounds.Entry(clock.steps(0.3)),
        "peer": rounds.Entry(fails_later(), may_fail=True),
    }
    rounds.measure(entries, "plain", rounds.Rounds(6, 6), clock)
    assert entries["peer"].failure == "ValueError: no such thing"
    with pytest.raises(ValueError, match="no such thing"):
        rounds.measure({"plain": rounds.Entry(fails_later())}, "plain", rounds.Rounds(9, 9), clock)


def test_ratios_pair_the_rounds_that_both_have(script: Script) -> None:
    ratio = script("measuring").paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0, 100.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    assert str(ratio) == "2.00 (2.00-2.00)"


def test_lists_of_numbers_take_one_line_of_a_json_file(script: Script, tmp_path) -> None:
    measuring = script("measuring")
    measuring.write_json(tmp_path / "a" / "b.json", {"seconds": [1e-3, 2.0, -3.0], "names": ["a", "b"]})
    text = (tmp_path / "a" / "b.json").read_text()
    assert '"seconds": [0.001, 2.0, -3.0]' in text
    assert len(text.splitlines()) == 7


def test_every_byte_that_is_alive_is_counted(script: Script) -> None:
    live_bytes, kept = script("live_bytes").live_bytes, []

    def run() -> None:
        first = torch.empty(1000)
        second = torch.empty(500, dtype=torch.float64)
        del first
        kept.append(torch.empty(10))
        del second

    found = live_bytes(run, torch.device("cpu"))
    assert (found.peak, found.end) == (4000 + 4000, 40)
    released = live_bytes(kept.clear, torch.device("cpu"))
    assert (released.peak, released.end) == (0, -40)
