"""Per-sample losses by name, and the step from predictions to one loss vector per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional

from mtlbalance.errors import DataError, PluginError, TrainingError, did_you_mean
from mtlbalance.plugins.references import import_reference
from mtlbalance.slots import PerSampleLoss, TaskSpec
from mtlbalance.training.memory import names_out_of_memory


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error a sample, averaged over a wide head's outputs."""
    return _per_sample(functional.mse_loss(*_matching(prediction, target), reduction="none"))


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error a sample, averaged over a wide head's outputs."""
    return _per_sample(functional.l1_loss(*_matching(prediction, target), reduction="none"))


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Huber loss (delta 1, in the target's unit) a sample, averaged over a wide head's outputs."""
    return _per_sample(functional.huber_loss(*_matching(prediction, target), reduction="none"))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy a sample between (B, classes) logits and (B,) class indices."""
    return functional.cross_entropy(logits.float(), target, reduction="none")


_BUILT_IN: dict[str, PerSampleLoss] = {"mse": mse, "l1": l1, "huber": huber, "cross_entropy": cross_entropy}


def resolve_loss(task: TaskSpec) -> PerSampleLoss:
    """Return the task's loss as a callable.

    Raises:
        PluginError: the name is unknown, or the import string leads to nothing callable.
    """
    if callable(task.loss):
        return task.loss
    if task.loss in _BUILT_IN:
        return _BUILT_IN[task.loss]
    if ":" not in task.loss:
        raise PluginError(
            f"task {task.name!r} names the unknown loss {task.loss!r}{did_you_mean(task.loss, _BUILT_IN)}; "
            f"use one of {', '.join(_BUILT_IN)}, a callable, or 'module:attribute'"
        )
    try:
        loss = import_reference(task.loss)
    except PluginError as error:
        raise PluginError(f"the loss of task {task.name!r} cannot be used: {error}") from error
    if not callable(loss):
        raise PluginError(f"task {task.name!r}: {task.loss!r} is not callable")
    return loss  # type: ignore[no-any-return]


class TaskLosses:
    """The inner losses of all tasks: ``losses(predictions, targets) -> {task: (B,)}``.

    A task whose targets are not in the batch is left out; the balancer gives it no weight.
    """

    def __init__(self, tasks: Sequence[TaskSpec]) -> None:
        self._losses = {
            task.name: (
                resolve_loss(task),
                names_out_of_memory(f"the loss of task {task.name!r}", "training.batch_size"),
            )
            for task in tasks
        }

    def __call__(self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of the tasks that have targets."""
        losses: dict[str, Tensor] = {}
        for name, (loss, naming) in self._losses.items():
            if name not in targets:
                continue
            try:
                with naming:
                    values = loss(predictions[name], targets[name])
            except IndexError as error:  # a class that the head does not have
                raise DataError(f"a target of task {name!r} cannot be used: {error}") from error
            except ValueError as error:
                raise TrainingError(f"the loss of task {name!r} failed: {error}") from error
            if values.shape != targets[name].shape[:1]:
                raise TrainingError(
                    f"the loss of task {name!r} has shape {tuple(values.shape)}, but one value a sample is "
                    f"needed: ({targets[name].shape[0]},); use reduction='none'"
                )
            losses[name] = values
        return losses


def _matching(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    # Broadcasting (B,) against (B, 1) to (B, B) would train on nonsense without a word.
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction has shape {tuple(prediction.shape)} and the target {tuple(target.shape)}"
        )
    return prediction.float() if prediction.element_size() < 4 else prediction, target


def _per_sample(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).mean(1)
