"""Evaluation: the weight EMA, predictions over a whole set, and its metrics.

Evaluation always computes in fp32, whatever the precision of training, so that what a run reports is what
its saved weights give later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtlbalance.errors import PluginError
from mtlbalance.slots import MultiTaskData
from mtlbalance.training.batches import EvaluationBatch
from mtlbalance.training.metrics import task_metrics
from mtlbalance.training.model import MultiTaskModel
from mtlbalance.training.record import is_training_column


def weight_ema(model: MultiTaskModel, decay: float) -> AveragedModel:
    """Return the shadow of ``model``: parameters are averaged, buffers are copied.

    The shadow starts at the initial weights. Buffers (the running statistics of BatchNorm, step counters)
    are the live model's: they are averages already, and averaging an integer counter would be wrong.
    With decay 0 the shadow is the live model.
    """
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    shadow = AveragedModel(model, multi_avg_fn=average, use_buffers=False)
    shadow.requires_grad_(requires_grad=False)
    for module in shadow.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # a copied cuDNN network is in pieces, and packs itself in every call
    shadow.update_parameters(model)  # the first call copies; every later one averages
    return shadow


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
