"""The built-in balancers that are a function of the Gramian: their options, and what is registered of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from mtlbalance.errors import did_you_mean
from mtlbalance.plugins.balancer_options import Delivery, Sync
from mtlbalance.plugins.loss_balancer_options import Positive, check_by_task
from mtlbalance.plugins.registrations import BalancerRegistration, FromClass, PluginConfig, Problem
from mtlbalance.slots import TaskSpec

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Check: TypeAlias = Callable[[Any, Sequence[TaskSpec]], Iterable[Problem]]


class GramianOptions(PluginConfig):
    """The options that all of them have."""

    scale_heads: bool = Field(False, description="weight the parameters of one task alone, too")
    update_every: int = Field(1, ge=1, description="steps between measurements of the task gradients")
    delivery: Delivery = "auto"
    sync: Sync = "gradients"


class LossWeightingOptions(GramianOptions):
    """The options of those whose authors weigh whole losses, heads included."""

    scale_heads: bool = Field(True, description="weight the parameters of one task alone, too")


class MGDAOptions(GramianOptions):
    """Options of ``mgda``."""

    normalise: Literal["none", "l2", "loss", "loss+"] = Field(
        "none", description="scale of the gradients in the problem: none, norm, loss, or both"
    )


class PCGradOptions(GramianOptions):
    """Options of ``pcgrad``."""

    seed: int = Field(0, ge=0, description="of the random orders; the same on all ranks")


class CAGradOptions(GramianOptions):
    """Options of ``cagrad``."""

    c: float = Field(0.5, ge=0, description="radius around the mean gradient, as a share of its length")
    rescale: Literal["none", "squared", "linear"] = Field(
        "none", description="divide the update by 1, 1 + c*c, or 1 + c"
    )


class FairGradOptions(LossWeightingOptions):
    """Options of ``fairgrad``."""

    alpha: float = Field(1.0, gt=0, description="fairness: 1 proportional (Nash-MTL), large max-min")


class AlignedMTLOptions(GramianOptions):
    """Options of ``aligned-mtl``."""

    scale: Literal["min", "median", "mean"] = Field(
        "min", description="the eigenvalue that the principal components are set to"
    )


class GradVacOptions(GramianOptions):
    """Options of ``gradvac``."""

    beta: Share = Field(0.01, description="share of a new cosine in a pair's target; 0: PCGrad")
    seed: int = Field(0, ge=0, description="of the random orders; the same on all ranks")


class KrumOptions(GramianOptions):
    """Options of ``krum``."""

    num_byzantine: int = Field(
        0, ge=0, description="gradients that may be arbitrary; needs as many tasks + 3"
    )
    num_selected: int = Field(1, ge=1, description="task gradients that are averaged")


class PCDOptions(GramianOptions):
    """Options of ``pcd``."""

    primary: str | None = Field(None, description="the task that comes first; none: the dataset's first")
    tau: Share | dict[str, Share] = Field(
        0.02, description="share of its own progress that each other task is assured of, or one a task"
    )
    beta: float = Field(0.999, ge=0, lt=1, description="decay of the averages of the squared gradient norms")


class CRMOGMOptions(GramianOptions):
    """Options of ``cr-mogm``."""

    solver: Literal[
        "mgda",
        "pcgrad",
        "cagrad",
        "imtl-g",
        "nash-mtl",
        "fairgrad",
        "aligned-mtl",
        "upgrad",
        "dualproj",
    ] = Field("mgda", description="the method whose weights are averaged, with its default options")
    alpha: Share = Field(0.9, description="share of the old weights at each measurement")
    scale_heads: bool | None = Field(  # type: ignore[assignment]
        None, description="weight the parameters of one task alone, too; none: as the method does"
    )


class SDMGradOptions(GramianOptions):
    """Options of ``sdmgrad``; a run has one batch a step, so this is its one-batch form."""

    weight_lr: float = Field(0.1, gt=0, description="step size of the weights")
    regularisation: float = Field(
        0.3, ge=0, description="pull towards the preferred sum; 0: towards MGDA alone"
    )
    preference: dict[str, Positive] | list[Positive] | None = Field(
        None, description="preference by task, or in the dataset's order; none: 1 each"
    )
    normalise: bool = Field(True, description="measure gradients in units of their usual size")


class MoDoOptions(GramianOptions):
    """Options of ``modo``; a run has one batch a step, so this is its one-batch form."""

    gamma: float = Field(0.1, gt=0, description="step size of the weights")
    rho: float = Field(0.1, ge=0, description="pull towards equal weights")
    normalise: bool = Field(False, description="measure gradients in units of their usual size")


def check_krum(config: KrumOptions, tasks: Sequence[TaskSpec]) -> Iterator[Problem]:
    """Yield which counts are too large for these tasks."""
    count = len(tasks)
    if config.num_byzantine and count < config.num_byzantine + 3:
        yield Problem(
            "num_byzantine",
            f"'num_byzantine' = {config.num_byzantine} needs at least {config.num_byzantine + 3} tasks, not {count}",
            f"at most {count - 3} here" if count > 3 else "leave it out",
        )
    if config.num_selected > count:
        yield Problem(
            "num_selected", f"'num_selected' = {config.num_selected} is more than the {count} tasks"
        )


def check_pcd(config: PCDOptions, tasks: Sequence[TaskSpec]) -> Iterator[Problem]:
    """Yield which task names are unknown or missing."""
    names = [task.name for task in tasks]
    known = f"the tasks are {', '.join(names)}"
    primary = config.primary or names[0]
    if primary not in names:
        yield Problem("primary", f"unknown task {primary!r}", _suggest(primary, names) or known)
    elif isinstance(config.tau, dict):
        for name in config.tau:
            if name not in names:
                yield Problem(f"tau.{name}", f"unknown task {name!r}", _suggest(name, names) or known)
        missing = [name for name in names if name != primary and name not in config.tau]
        if missing:
            yield Problem("tau", f"'tau' has no value for {', '.join(map(repr, missing))}", known)
        if primary in config.tau:
            yield Problem(f"tau.{primary}", f"{primary!r} is the primary task, which has no 'tau'")


def _suggest(name: str, names: Sequence[str]) -> str:
    return did_you_mean(name, names).removeprefix("; ")


def _registration(
    name: str, summary: str, options: type[PluginConfig], reference: str, check: Check | None = None
) -> BalancerRegistration:
    return BalancerRegistration(name, summary, options, FromClass(f"mtlbalance.balancers.{reference}"), check)


GRAMIAN_BALANCERS: list[BalancerRegistration] = [
    _registration(
        "mgda", "the shortest convex combination of the task gradients", MGDAOptions, "mgda:MGDALoss"
    ),
    _registration(
        "pcgrad",
        "projects conflicting task gradients onto each other's normal planes",
        PCGradOptions,
        "pcgrad:PCGradLoss",
    ),
    _registration(
        "cagrad", "near the mean gradient, helps the worst-off task most", CAGradOptions, "cagrad:CAGradLoss"
    ),
    _registration(
        "imtl-g", "equal projections on all unit task gradients", GramianOptions, "imtl_g:IMTLGLoss"
    ),
    _registration(
        "nash-mtl", "the Nash bargaining solution between tasks", LossWeightingOptions, "nash_mtl:NashMTLLoss"
    ),
    _registration("fairgrad", "alpha-fair improvements over tasks", FairGradOptions, "fairgrad:FairGradLoss"),
    _registration(
        "aligned-mtl",
        "equal principal components of the gradient matrix",
        AlignedMTLOptions,
        "aligned_mtl:AlignedMTLLoss",
    ),
    _registration(
        "upgrad",
        "the mean of the task gradients, each projected off every conflict",
        GramianOptions,
        "upgrad:UPGradLoss",
    ),
    _registration(
        "dualproj", "the mean gradient, projected off every conflict", GramianOptions, "dualproj:DualProjLoss"
    ),
    _registration(
        "gradvac",
        "turns gradients to the cosine that the pair usually has",
        GradVacOptions,
        "gradvac:GradVacLoss",
    ),
    _registration(
        "krum", "the task gradients nearest to their neighbours", KrumOptions, "krum:KrumLoss", check_krum
    ),
    _registration(
        "pcd",
        "the primary task's gradient, bent until the others gain their share",
        PCDOptions,
        "pcd:PCDLoss",
        check_pcd,
    ),
    _registration(
        "cr-mogm", "the weights of another method, averaged over steps", CRMOGMOptions, "cr_mogm:CRMOGMLoss"
    ),
    _registration(
        "sdmgrad",
        "simplex weights that step by double samples, near a preferred sum",
        SDMGradOptions,
        "sdmgrad:SDMGradLoss",
        check_by_task,
    ),
    _registration(
        "modo", "simplex weights that step towards MGDA's by double samples", MoDoOptions, "modo:MoDoLoss"
    ),
]
