"""The engine metrics by hand, and what a perfect predictor scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mtlbalance_cmapss.config import CmapssConfig, tasks_of
from mtlbalance_cmapss.dataset import build
from mtlbalance_cmapss.metrics import evaluate, nasa_score

from mtlbalance.datasets import InMemoryDataset


def test_nasa_score_by_hand() -> None:
    predicted, true = torch.tensor([100.0, 37.0, 60.0]), torch.tensor([100.0, 50.0, 50.0])
    assert nasa_score(predicted, true) == pytest.approx(2 * (math.e - 1))
    late, early = torch.tensor([55.0]), torch.tensor([45.0])
    true = torch.tensor([50.0])
    assert nasa_score(late, true) == pytest.approx(math.exp(0.5) - 1)
    assert nasa_score(early, true) == pytest.approx(math.exp(5 / 13) - 1)


def test_nasa_score_is_a_sum_and_survives_absurd_predictions() -> None:
    true = torch.full((50,), 20.0)
    assert nasa_score(true + 10, true) == pytest.approx(50 * (math.e - 1))
    assert nasa_score(torch.tensor([1e9]), torch.tensor([0.0])) == math.inf


def test_metrics_by_hand() -> None:
    predictions = {"rul": torch.tensor([13.0, 10.0, 24.0, 20.0])}
    targets = {"rul": torch.tensor([10.0, 10.0, 20.0, 20.0])}
    meta = {
        "unit": torch.tensor([1, 1, 2, 2]),
        "is_last": torch.tensor([True, False, True, False]),
    }
    metrics = evaluate(predictions, targets, meta)
    assert metrics["rmse_last"] == pytest.approx(math.sqrt((9 + 16) / 2))
    assert metrics["rmse_all"] == pytest.approx(math.sqrt(25 / 4))
    assert metrics["nasa_score"] == pytest.approx(math.exp(0.3) + math.exp(0.4) - 2)
    assert metrics["n_units"] == 2


def test_a_set_without_last_windows_has_no_metrics_of_them() -> None:
    meta = {"unit": torch.tensor([1]), "is_last": torch.tensor([False])}
    metrics = evaluate({"rul": torch.tensor([1.0])}, {"rul": torch.tensor([2.0])}, meta)
    assert metrics == {"rmse_all": 1.0, "n_units": 1.0}


def test_the_tasks() -> None:
    rul, health = tasks_of(CmapssConfig())
    assert (rul.name, rul.kind, rul.loss, rul.outputs) == ("rul", "regression", "mse", 1)
    assert (health.name, health.kind, health.outputs) == ("health", "classification", 3)
    assert set(health.metrics) == {"accuracy", "f1"}
    assert tasks_of(CmapssConfig(health_thresholds=(100.0, 60.0, 20.0)))[1].outputs == 4


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("subset", "rmse_uncapped"), [("FD001", 3.74), ("FD002", 18.32), ("FD003", 4.71), ("FD004", 19.53)]
)
def test_a_perfect_predictor(nasa_folder: Path, subset: str, rmse_uncapped: float) -> None:
    for cap, expected in ((True, 0.0), (False, rmse_uncapped)):
        config = CmapssConfig(subset=subset, data_dir=nasa_folder, cap_test_labels=cap)
        test = build(config).test
        assert isinstance(test, InMemoryDataset)
        perfect = {"rul": test.targets["rul"].clamp(max=125.0)}
        metrics = evaluate(perfect, test.targets, test.meta)
        assert metrics["rmse_last"] == pytest.approx(expected, abs=0.006)
        if cap:
            assert metrics["nasa_score"] == metrics["rmse_all"] == 0.0
        rul = np.loadtxt(nasa_folder / f"RUL_{subset}.txt")
        assert metrics["n_units"] == len(rul)
        last = test.targets["rul"][test.meta["is_last"]].numpy()
        np.testing.assert_array_equal(last, np.minimum(rul, 125) if cap else rul)
