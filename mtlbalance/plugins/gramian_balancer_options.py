"""The built-in balancers that are a function of the Gramian: their options, and what is registered of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtlbalance.plugins.balancer_options import Sync
from mtlbalance.plugins.registrations import PluginConfig


class GramianOptions(PluginConfig):
    """The options that all of them have."""

    scale_heads: bool = Field(False, description="weight the parameters of one task alone, too")
    update_every: int = Field(1, ge=1, description="steps between measurements of the task gradients")
    delivery: Literal["auto", "direct", "weighted_sum"] = Field(
        "auto", description="direct: reuse the measured gradients; weighted_sum: one more backward pass"
    )
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


# name, summary, options, class
GRAMIAN_BALANCERS: list[tuple[str, str, type[PluginConfig], str]] = [
    (
        "mgda",
        "the shortest convex combination of the task gradients",
        MGDAOptions,
        "mtlbalance.balancers.mgda:MGDALoss",
    ),
    (
        "pcgrad",
        "projects conflicting task gradients onto each other's normal planes",
        PCGradOptions,
        "mtlbalance.balancers.pcgrad:PCGradLoss",
    ),
    (
        "cagrad",
        "near the mean gradient, helps the worst-off task most",
        CAGradOptions,
        "mtlbalance.balancers.cagrad:CAGradLoss",
    ),
    (
        "imtl-g",
        "equal projections on all unit task gradients",
        GramianOptions,
        "mtlbalance.balancers.imtl_g:IMTLGLoss",
    ),
    (
        "nash-mtl",
        "the Nash bargaining solution between tasks",
        LossWeightingOptions,
        "mtlbalance.balancers.nash_mtl:NashMTLLoss",
    ),
    (
        "fairgrad",
        "alpha-fair improvements over tasks",
        FairGradOptions,
        "mtlbalance.balancers.fairgrad:FairGradLoss",
    ),
    (
        "aligned-mtl",
        "equal principal components of the gradient matrix",
        AlignedMTLOptions,
        "mtlbalance.balancers.aligned_mtl:AlignedMTLLoss",
    ),
    (
        "upgrad",
        "the mean of the task gradients, each projected off every conflict",
        GramianOptions,
        "mtlbalance.balancers.upgrad:UPGradLoss",
    ),
    (
        "dualproj",
        "the mean gradient, projected off every conflict",
        GramianOptions,
        "mtlbalance.balancers.dualproj:DualProjLoss",
    ),
]
