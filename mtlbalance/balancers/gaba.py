"""GABA: gradient-aware balancing of task losses."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import integer, real
from mtlbalance.balancers.gradient_balancer import Delivery, GradientBalancer
from mtlbalance.balancers.presence import choose, is_everyone, moving, only, share_of_present
from mtlbalance.balancers.signals import Signals


class GABALoss(GradientBalancer):
    """Weigh each task by the others' share of the gradient norm on the shared parameters, smoothed and floored.

    Use it when one task's gradient on the trunk dwarfs the others'. It bounds the imbalance and cannot cancel
    it: the floor keeps every weight at or above about ``min_weight``.

    With n_k = ‖∂L_k/∂θ‖₂ over the shared parameters θ and S = Σ n_k:

        λ_k = (S − n_k) / ((K − 1)·S)              raw
        e_k ← β·e_k + (1 − β)·λ_k,  e_k(0) = 1/K     smoothed, untouched in warm-up
        w_k = max(e_k, floor) / Σ_j max(e_j, floor)  applied

    For K = 2 the raw weights are those of 1/n_k weighting; for K >= 3 they are not, and do not equalise
    the contributions w_k·n_k.

    Args:
        tasks: K >= 1 unique task names.
        beta: smoothing β in [0, 1); the time constant is 1/(1 − β) calls. Default 0.99.
        warmup_steps: calls (>= 0) with uniform weights before the smoothing starts. Default 100.
        min_weight: floor in [0, 1/K], applied *before* renormalising, so that the smallest weight for K = 2
            at the default 0.05 is 0.05/1.05 = 0.0476. Default 0.05.
        update_every: measure on the first call after warm-up and then on every N-th; a measurement is then
            smoothed with β**(calls since the last one), so that the time constant stays in calls. Default 1.
        delivery, sync, process_group: see ``GradientBalancer``.

    Absent tasks: their smoothed weight does not move; the present ones share the rest, as if alone.
    All gradients zero: the raw weights are uniform.

    State: ``ema_weights``, ``raw_weights``, ``grad_norms``, each (K,), and the base's.

    Cost: K backward passes through heads and trunk and K copies of the trunk's gradients (direct delivery);
    K + 1 passes by weighted sum; on representations K passes through the heads and one through the trunk;
    with ``update_every=N`` on average 1 + (K − 1)/N passes. No host sync. Of wide linear layers on a CPU one weight
    gradient is made, not K (see ``GradientBalancer``): on three layers of 1,024, K = 4 and batches of 32 and 64, a
    step takes 1.7 to 2.0 times the plain sum's, where it would take 2.5 to 3.7.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, or unrelated to a task.

    Example:
        >>> import torch
        >>> theta = torch.ones(2, requires_grad=True)
        >>> balancer = GABALoss(("rul", "health"), warmup_steps=0, beta=0.0)
        >>> loss = balancer({"rul": 3.0 * theta.sum(), "health": theta.sum()}, shared_params=[theta])
        >>> loss.backward()
        >>> {task: round(weight, 6) for task, weight in balancer.get_weights().items()}
        {'rul': 0.25, 'health': 0.75}
        >>> theta.grad  # 0.25 * 3 + 0.75 * 1
        tensor([1.5000, 1.5000])

    Source: the C-MAPSS study, Algorithm 1. Differences: no 1e-12 is added to S (an all-zero gradient is treated
    apart), and ``get_weights()`` returns the applied weights, where the study's returned the smoothed ones.
    """

    method: ClassVar[str] = "GABA"
    _counters: ClassVar[tuple[str, ...]] = ("calls", "measured_at")

    ema_weights: Tensor
    raw_weights: Tensor
    grad_norms: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        beta: float = 0.99,
        warmup_steps: int = 100,
        min_weight: float = 0.05,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks, update_every=update_every, delivery=delivery, sync=sync, process_group=process_group
        )
        count = len(self.tasks)
        self.beta = real(beta, "beta", 0.0, 1.0, high_open=True)
        self.warmup_steps = integer(warmup_steps, "warmup_steps", 0)
        self.min_weight = real(min_weight, f"min_weight (at most 1/K for {count} tasks)", 0.0, 1.0 / count)
        self.measured_at = self.warmup_steps - 1  # the call of the last measurement that moved the state
        self.register_buffer("ema_weights", torch.full((count,), 1.0 / count))
        self.register_buffer("raw_weights", torch.full((count,), math.nan))
        self.register_buffer("grad_norms", torch.full((count,), math.nan))

    def phase(self) -> tuple[Hashable, ...]:
        """Return also, for a call that measures, the calls since the last measurement; 0 in warm-up."""
        if not self.measures_now():
            return super().phase()
        waited = 0 if self.calls < self.warmup_steps else self.calls - self.measured_at
        return (*super().phase(), waited)

    def weigh(self, signals: Signals) -> Tensor:
        """Move the smoothed weights by what was measured, if anything, and apply them with their floor."""
        if signals.grad_norms_K is not None:
            self._measure(signals.grad_norms_K, signals.present_K, signals.finite)
        return self.current_weights(signals.present_K)

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the floored and renormalised share of each present task."""
        known = is_everyone(present_K)
        shares_K = self.ema_weights if known else share_of_present(self.ema_weights, present_K)
        floored_K = only(present_K, shares_K.clamp(min=self.min_weight))
        return floored_K / floored_K.sum()

    def _measure(self, norms_K: Tensor, present_K: Tensor, finite: Tensor) -> None:
        raw_K = raw_weights(norms_K, present_K).to(self.ema_weights.dtype)
        moves_K = moving(present_K, finite)
        self.grad_norms.copy_(choose(moves_K, norms_K, self.grad_norms))
        self.raw_weights.copy_(choose(moves_K, raw_K, self.raw_weights))
        if self.calls < self.warmup_steps:
            return
        decay = self.beta ** (self.calls - self.measured_at)
        self.measured_at = self.calls
        if not is_everyone(present_K):
            raw_K = raw_K * (
                1.0 - (self.ema_weights * ~present_K).sum()
            )  # the present tasks' part of the weights
        if is_everyone(moves_K):
            self.ema_weights.lerp_(raw_K, 1.0 - decay)
        else:
            smoothed_K = torch.lerp(self.ema_weights, raw_K, 1.0 - decay)
            self.ema_weights.copy_(torch.where(moves_K, smoothed_K, self.ema_weights))

    def _report(self) -> dict[str, Tensor]:
        return {
            **super()._report(),
            "smoothed": self.ema_weights,
            "raw": self.raw_weights,
            "grad_norm": self.grad_norms,
        }


def raw_weights(norms_K: Tensor, present_K: Tensor) -> Tensor:
    """Return λ_k = (S − n_k)/((K − 1)·S) over the present tasks; uniform if all norms are 0 or only one is there."""
    count = len(norms_K)
    # The others' norms are summed, not subtracted from S: one norm may be all of S to rounding.
    others_K = (norms_K * _all_but_one(count, norms_K.dtype, norms_K.device)).sum(dim=1)
    if is_everyone(present_K) and count > 1:
        return (others_K / others_K.sum()).nan_to_num_(nan=1.0 / count)  # the others' norms sum to (K − 1)·S
    present, total = present_K.sum(), norms_K.sum()
    raw_K = present_K * others_K / ((present - 1).clamp(min=1) * total)
    return torch.where((total > 0) & (present > 1), raw_K, present_K / present)


@cache
def _all_but_one(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (K, K) ones with a diagonal of zeros."""
    with torch.inference_mode(False):
        return 1.0 - torch.eye(count, dtype=dtype, device=device)
