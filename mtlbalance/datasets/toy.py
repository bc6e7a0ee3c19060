"""The built-in ``toy`` dataset: two regressions that share structure but not scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtlbalance.datasets.in_memory import InMemoryDataset
from mtlbalance.slots import InputSpec, MultiTaskData, TaskSpec

SPREAD = {"large": 30.0, "small": 0.1}  # standard deviation of each target


def make_toy(
    tasks: Sequence[TaskSpec], samples: int, features: int, noise: float, seed: int
) -> MultiTaskData:
    """Draw ``samples`` inputs and the targets of ``large`` and ``small`` from ``seed``.

    Both targets are smooth functions of the same three hidden projections of the input, so a shared trunk
    pays; scaled to ``SPREAD``, their squared errors differ by a factor of about 1e5, so under a
    plain sum the trunk hears almost nothing of ``small``.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, features, generator=generator)
    directions = torch.randn(features, 3, generator=generator)
    first, second, third = (inputs @ directions / features**0.5).unbind(dim=1)
    shapes = {"large": torch.sin(2 * first) + second, "small": torch.tanh(2 * second) * third + first}
    targets = {}
    for name, shape in shapes.items():
        jitter = noise * torch.randn(samples, generator=generator)
        targets[name] = SPREAD[name] * ((shape - shape.mean()) / shape.std() + jitter)
    end_of_train, end_of_validation = int(0.7 * samples), int(0.85 * samples)
    train, validation, test = (
        InMemoryDataset(inputs[part], {name: target[part] for name, target in targets.items()})
        for part in (
            slice(end_of_train),
            slice(end_of_train, end_of_validation),
            slice(end_of_validation, None),
        )
    )
    return MultiTaskData(
        train=train,
        validation=validation,
        test=test,
        tasks=tuple(tasks),
        inputs=InputSpec((features,), f"{features} features"),
        key_metric="nrmse",
        evaluate=normalised_errors,
        protocol="random split 70/15/15",
        data_source="generated",
    )


def normalised_errors(
    predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], _: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return each task's RMSE over its target's spread (1: no better than the mean), and their mean ``nrmse``."""
    errors = {
        f"{name}_nrmse": float((predictions[name] - targets[name]).square().mean().sqrt()) / spread
        for name, spread in SPREAD.items()
    }
    return {"nrmse": sum(errors.values()) / len(errors), **errors}
