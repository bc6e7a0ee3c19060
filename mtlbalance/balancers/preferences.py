"""Preferences between tasks, for the methods that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtlbalance.balancers.checks import task_weights
from mtlbalance.errors import InvalidArgumentError


def preferences(given: Mapping[str, float] | Sequence[float] | None, tasks: Sequence[str]) -> list[float]:
    """Return one positive preference a task, in task order; None gives 1 each."""
    if given is None:
        return [1.0] * len(tasks)
    values = task_weights(given, tasks, "preference")
    for task, value in zip(tasks, values, strict=True):
        if value == 0:
            raise InvalidArgumentError(
                f"preference[{task!r}] must be > 0; got 0 (leave the task out of the losses)"
            )
    return values
