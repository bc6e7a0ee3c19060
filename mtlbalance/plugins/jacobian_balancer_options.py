"""The built-in balancers that combine the task gradients themselves: their options, and what is registered of them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from mtlbalance.plugins.balancer_options import Delivery, Sync
from mtlbalance.plugins.loss_balancer_options import check_by_task
from mtlbalance.plugins.registrations import BalancerRegistration, FromClass, PluginConfig

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class CombiningOptions(PluginConfig):
    """The options that all of them have."""

    sync: Sync = "gradients"


class GradDropOptions(CombiningOptions):
    """Options of ``graddrop``."""

    leak: Share | dict[str, Share] | list[Share] = Field(
        0.0,
        description="what passes the mask unmasked: 0 none of a task's gradient, 1 all; one number, or by task",
    )
    seed: int = Field(0, ge=0, description="of the draws; the same on all ranks")


class TrimmedMeanOptions(CombiningOptions):
    """Options of ``trimmed-mean``."""

    trim_fraction: float = Field(0.25, ge=0, lt=0.5, description="share of the tasks dropped at either end")


class ConFIGOptions(CombiningOptions):
    """Options of ``config``."""

    update_every: int = Field(1, ge=1, description="steps between measurements of the task gradients")
    delivery: Delivery = "auto"


class MoCoOptions(CombiningOptions):
    """Options of ``moco``."""

    beta: float = Field(0.5, gt=0, le=1, description="share of the new gradient in the tracked one")
    beta_decay: float = Field(0.5, ge=0, description="at call t the share is beta / t**beta_decay")
    gamma: float = Field(0.1, gt=0, description="step of the weights, per squared gradient norm")
    gamma_decay: float = Field(0.5, ge=0, description="at call t the step is gamma / t**gamma_decay")
    rho: float = Field(0.0, ge=0, description="how strongly weights are pulled to equality")
    normalise: bool = Field(False, description="track gradients of length L_k instead of their own")


class DBMTLOptions(CombiningOptions):
    """Options of ``db-mtl``."""

    beta: float = Field(0.9, ge=0, lt=1, description="share of the old mean in the smoothed gradient")
    beta_decay: float = Field(0.0, ge=0, description="at call t the share is beta / t**beta_decay")


def _registration(
    name: str, summary: str, options: type[PluginConfig], reference: str
) -> BalancerRegistration:
    return BalancerRegistration(
        name, summary, options, FromClass(f"mtlbalance.balancers.{reference}"), check_by_task
    )


JACOBIAN_BALANCERS: list[BalancerRegistration] = [
    _registration(
        "graddrop",
        "one sign of the task gradients in each element",
        GradDropOptions,
        "grad_drop:GradDropLoss",
    ),
    _registration(
        "trimmed-mean",
        "the mean of the task gradients without the extremes of each element",
        TrimmedMeanOptions,
        "trimmed_mean:TrimmedMeanLoss",
    ),
    _registration(
        "config",
        "the direction at the same angle to all task gradients",
        ConFIGOptions,
        "conflict_free:ConFIGLoss",
    ),
    _registration("moco", "the shortest combination of tracked task gradients", MoCoOptions, "moco:MoCoLoss"),
    _registration(
        "db-mtl",
        "log losses, and smoothed gradients all as long as the longest",
        DBMTLOptions,
        "db_mtl:DBMTLLoss",
    ),
]
