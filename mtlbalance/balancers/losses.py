"""From the arguments of a balancer's call to one 0-d loss a present task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlbalance.balancers.checks import known_task
from mtlbalance.errors import InvalidArgumentError

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def name_losses(arguments: Sequence[Any], tasks: Sequence[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the losses of the present tasks by name, in task order, and the empty ones.

    ``arguments`` is one mapping, or one loss a task in task order. A task that is missing from the
    mapping, is None, or has an empty per-sample loss (no labels in this batch) is absent.
    """
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        given: Mapping[str, Any] = arguments[0]
        for name in given:
            known_task(name, tasks, "losses")
    elif len(arguments) == len(tasks):
        given = dict(zip(tasks, arguments, strict=True))
    else:
        expected = ", ".join(tasks)
        raise InvalidArgumentError(
            f"expected a mapping of losses by task name, or {len(tasks)} losses in the order ({expected}); "
            f"got {len(arguments)} positional argument(s)"
        )
    present: dict[str, Tensor] = {}
    empty: list[Tensor] = []
    for task in tasks:
        loss = given.get(task)
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise InvalidArgumentError(
                f"the loss of task {task!r} must be a tensor; got {type(loss).__name__}"
            )
        if not loss.is_floating_point():
            raise InvalidArgumentError(
                f"the loss of task {task!r} must be a real floating-point tensor; got {loss.dtype}"
            )
        if loss.dim() > 1:
            raise InvalidArgumentError(
                f"the loss of task {task!r} must be 0-d, or per sample (B,); got shape {tuple(loss.shape)}"
            )
        if loss.numel() > 0:
            present[task] = loss
        else:
            empty.append(loss.float() if loss.dtype in _LOW_PRECISION else loss)
    return present, empty


def no_losses(tasks: Sequence[str], *, several_ranks: bool) -> InvalidArgumentError:
    """The error for a call without any loss; other ranks may wait for what this one owes them."""
    advice = (
        "; the other ranks wait for this one: give it empty losses of its model's outputs, such as loss[mask] with no "
        "sample in the mask, so that it takes part"
    )
    return InvalidArgumentError(
        f"no task has a loss in this call (tasks: {', '.join(tasks)}){advice if several_ranks else ''}"
    )


def reduce_losses(losses: Mapping[str, Tensor], sample_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each loss as a 0-d tensor of at least float32: mean(w·l) over the samples, w = 1 by default."""
    reduced: dict[str, Tensor] = {}
    for task, given in losses.items():
        loss = given.float() if given.dtype in _LOW_PRECISION else given
        weight = sample_weights.get(task)
        if weight is not None:
            loss = loss * checked_sample_weight(weight, loss, task)
        reduced[task] = loss.mean() if loss.dim() == 1 else loss
    return reduced


def check_sample_weights(
    sample_weights: Mapping[str, Tensor] | None, tasks: Sequence[str]
) -> dict[str, Tensor]:
    """Return the sample weights as a new dict whose names are all tasks."""
    if sample_weights is None:
        return {}
    if not isinstance(sample_weights, Mapping):
        raise InvalidArgumentError(
            f"sample_weights must map task names to tensors of shape (B,); got {type(sample_weights).__name__}"
        )
    return {known_task(name, tasks, "sample_weights"): weight for name, weight in sample_weights.items()}


def checked_sample_weight(weight: Tensor, loss: Tensor, task: str) -> Tensor:
    """Return the sample weights of a task, detached and beside its loss, or raise unless they fit it."""
    if not isinstance(weight, Tensor):
        raise InvalidArgumentError(
            f"sample_weights[{task!r}] must be a tensor of shape (B,); got {type(weight).__name__}"
        )
    if loss.dim() == 0:
        raise InvalidArgumentError(
            f"task {task!r} has sample weights, so its loss must be per sample, shape (B,), but it is 0-d; "
            "compute it with reduction='none'"
        )
    if weight.shape != loss.shape:
        raise InvalidArgumentError(
            f"sample_weights[{task!r}] has shape {tuple(weight.shape)}, but its loss has {tuple(loss.shape)}"
        )
    return weight.detach().to(device=loss.device, dtype=loss.dtype)
