"""The metrics of the prognostics literature, which look at engines and not just at samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EARLY_CYCLES = 13.0
LATE_CYCLES = 10.0


def nasa_score(predicted_cycles: Tensor, true_cycles: Tensor) -> float:
    """Return the score of the PHM 2008 challenge: a sum over engines, 0 is perfect, late costs more.

    Args:
        predicted_cycles: (E,) predicted remaining life.
        true_cycles: (E,) true remaining life.

    >>> nasa_score(torch.tensor([37.0, 60.0]), torch.tensor([50.0, 50.0]))  # 13 early, 10 late
    3.43656365691809
    """
    error = predicted_cycles.double() - true_cycles.double()
    cost = torch.where(error < 0, -error / EARLY_CYCLES, error / LATE_CYCLES)
    return float(torch.expm1(cost).sum())


def rmse(predicted: Tensor, true: Tensor) -> float:
    """Return the root of the mean squared error."""
    return float((predicted.double() - true.double()).square().mean().sqrt())


def evaluate(
    predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], meta: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the RUL metrics of a whole set.

    ``rmse_last`` and ``nasa_score`` look at the last window of each engine (left out where a set has
    none), ``rmse_all`` at every window; ``n_units`` counts engines.
    """
    predicted = predictions["rul"].reshape(-1)
    true = targets["rul"].reshape(-1)
    metrics: dict[str, float] = {
        "rmse_all": rmse(predicted, true),
        "n_units": len(torch.unique(meta["unit"])),
    }
    last = meta["is_last"].bool()
    if last.any():
        metrics["rmse_last"] = rmse(predicted[last], true[last])
        metrics["nasa_score"] = nasa_score(predicted[last], true[last])
    return metrics
