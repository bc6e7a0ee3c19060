"""The step benchmark runs on every model and measures every way to balance; no figure is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_step_benchmark_measures_all_variants(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    sizes = ["--tasks", "2", "3", "--width", "8", "--hidden-size", "8", "--batch-size", "4", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "balancer_step.py"), *sizes, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [name.split(" (")[0] for name in results] == ["mlp K=2", "mlp K=3", "cnn-bilstm-attention K=2"]
    for result in results.values():
        assert len(result["ratios"]) == 7
        assert result["ratios"]["plain sum"]["median"] == 1.0
        assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in result["ratios"].values())
        assert all(min(seconds) > 0 for seconds in result["seconds_per_step"].values())
