"""The built-in balancers that are no function of the Gramian: their options, and what is registered of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from mtlbalance.errors import did_you_mean
from mtlbalance.plugins.balancer_options import Delivery, Sync
from mtlbalance.plugins.registrations import BalancerRegistration, FromClass, PluginConfig, Problem
from mtlbalance.slots import TaskSpec

if TYPE_CHECKING:
    from mtlbalance.balancers.base import Balancer

NonNegative: TypeAlias = Annotated[float, Field(ge=0)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]


class LossOptions(PluginConfig):
    """The options that all of them have."""

    sync: Sync = "gradients"


class MeasuringOptions(LossOptions):
    """The options of those that read task gradients."""

    update_every: int = Field(1, ge=1, description="steps between measurements of the task gradients")
    delivery: Delivery = "auto"


class UncertaintyOptions(LossOptions):
    """Options of ``uncertainty``."""

    kinds: dict[str, Literal["regression", "classification"]] | None = Field(
        None, description="form of each task's term, by task; none: the kinds of the dataset's tasks"
    )


class IMTLLOptions(LossOptions):
    """Options of ``imtl-l``."""


class GradNormOptions(MeasuringOptions):
    """Options of ``gradnorm``."""

    alpha: float = Field(1.5, ge=0, description="how strongly slow tasks are pulled up; 0: equal norms")
    weight_lr: float = Field(0.025, gt=0, description="step size of the weights, times the gradient norm")


class DWAOptions(LossOptions):
    """Options of ``dwa``."""

    temperature: float = Field(2.0, gt=0, description="the larger, the more uniform the weights")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="calls of an epoch; none: the trainer says when one ends"
    )


class RLWOptions(LossOptions):
    """Options of ``rlw``."""

    seed: int = Field(0, ge=0, description="of the weights; the same on all ranks")
    scale_by_tasks: bool = Field(False, description="weights that sum to K instead of 1")


class RGWOptions(RLWOptions):
    """Options of ``rgw``."""

    delivery: Delivery = "auto"


class GLSOptions(LossOptions):
    """Options of ``gls``."""


class FAMOOptions(LossOptions):
    """Options of ``famo``."""

    lr: float = Field(0.025, gt=0, description="step size of Adam on the logits")
    gamma: float = Field(0.001, ge=0, description="decay of the logits")
    min_losses: dict[str, NonNegative] | list[NonNegative] | None = Field(
        None, description="lower bound of each loss, by task or in the dataset's order; none: 0"
    )


class _Preferring(LossOptions):
    preference: dict[str, Positive] | list[Positive] | None = Field(
        None, description="preference by task, or in the dataset's order; none: 1 each"
    )


class STCHOptions(_Preferring):
    """Options of ``stch``."""

    mu: float = Field(1.0, gt=0, description="smoothness: near 0 the maximum of the log losses")
    nadir_steps: int = Field(100, ge=1, description="first steps of a task, over which its nadir is averaged")


class ExcessMTLOptions(MeasuringOptions):
    """Options of ``excess-mtl``."""

    weight_lr: float = Field(0.01, gt=0, description="step size of the weights, in the exponent")


class PBIOptions(_Preferring):
    """Options of ``pbi``."""

    penalty: float = Field(5.0, ge=0, description="factor of the distance from the preferred direction")
    ideal: dict[str, NonNegative] | list[NonNegative] | None = Field(
        None, description="lowest loss to expect, by task or in the dataset's order; none: 0"
    )


class COSMOSOptions(_Preferring):
    """Options of ``cosmos``."""

    penalty: float = Field(1.0, ge=0, description="factor of the cosine between losses and preference")


_BY_TASK = ("kinds", "min_losses", "preference", "ideal", "leak")


def check_by_task(config: PluginConfig, tasks: Sequence[TaskSpec]) -> Iterator[Problem]:
    """Yield what is wrong with options that have a value for every task."""
    names = [task.name for task in tasks]
    known = f"the tasks are {', '.join(names)}"
    for key in _BY_TASK:
        given = getattr(config, key, None)
        if isinstance(given, dict):
            for name in given:
                if name not in names:
                    near = did_you_mean(name, names).removeprefix("; ")
                    yield Problem(f"{key}.{name}", f"unknown task {name!r}", near or known)
            missing = ", ".join(repr(name) for name in names if name not in given)
            if missing:
                yield Problem(key, f"{key!r} has no value for {missing}", known)
        elif isinstance(given, list) and len(given) != len(names):
            yield Problem(key, f"{key!r} has {len(given)} values for {len(names)} tasks", known)


def build_uncertainty(options: UncertaintyOptions, tasks: Sequence[TaskSpec]) -> Balancer:
    """Build ``uncertainty`` with the kinds of the tasks, unless the options say others."""
    from mtlbalance.balancers.uncertainty import UncertaintyLoss

    kinds = options.kinds or {task.name: task.kind for task in tasks}
    return UncertaintyLoss([task.name for task in tasks], kinds=kinds, sync=options.sync)


def _registration(
    name: str, summary: str, options: type[PluginConfig], reference: str
) -> BalancerRegistration:
    build = FromClass(f"mtlbalance.balancers.{reference}")
    return BalancerRegistration(name, summary, options, build, check_by_task)


LOSS_BALANCERS: list[BalancerRegistration] = [
    replace(
        _registration(
            "uncertainty", "learned task variances", UncertaintyOptions, "uncertainty:UncertaintyLoss"
        ),
        build=build_uncertainty,
    ),
    _registration(
        "imtl-l", "learned scales that make the scaled losses equal", IMTLLOptions, "imtl_l:IMTLLLoss"
    ),
    _registration(
        "gradnorm", "weights that make tasks train at similar rates", GradNormOptions, "gradnorm:GradNormLoss"
    ),
    _registration(
        "dwa", "more weight where losses fall least from epoch to epoch", DWAOptions, "dwa:DWALoss"
    ),
    _registration("rlw", "random weights, drawn at every step", RLWOptions, "rlw:RLWLoss"),
    _registration("rgw", "random weights of the task gradients, heads unweighted", RGWOptions, "rlw:RGWLoss"),
    _registration("gls", "the geometric mean of the losses", GLSOptions, "gls:GLSLoss"),
    _registration("famo", "equal relative improvement, from the losses alone", FAMOOptions, "famo:FAMOLoss"),
    _registration(
        "stch", "a smooth maximum of the log losses over their nadirs", STCHOptions, "stch:STCHLoss"
    ),
    _registration(
        "excess-mtl",
        "more weight for tasks far from their best, robust to label noise",
        ExcessMTLOptions,
        "excess_mtl:ExcessMTLLoss",
    ),
    _registration(
        "pbi", "losses along a preferred direction, with a penalty off it", PBIOptions, "pbi:PBILoss"
    ),
    _registration(
        "cosmos", "a weighted sum with a reward for a preferred direction", COSMOSOptions, "cosmos:COSMOSLoss"
    ),
]
