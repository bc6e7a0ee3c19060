"""The options of the built-in balancers, and the faults that only show once the tasks are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from mtlbalance.errors import did_you_mean
from mtlbalance.plugins.registrations import PluginConfig, Problem
from mtlbalance.slots import TaskSpec

Weight: TypeAlias = Annotated[float, Field(ge=0)]
Sync: TypeAlias = Annotated[
    Literal["gradients", "norms", "none"],
    Field(description="what is averaged over ranks before it is read; gradients: exact"),
]

Delivery: TypeAlias = Annotated[
    Literal["auto", "direct", "weighted_sum", "low_memory", "batched"],
    Field(
        description="direct: reuse what is measured; weighted_sum: a pass more; low_memory: hold little; "
        "batched: all tasks in one pass (GPU)"
    ),
]


class _Weighted(PluginConfig):
    weights: dict[str, Weight] | list[Weight] | None = Field(
        None, description="weight by task, or a list in the dataset's order; used as given; none: 1/K each"
    )
    sync: Sync = "gradients"


class _FailureWeighted(PluginConfig):
    biased_task: str = Field(description="the task whose samples weigh more the nearer they are to failure")
    target_cap: float = Field(gt=0, description="the target at which a sample's weight is down to 1")
    max_weight: float = Field(2.0, ge=1, description="weight of a sample whose target is 0")


class FixedOptions(_Weighted):
    """Options of ``fixed``."""


class AMNLOptions(_Weighted, _FailureWeighted):
    """Options of ``amnl``."""

    normalise: bool = Field(False, description="the legacy form: divide each loss by its own magnitude first")


class GABAOptions(PluginConfig):
    """Options of ``gaba``."""

    beta: float = Field(0.99, ge=0, lt=1, description="smoothing of the weights: the share kept at each step")
    warmup_steps: int = Field(100, ge=0, description="first steps, with equal weights")
    min_weight: float = Field(
        0.05, ge=0, le=1, description="floor of a weight before renormalising; at most 1/K"
    )
    update_every: int = Field(1, ge=1, description="steps between measurements of the gradient norms")
    delivery: Delivery = "auto"
    sync: Sync = "gradients"


class GRACEOptions(GABAOptions, _FailureWeighted):
    """Options of ``grace``."""


def check_balancer_options(config: PluginConfig, tasks: Sequence[TaskSpec]) -> Iterator[Problem]:
    """Yield what is wrong with built-in options for these tasks."""
    names = [task.name for task in tasks]
    known = f"the tasks are {', '.join(names)}"
    if isinstance(config, _Weighted):
        if isinstance(config.weights, Mapping):
            for name in config.weights:
                if name not in names:
                    yield Problem(f"weights.{name}", f"unknown task {name!r}", _suggest(name, names) or known)
            missing = [name for name in names if name not in config.weights]
            if missing:
                yield Problem("weights", f"'weights' has no weight for {_quoted(missing)}", known)
        elif config.weights is not None and len(config.weights) != len(names):
            given = len(config.weights)
            yield Problem("weights", f"'weights' has {given} values for {len(names)} tasks", known)
        if config.weights is not None and not any(_values(config.weights)):
            yield Problem("weights", "'weights' are all zero: nothing would be learned")
    if isinstance(config, GABAOptions) and config.min_weight > 1 / len(names):
        yield Problem(
            "min_weight",
            f"'min_weight' must be at most 1/K = {1 / len(names):.4g} for {len(names)} tasks, "
            f"not {config.min_weight:g}",
        )
    # Last: what is required may be missing, and a check goes no further than the first such option.
    if isinstance(config, _FailureWeighted) and config.biased_task not in names:
        task = config.biased_task
        yield Problem("biased_task", f"unknown task {task!r}", _suggest(task, names) or known)


def _values(weights: Mapping[str, float] | Sequence[float]) -> list[float]:
    return list(weights.values() if isinstance(weights, Mapping) else weights)


def _suggest(name: str, names: Sequence[str]) -> str:
    return did_you_mean(name, names).removeprefix("; ")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
