"""What fails silently elsewhere comes out right here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_what_fails_silently_elsewhere_does_not_here() -> None:
    """The figures of docs/silent_failures.md: every situation runs, and ours come out right."""
    pytest.importorskip("torchjd")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "silent_failures.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    ours = {situation: found for situation, found, _ in rows}
    apart, off = (float(number) for number in re.findall(r"\d\.\de[+-]\d+", ours.pop(rows[0][0])))
    assert apart == 0.0
    assert off < 1e-6
    assert "SharedParametersError" in ours["a task whose loss does not reach the trunk"]
    for situation, found in ours.items():
        assert not found.startswith("raises") or "SharedParametersError" in found, situation
        assert "NaN" not in found, situation
        assert "differently" not in found, situation
        assert "with 0 of" not in found, situation
        assert "lost" not in found, situation
