"""Checks of arguments; every message says what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from mtlbalance.errors import InvalidArgumentError, did_you_mean


def task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple, or raise unless they are at least one, unique and not empty."""
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise InvalidArgumentError(
            f"tasks must be a sequence of names, such as ('rul', 'health'); got {tasks!r}"
        )
    names = tuple(tasks)
    if not names:
        raise InvalidArgumentError("tasks is empty; a balancer needs at least one task name")
    for name in names:
        if not isinstance(name, str) or not name:
            raise InvalidArgumentError(f"a task name must be a non-empty string; got {name!r}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InvalidArgumentError(f"task names must be unique; repeated: {', '.join(map(repr, repeated))}")
    return names


def known_task(name: object, tasks: Sequence[str], where: str) -> str:
    """Return ``name`` if it is one of ``tasks``, else raise with the nearest one."""
    if name in tasks:
        return str(name)
    listed = ", ".join(map(repr, tasks))
    raise InvalidArgumentError(
        f"{where}: unknown task {name!r} (tasks: {listed}){did_you_mean(str(name), tasks)}"
    )


def real(
    value: Any, name: str, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> float:
    """Return ``value`` as a float, or raise unless it is a finite real number in the interval."""
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    interval = f"{left}{low:g}, {high:g}{right}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidArgumentError(f"{name} must be a number in {interval}; got {value!r}")
    number = float(value)
    too_low = number <= low if low_open else number < low
    too_high = number >= high if high_open else number > high
    if not math.isfinite(number) or too_low or too_high:
        raise InvalidArgumentError(f"{name} must be in {interval}; got {number:g}")
    return number


def integer(value: Any, name: str, low: int) -> int:
    """Return ``value`` as an int, or raise unless it is a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise InvalidArgumentError(f"{name} must be a whole number >= {low}; got {value!r}")
    return int(value)


def one_of(value: Any, name: str, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``, else raise with the nearest one."""
    if value in options:
        return str(value)
    listed = ", ".join(map(repr, options))
    raise InvalidArgumentError(
        f"{name} must be one of {listed}; got {value!r}{did_you_mean(str(value), options)}"
    )


def task_weights(weights: Any, tasks: Sequence[str], name: str = "weights") -> list[float]:
    """Return one non-negative weight a task, in task order; None gives 1/K each."""
    if weights is None:
        return [1.0 / len(tasks)] * len(tasks)
    if isinstance(weights, Mapping):
        for task in weights:
            known_task(task, tasks, name)
        missing = [task for task in tasks if task not in weights]
        if missing:
            raise InvalidArgumentError(f"{name} has no weight for {', '.join(map(repr, missing))}")
        listed = [weights[task] for task in tasks]
    else:
        if isinstance(weights, str) or not isinstance(weights, Iterable):
            raise InvalidArgumentError(
                f"{name} must be a mapping or a sequence of {len(tasks)} numbers; got {weights!r}"
            )
        listed = list(weights)
        if len(listed) != len(tasks):
            raise InvalidArgumentError(
                f"{name} has {len(listed)} values for {len(tasks)} tasks ({', '.join(tasks)})"
            )
    return [
        real(value, f"{name}[{task!r}]", 0.0, math.inf) for task, value in zip(tasks, listed, strict=True)
    ]
