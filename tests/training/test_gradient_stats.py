"""What ``gradient_stats.csv`` says, and that measuring it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtlbalance.training import run_training


def test_measuring_does_not_disturb_training(
    configure: Any, plugin: Any, read_csv: Any, tmp_path: Path
) -> None:
    """With dropout and BatchNorm in the trunk, which a second forward pass would disturb."""
    runs = [
        run_training(
            configure("balancer.name=fixed", f"training.gradient_stats_every={every}"),
            out=tmp_path / str(every), quiet=True,
        ).run_dir
        for every in (0, 1, 2)
    ]  # fmt: skip
    weights = [(run / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] == weights[2]
    never, always, second = (read_csv(run / "gradient_stats.csv") for run in runs)
    assert [row["grad_norm_level"] for row in never] == [""] * 6
    assert [bool(row["grad_ratio"]) for row in always] == [True] * 6
    assert [bool(row["grad_norm_kind"]) for row in second] == [True, False] * 3
    assert second[0] == always[0]


def test_columns_and_steps(configure: Any, plugin: Any, read_csv: Any) -> None:
    rows = read_csv(run_training(configure("balancer.name=fixed"), quiet=True).run_dir / "gradient_stats.csv")
    assert list(rows[0]) == [
        "epoch", "step", "grad_norm_level", "grad_norm_kind", "raw_level", "raw_kind", "smoothed_level",
        "smoothed_kind", "applied_level", "applied_kind", "grad_ratio",
    ]  # fmt: skip
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24]
    for row in rows:
        assert row["raw_level"] == row["smoothed_kind"] == ""
        assert row["applied_level"] == "0.5"
        ratio = float(row["grad_norm_level"]) / float(row["grad_norm_kind"])
        assert float(row["grad_ratio"]) == pytest.approx(ratio)


def test_a_method_that_measures_reports_its_own(
    configure: Any, plugin: Any, read_csv: Any, tmp_path: Path
) -> None:
    """Epoch 0 shows the weights after all its batches; the fixed run measures the same first batches."""
    out = run_training(configure("training.gradient_stats_every=0"), quiet=True).run_dir
    rows = read_csv(out / "gradient_stats.csv")
    level, kind = (float(rows[0][f"grad_norm_{task}"]) for task in ("level", "kind"))
    assert float(rows[0]["raw_level"]) == pytest.approx(kind / (level + kind), rel=1e-5)
    assert float(rows[0]["applied_level"]) == 0.5  # 4 steps, all in warm-up
    assert float(rows[1]["smoothed_level"]) < 0.5
    fixed = run_training(configure("balancer.name=fixed"), out=tmp_path / "fixed", quiet=True).run_dir
    first = read_csv(fixed / "gradient_stats.csv")[0]
    assert float(first["grad_norm_level"]) == pytest.approx(level, rel=1e-4)  # the weights were equal so far
    assert float(first["grad_norm_kind"]) == pytest.approx(kind, rel=1e-4)
