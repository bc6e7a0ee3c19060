"""The short form of ``torture.py``; ``make torture`` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("torture.py")
HURT = {"kills": 5, "stops": 2, "damages": 6, "races": 1, "disks": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_runs_that_are_hurt_lose_nothing(tmp_path: Path) -> None:
    seed = os.environ.get("TORTURE_SEED", "7")
    counts = [argument for name, count in HURT.items() for argument in (f"--{name}", str(count))]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seed", seed, *counts, "--json", str(tmp_path / "summary.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name, count in HURT.items():
        assert summary[name]["tried"] >= count
        assert summary[name]["lost"] == 0, summary[name]["failures"]
    assert summary["kills"]["finished"] >= 1  # folders that were killed again and again until they had ended
