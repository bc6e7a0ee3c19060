"""The live table: what a run is told apart by stays in sight, whatever the size of the terminal."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mtlbalance.sweeps import make_plan
from mtlbalance.sweeps.display import AtWork, LiveTable
from mtlbalance.sweeps.supervisor import SweepOutcome

Write = Callable[[str], Path]
LABEL = "a-label-that-somebody-made-rather-long-to-say-everything-about-it"
SWEEP = f"""
    base = "study.toml"
    [axes]
    kind = [{{ training.lr = 0.5, label = "{LABEL}" }}]
    seed = [{", ".join(f"{{ run.seed = {seed} }}" for seed in range(1, 31))}]
    """


def lines(written: str) -> list[str]:
    """The lines of the last picture, without the codes that move the cursor and colour."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    return [line.rstrip() for line in plain[plain.rindex("sweep ") :].splitlines() if line.strip()]


@pytest.mark.parametrize(("width", "height"), [(60, 14), (80, 24), (120, 40)])
def test_the_table_fits(write: Write, width: int, height: int) -> None:
    plan, outcome = make_plan(write(SWEEP)), SweepOutcome(finished=["x"])
    for run in plan.runs:
        folder = plan.folder_of(run.id)
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("epoch,loss\n0,1.0\n1,0.5\n")
    out = io.StringIO()
    live = LiveTable(Console(file=out, force_terminal=True, width=width, height=height))
    live.start(plan, outcome)
    now = time.monotonic()
    ids = [run.id for run in plan.runs]
    running = {run_id: AtWork("cuda:1", now - 65, 2, resumed=True) for run_id in ids[:20]}
    live.ended(ids[28], "finished", "", 12.0)
    live.tick(running, num_waiting=3, locked={ids[25]})
    shown = lines(out.getvalue())
    assert shown[0].endswith("1/30  3 waiting  1 locked  about 0:00 left")
    assert shown[1].split() == ["run", "on", "attempt", "for", "epoch"]
    assert len(shown) <= height
    assert max(map(len, shown[1:])) <= width - 4  # or the terminal's own ^C would move what is drawn next
    first = shown[2].split()
    assert first[0].endswith("/seed_1")
    assert first[1:] == ["cuda:1", "2", "1:05", "2/2"]
    assert ("and" in [line.split()[0] for line in shown]) == (height < 40)
    if height == 40:
        assert shown[22].split()[1:] == ["another", "process", "2/2"]
    before = len(out.getvalue())
    live.stop()
    last = lines(out.getvalue()[before:])
    assert last[0].endswith("1/30")  # nothing that is over is left on the screen
    assert [line.split()[0] for line in last[1:]] == ["finished"]
