"""MoCo: multi-objective gradient correction, a min-norm direction of tracked rather than of noisy gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call, Sync, WeightSum
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.presence import share_of_present
from mtlbalance.balancers.signals import Signals
from mtlbalance.balancers.tracking import TrackingBalancer


class MoCoLoss(TrackingBalancer):
    """Follow each task gradient by a running mean, and the shortest convex combination of these means.

    Use it where small batches make the gradients noisy: the direction of MGDA from single batches is biased, and that
    from tracked gradients is not, in the limit.

    At a task's t-th call, with g_k = ∂L_k/∂θ, and T the largest t of the present tasks:

        y_k ← y_k − β_t·(y_k − g_k),  β_t = β/t^σ_β                         y_k = g_k at t = 1
        λ ← Π(λ − γ_T·(YYᵀ + ρI)λ),  γ_T = γ/T^σ_γ                          Π: the nearest point of the simplex
        d = Σ λ_k·y_k

    The weights are λ, the value is Σ λ_k·L_k, and each head gets its own gradient, unweighted. γ has the unit of one
    over a squared gradient: with losses of very different scales λ soon sits in a corner; see ``normalise``.

    Args:
        tasks: K >= 1 unique task names.
        beta: β, the share of the new gradient, in (0, 1]. Default 0.5.
        beta_decay: σ_β >= 0. Default 0.5.
        gamma: γ > 0, the step of λ. Default 0.1.
        gamma_decay: σ_γ >= 0. Default 0.5.
        rho: ρ >= 0, pulls λ to the middle. Default 0.
        normalise: track g_k·L_k/‖g_k‖ instead of g_k; a zero gradient stays zero. Default False.
        sync, process_group: see ``JacobianBalancer``. With ``"norms"`` each rank tracks its own gradients, and the
            slope YYᵀλ is averaged: larger than the exact one by how much the ranks' gradients differ.

    Absent tasks: their y_k and λ_k wait; the present ones share 1, and keep their common part of λ.

    State: ``task_weights`` (K,), and that of ``TrackingBalancer``.
    Cost: K backward passes through heads and trunk, and 2·K copies of the trunk's gradients, K of them kept. No host
    sync.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, unrelated to a task, not all that two tasks share,
            of another size than before, or holds representations: a mean over calls needs the same numbers in each.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = MoCoLoss(("a", "b"), gamma=0.1)
        >>> balancer(2 * theta[0], theta[1], shared_params=[theta]).backward()
        >>> {task: round(weight, 3) for task, weight in balancer.get_weights().items()}  # slopes 2 and 0.5
        {'a': 0.425, 'b': 0.575}
        >>> theta.grad
        tensor([0.8500, 0.5750])

    Source: Fernando et al. 2023, "Mitigating gradient bias in multi-objective learning", in the order of its authors'
    code: y, λ, direction. Differences: y starts at the first gradient, where theirs starts at 0 and takes first steps
    β times as long; no bound is set to ‖y_k‖. LibMTL, whose defaults these are, has a softmax in the place of Π and
    always normalises.
    """

    method: ClassVar[str] = "MoCo"
    weight_sum: ClassVar[WeightSum] = "1"

    task_weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        beta: float = 0.5,
        beta_decay: float = 0.5,
        gamma: float = 0.1,
        gamma_decay: float = 0.5,
        rho: float = 0.0,
        normalise: bool = False,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.beta = real(beta, "beta", 0.0, 1.0, low_open=True)
        self.beta_decay = real(beta_decay, "beta_decay", 0.0, math.inf)
        self.gamma = real(gamma, "gamma", 0.0, math.inf, low_open=True)
        self.gamma_decay = real(gamma_decay, "gamma_decay", 0.0, math.inf)
        self.rho = real(rho, "rho", 0.0, math.inf)
        self.normalise = bool(normalise)
        self.register_buffer("task_weights", torch.full((len(self.tasks),), 1.0 / len(self.tasks)))

    def scales(self, signals: Signals) -> Tensor:
        """Return 1, or L_k/‖g_k‖."""
        norms_K = signals.grad_norms_K
        if not self.normalise or norms_K is None:
            return torch.ones_like(signals.losses_K)
        return torch.where(norms_K > 0, signals.losses_K / norms_K, 0.0)

    def rates(self, moves_K: Tensor) -> Tensor:  # noqa: ARG002
        """Return β_t, and 1 at first."""
        calls_K = self.tracked_calls
        return torch.where(calls_K > 1, self.beta / calls_K.clamp(min=1.0) ** self.beta_decay, 1.0)

    def coefficients(self, call: Call, signals: Signals) -> Tensor:
        """Step λ towards the shortest combination, and return it."""
        present_K = signals.present_K
        before_K = share_of_present(self.task_weights, present_K).to(self.tracked)
        slopes_K = self.tracked @ (before_K @ self.tracked)
        if call.ranks is not None and self.sync == "norms":
            slopes_K = call.ranks.sum(slopes_K) / call.ranks.size
        calls = (self.tracked_calls * present_K).max().clamp(min=1.0)
        step = self.gamma / calls**self.gamma_decay
        after_K = project_to_simplex(before_K - step * (slopes_K + self.rho * before_K), present_K)
        moves = signals.finite & torch.isfinite(after_K).all()
        after_K = torch.where(moves, after_K, before_K)
        budget = (self.task_weights * present_K).sum()
        kept_K = torch.where(moves & present_K, (after_K * budget).to(self.task_weights), self.task_weights)
        self.task_weights.copy_(kept_K)
        return after_K

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return λ, shared by the present tasks."""
        return share_of_present(self.task_weights, present_K)


def project_to_simplex(values_K: Tensor, present_K: Tensor) -> Tensor:
    """Return the nearest point of the simplex over the present entries, 0 elsewhere, without a host sync."""
    values_K = (
        values_K - torch.where(present_K, values_K, -torch.inf).max()
    )  # or 1 is lost beside large values
    order_K = torch.where(present_K, values_K, -torch.inf).sort(descending=True).values
    rank_K = torch.arange(1, len(values_K) + 1, dtype=values_K.dtype, device=values_K.device)
    excess_K = (torch.where(torch.isneginf(order_K), 0.0, order_K).cumsum(0) - 1.0) / rank_K
    inside_K = order_K > excess_K  # true for the largest entries, up to the last one that stays positive
    shift = torch.where(inside_K, excess_K, -torch.inf).max()
    return torch.where(present_K, (values_K - shift).clamp(min=0.0), 0.0)
