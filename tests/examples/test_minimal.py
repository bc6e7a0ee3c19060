"""The page of NumPy: it is right, and it runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

MINIMAL = Path(__file__).parents[2] / "examples" / "minimal"


@pytest.fixture(scope="module")
def numpy_fit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("numpy_fit", MINIMAL / "numpy_fit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_manual_gradients_equal_finite_differences(numpy_fit: ModuleType) -> None:
    rng = np.random.default_rng(0)
    sensors, targets = numpy_fit.make_data(rng, 20)
    parameters = rng.normal(scale=0.5, size=numpy_fit.TRUNK + 2 * (numpy_fit.HIDDEN + 1))
    parameters[numpy_fit.TRUNK + numpy_fit.HIDDEN] = 60.0

    def losses(at: np.ndarray) -> np.ndarray:
        return np.asarray(numpy_fit.task_losses(numpy_fit.forward(at, sensors)[1], targets))

    features, outputs = numpy_fit.forward(parameters, sensors)
    gradients = numpy_fit.task_gradients(parameters, sensors, features, outputs - targets)
    step = 1e-5
    expected = np.empty_like(gradients)
    for i in range(len(parameters)):
        nudge = np.zeros_like(parameters)
        nudge[i] = step
        expected[:, i] = (losses(parameters + nudge) - losses(parameters - nudge)) / (2 * step)
    np.testing.assert_allclose(gradients, expected, rtol=1e-6, atol=1e-7)
    assert np.abs(gradients[:, numpy_fit.SHARED]).min() > 0, "both tasks reach the whole trunk"


def test_controller_equals_the_written_rule(numpy_fit: ModuleType) -> None:
    rng = np.random.default_rng(1)
    controller = numpy_fit.GABA(beta=0.9, warmup_steps=5, min_weight=0.1)
    smoothed = [0.5, 0.5]
    for call in range(60):
        first, second = (float(value) for value in rng.uniform(0.1, 10.0, size=2) * [20.0, 1.0])
        applied = controller.weigh(np.array([first, second]))
        if call < 5:
            expected = [0.5, 0.5]
        else:
            total = first + second
            raw = [(total - first) / total, (total - second) / total]
            smoothed = [0.9 * old + 0.1 * new for old, new in zip(smoothed, raw, strict=True)]
            floored = [max(value, 0.1) for value in smoothed]
            expected = [value / sum(floored) for value in floored]
        np.testing.assert_allclose(applied, expected, rtol=1e-12)
    assert expected[0] == pytest.approx(0.1 / (0.1 + smoothed[1])), "the floor was reached"


@pytest.mark.parametrize("seed", [42, 7])
def test_both_tasks_are_learned(numpy_fit: ModuleType, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    result = numpy_fit.fit(seed=seed)
    assert result["rmse"] < 0.35 * result["constant_rmse"]
    assert result["accuracy"] > result["majority"] + 0.1
    assert result["weight_rul"] < 0.06, "the task in cycles has the larger gradient"
    assert result["best_epoch"] < result["epochs_run"] <= 150
    assert "test RMSE" in capsys.readouterr().out


def test_it_stays_about_one_page() -> None:
    assert len((MINIMAL / "numpy_fit.py").read_text().splitlines()) <= 130


def test_the_fourteen_stages_are_in_order() -> None:
    comments = [line.strip() for line in (MINIMAL / "numpy_fit.py").read_text().splitlines()]
    numbers = [int(line[2:].split(".")[0]) for line in comments if line[:3].rstrip("0123456789") == "# "]
    assert numbers == list(range(1, 15))


def test_it_runs_from_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(MINIMAL / "numpy_fit.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(MINIMAL.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
    assert not list(tmp_path.iterdir()), "an example for reading writes nothing"
