"""DB-MTL: dual balancing, of losses by their logarithms and of gradients by their lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call, Sync, WeightSum
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.signals import Signals
from mtlbalance.balancers.tracking import TrackingBalancer


class DBMTLLoss(TrackingBalancer):
    """Minimise log losses, with every task's smoothed gradient scaled to the length of the longest.

    Use it where losses differ in scale by orders of magnitude and tasks should move the trunk equally far.

    At a task's t-th call, with g_k = ∂log L_k/∂θ = ∂L_k/∂θ / L_k:

        ĝ_k ← (β_t·c·ĝ_k + (1 − β_t)·g_k)/c′,  c′ = β_t·c + 1 − β_t,  β_t = β/t^σ      c = 0 at first, so ĝ_k = g_k
        d = max_j ‖ĝ_j‖ · Σ ĝ_k/‖ĝ_k‖

    A head is trained on the log loss too: it gets ∂L_k/L_k. The weights reported are
    w_k = max_j ‖ĝ_j‖/(‖ĝ_k‖·L_k), those of this call's gradients where ĝ_k = g_k (β = 0); what is delivered is d.
    The value is Σ w_k·L_k.

    Args:
        tasks: K >= 1 unique task names.
        beta: β in [0, 1), the share of the old mean. Default 0.9.
        beta_decay: σ >= 0; with σ > 0 the mean forgets faster and faster. Default 0.
        sync, process_group: see ``JacobianBalancer``. With ``"norms"`` each rank tracks its own gradients, and the
            norms are averaged.

    Absent tasks: their means wait; the longest is that of the present ones, and a single one has w = 1/L.
    Losses that are not positive have no logarithm: the call counts in ``num_nonfinite``, and the last good weights are
    applied to the gradients of the losses themselves. A mean of 0 adds nothing, and has w_k = 1/L_k.

    State: ``mean_shares`` (K,), the c; ``task_weights`` (K,), and that of ``TrackingBalancer``.
    Cost: K backward passes through heads and trunk, and 2·K copies of the trunk's gradients, K of them kept. No host
    sync.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, unrelated to a task, not all that two tasks share,
            of another size than before, or holds representations: a mean over calls needs the same numbers in each.

    Example:
        >>> import torch
        >>> theta = torch.ones(2, requires_grad=True)
        >>> balancer = DBMTLLoss(("a", "b"))
        >>> balancer(100 * theta[0], theta[1] ** 4 + 1, shared_params=[theta]).backward()
        >>> theta.grad  # log gradients 1 and 2, both made 2 long
        tensor([2., 2.])
        >>> {task: round(weight, 3) for task, weight in balancer.get_weights().items()}
        {'a': 0.02, 'b': 0.5}

    Source: Lin et al. 2023, "Dual-balancing for multi-task learning"; defaults of LibMTL, by the same authors.
    Differences: no 1e-8 beside losses and norms; theirs starts the mean at 0, which has the same direction and first
    steps that are shorter, by c.
    """

    method: ClassVar[str] = "DB-MTL"
    weight_sum: ClassVar[WeightSum] = "free"
    unusable: ClassVar[str] = (
        "a loss or a task gradient was NaN or infinite, or a loss was outside the domain where logs have finite slopes"
    )
    free_alone: ClassVar[bool] = True
    needs_positive_losses: ClassVar[bool] = True
    heads_get: ClassVar[str] = "∂log L_k"

    mean_shares: Tensor
    task_weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        beta: float = 0.9,
        beta_decay: float = 0.0,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.beta = real(beta, "beta", 0.0, 1.0, high_open=True)
        self.beta_decay = real(beta_decay, "beta_decay", 0.0, math.inf)
        self.register_buffer("mean_shares", torch.zeros(len(self.tasks)))
        self.register_buffer("task_weights", torch.full((len(self.tasks),), 1.0 / len(self.tasks)))

    def usable(self, signals: Signals) -> Tensor:
        """Return whether all is finite, and the losses are positive."""
        return super().usable(signals) & ((signals.losses_K > 0) | ~signals.present_K).all()

    def scales(self, signals: Signals) -> Tensor:
        """Return 1/L_k, and 1 where that is not to be used."""
        inverse_K = 1.0 / signals.losses_K
        return torch.where(signals.present_K & signals.finite, inverse_K, torch.ones_like(inverse_K))

    def head_weights(self, signals: Signals) -> Tensor:
        """Return 1/L_k, or the last good weights."""
        weights_K = self.current_weights(signals.present_K).to(signals.losses_K)
        return torch.where(signals.finite, self.scales(signals), weights_K)

    def rates(self, moves_K: Tensor) -> Tensor:
        """Return what the new gradient is of the mean."""
        beta_K = self.beta / self.tracked_calls.clamp(min=1.0) ** self.beta_decay
        shares_K = beta_K * self.mean_shares + 1.0 - beta_K
        self.mean_shares.copy_(torch.where(moves_K, shares_K, self.mean_shares))
        return (1.0 - beta_K) / shares_K

    def coefficients(self, call: Call, signals: Signals) -> Tensor:
        """Return what makes all means as long as the longest."""
        present_K = signals.present_K
        norms_K = torch.linalg.vector_norm(self.tracked, dim=1) * present_K
        if call.ranks is not None and self.sync == "norms":
            norms_K = call.ranks.sum(norms_K) / call.ranks.size
        ones_K = torch.ones_like(norms_K)
        coefficients_K = torch.where(norms_K > 0, norms_K.max() / norms_K, ones_K) * present_K
        coefficients_K = coefficients_K.clamp(max=torch.finfo(coefficients_K.dtype).max)
        weights_K = (coefficients_K * self.scales(signals)).to(self.task_weights)
        weights_K = weights_K.clamp(max=torch.finfo(weights_K.dtype).max)
        moves_K = present_K & signals.finite
        self.task_weights.copy_(torch.where(moves_K, weights_K, self.task_weights))
        return coefficients_K

    def weigh(self, signals: Signals) -> Tensor:
        """Return the weights, also where a single task with nothing known to be shared was not tracked."""
        weights_K = super().weigh(signals)
        if signals.grad_norms_K is None:
            usable = self.usable(signals)
            return torch.where(usable & signals.present_K, self.scales(signals).to(weights_K), weights_K)
        return weights_K

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the last weights of the present tasks."""
        return self.task_weights * present_K
