"""Evaluation: the weight EMA, predictions over a whole set, and its metrics.

Evaluation always computes in fp32, whatever the precision of training, so that what a run reports is what
its saved weights give later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from mtlbalance.errors import PluginError, TrainingError
from mtlbalance.slots import MultiTaskData
from mtlbalance.training.batches import EvaluationBatch
from mtlbalance.training.metrics import task_metrics
from mtlbalance.training.model import MultiTaskModel
from mtlbalance.training.record import is_training_column


class WeightEMA(nn.Module):
    """The shadow of a model, which is evaluated: parameters are averaged, all else is the live model's.

    The shadow starts at the initial weights. Buffers (the running statistics of BatchNorm, step counters) are averages
    already, and averaging an integer counter would be wrong. With decay 0 the shadow is the live model.

    ``torch.optim.swa_utils.AveragedModel`` gives the same numbers, and collects both sets of weights anew in every
    step, which in a small model takes several times as long as to average them.

    Args:
        model: on its device; its parameters stay the same objects.
        decay: of the average, in [0, 1).
    """

    n_averaged: Tensor

    def __init__(self, model: MultiTaskModel, decay: float) -> None:
        super().__init__()
        self.module = deepcopy(model)
        self.module.requires_grad_(requires_grad=False)
        for module in self.module.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # a copied cuDNN network is in pieces, and packs itself in every call
        self.register_buffer("n_averaged", torch.tensor(1))  # states of the weights, the first one included
        self._new_share = 1.0 - decay
        self._shadows: list[Tensor] = list(filter(_can_be_averaged, self.module.parameters()))
        self._live: list[Tensor] = list(filter(_can_be_averaged, model.parameters()))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the shadow's predictions."""
        predictions: dict[str, Tensor] = self.module(inputs)
        return predictions

    @torch.no_grad()
    def update(self) -> None:
        """Average the live model's parameters in."""
        torch._foreach_lerp_(self._shadows, self._live, self._new_share)
        self.n_averaged += 1

    @torch.no_grad()
    def copy_the_rest(self, model: MultiTaskModel) -> None:
        """Copy what is not averaged from the live model: once, before the shadow is used, and not in every step.

        Raises:
            TrainingError: the model has other buffers than it was built with.
        """
        shadows, live = _not_averaged(self.module), _not_averaged(model)
        if shadows.keys() != live.keys():
            changed = ", ".join(sorted(shadows.keys() ^ live.keys()))
            raise TrainingError(
                f"the model's buffers have changed while it was trained ({changed}), so no checkpoint could be loaded "
                "again; a backbone must register all of them when it is built"
            )
        for name, shadow in shadows.items():
            shadow.copy_(live[name])


def _not_averaged(model: nn.Module) -> dict[str, Tensor]:
    whole_numbers = {name: p for name, p in model.named_parameters() if not _can_be_averaged(p)}
    return whole_numbers | dict(model.named_buffers())


def _can_be_averaged(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


@dataclass(frozen=True)
class Predictions:
    """What a model says about a whole set, in the set's order, on the CPU."""

    predictions: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    meta: Mapping[str, Tensor]


@torch.no_grad()
def predict(models: Sequence[nn.Module], batches: Iterable[EvaluationBatch]) -> list[Predictions]:
    """Return each model's predictions, reading the set once for all of them."""
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    predicted: list[list[dict[str, Tensor]]] = [[] for _ in models]
    targets: list[Mapping[str, Tensor]] = []
    meta: list[Mapping[str, Tensor]] = []
    for inputs, batch_targets, batch_meta in batches:
        for outputs, model in zip(predicted, models, strict=True):
            outputs.append(model(inputs))
        targets.append(batch_targets)
        meta.append(batch_meta)
    for model, mode in zip(models, was_training, strict=True):
        model.train(mode)
    all_targets, all_meta = _concatenate(targets), _concatenate(meta)
    return [
        Predictions(
            {name: values.cpu() for name, values in _concatenate(outputs).items()}, all_targets, all_meta
        )
        for outputs in predicted
    ]


def score(data: MultiTaskData, predictions: Predictions) -> dict[str, float]:
    """Return the tasks' own metrics, then those of the dataset's evaluator.

    Raises:
        PluginError: the key metric is not among them, or the evaluator gives something else than numbers by name.
    """
    metrics = task_metrics(data.tasks, predictions.predictions, predictions.targets)
    if data.evaluate is not None:
        extra = data.evaluate(predictions.predictions, predictions.targets, predictions.meta)
        if not isinstance(extra, Mapping):
            raise PluginError(f"the dataset's evaluator must return numbers by name; it returned {extra!r}")
        metrics |= {name: _plain_number(name, value) for name, value in extra.items()}
    taken = [name for name in metrics if is_training_column(name)]
    if taken:
        raise PluginError(
            f"metrics.csv has its own column {taken[0]!r}; the dataset's metric needs another name"
        )
    if data.key_metric not in metrics:
        raise PluginError(
            f"the key metric {data.key_metric!r} is not computed; there are: {', '.join(metrics) or 'no metrics'}"
        )
    return metrics


def _plain_number(name: str, value: Any) -> float:
    """Return a whole count as an int, so that files show ``259`` and not ``259.0``."""
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PluginError(f"the dataset's metric {name!r} is no number but {value!r}") from error


def _concatenate(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
