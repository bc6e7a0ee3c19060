"""Per-task metrics by name, over a whole set, from torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error, r2_score

from mtlbalance.errors import PluginError, did_you_mean
from mtlbalance.slots import TaskSpec


def _rmse(prediction: Tensor, target: Tensor, _: TaskSpec) -> Tensor:
    return mean_squared_error(prediction.double().flatten(), target.double().flatten(), squared=False)


def _mae(prediction: Tensor, target: Tensor, _: TaskSpec) -> Tensor:
    return mean_absolute_error(prediction.double().flatten(), target.double().flatten())


def _r2(prediction: Tensor, target: Tensor, _: TaskSpec) -> Tensor:
    if len(target) < 2:  # undefined for a single sample
        return target.new_tensor(float("nan"), dtype=prediction.dtype)
    return r2_score(prediction.double(), target.double())


def _accuracy(logits: Tensor, target: Tensor, task: TaskSpec) -> Tensor:
    return multiclass_accuracy(logits, target, num_classes=task.outputs, average="micro")


def _f1(logits: Tensor, target: Tensor, task: TaskSpec) -> Tensor:
    return multiclass_f1_score(logits, target, num_classes=task.outputs, average="weighted")


_REGRESSION: dict[str, Callable[[Tensor, Tensor, TaskSpec], Tensor]] = {
    "rmse": _rmse,
    "mae": _mae,
    "r2": _r2,
}
_CLASSIFICATION: dict[str, Callable[[Tensor, Tensor, TaskSpec], Tensor]] = {"accuracy": _accuracy, "f1": _f1}


def check_metrics(tasks: Sequence[TaskSpec]) -> None:
    """Raise PluginError for a metric that does not exist for its task's kind."""
    for task in tasks:
        known = _by_kind(task)
        for metric in task.metrics:
            if metric not in known:
                raise PluginError(
                    f"task {task.name!r} names the unknown {task.kind} metric {metric!r}"
                    f"{did_you_mean(metric, known)}; use some of {', '.join(known)}"
                )


def task_metrics(
    tasks: Sequence[TaskSpec], predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return ``{<task>_<metric>: value}`` for every metric that the tasks name, over CPU tensors."""
    return {
        f"{task.name}_{metric}": float(
            _by_kind(task)[metric](predictions[task.name], targets[task.name], task)
        )
        for task in tasks
        if task.name in targets
        for metric in task.metrics
    }


def _by_kind(task: TaskSpec) -> dict[str, Callable[[Tensor, Tensor, TaskSpec], Tensor]]:
    return _REGRESSION if task.kind == "regression" else _CLASSIFICATION
