"""GradNorm: weights learned so that tasks train at similar rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync, WeightSum
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.gradient_balancer import Delivery, GradientBalancer
from mtlbalance.balancers.presence import choose, moving, share_budget
from mtlbalance.balancers.signals import Signals

_SMALLEST_WEIGHT = 1e-3


class GradNormLoss(GradientBalancer):
    """Move the weights so that weighted gradient norms agree, larger for tasks that learn slowly.

    Use it when losses fall at different rates and you can name the last layer that the tasks share.

    With n_k = ‖∂L_k/∂θ‖₂ over ``shared_params`` θ (the paper's: the last shared layer), and means over tasks:

        r_k = (L_k/L_k(0)) / mean_j(L_j/L_j(0))            inverse training rate
        t_k = mean_j(w_j·n_j)·r_k^α, a constant            target
        w_k ← max(w_k − η·n_k·sign(w_k·n_k − t_k), 0.001),  then scaled to Σ w = K

    which is one gradient step on Σ |w_k·n_k − t_k|, in closed form: nothing is differentiated twice, and nothing
    is left in the model's gradients. A call applies w as it was before its own step; the first has w = 1.

    Args:
        tasks: K >= 1 unique task names.
        alpha: α >= 0, how strongly slow tasks are pulled up; 0 asks for equal norms. Default 1.5.
        weight_lr: η > 0. The step is η·n_k, so it depends on the scale of the gradients: with norms around 100
            take a smaller one, or weights jump between their bounds. Default 0.025.
        update_every: measure, and step, on every N-th call (>= 1). Default 1.
        delivery, sync, process_group: see ``GradientBalancer``.

    Absent tasks: w and means are those of the present tasks, whose applied weights share K; the others wait.
    L_k(0) is the loss at the task's first finite call. A loss that starts at 0, or all losses at 0, counts as
    rate 1; a negative one as rate 0.

    State: ``task_weights``, ``initial_losses`` (NaN: not yet seen), ``grad_norms``, each (K,), and the base's.
    ``parameters()`` is empty: the step is its own, not your optimizer's.

    Cost: K backward passes down to ``shared_params``, and for a suffix of the trunk one more. No host sync.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, or unrelated to a task.

    Example:
        >>> import torch
        >>> theta = torch.ones(2, requires_grad=True)
        >>> balancer = GradNormLoss(("a", "b"), weight_lr=0.1)
        >>> for _ in range(2):
        ...     loss = balancer(3.0 * theta[0], theta[1], shared_params=[theta])
        >>> {task: round(weight, 4) for task, weight in balancer.get_weights().items()}  # 0.7 and 1.1, scaled
        {'a': 0.7778, 'b': 1.2222}

    Source: Chen et al. 2018, Algorithm 1. Differences: a plain gradient step where the paper's experiments may
    use Adam, and the smallest weight of 0.001, which keeps weights positive.
    """

    method: ClassVar[str] = "GradNorm"
    weight_sum: ClassVar[WeightSum] = "K"

    task_weights: Tensor
    initial_losses: Tensor
    grad_norms: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        alpha: float = 1.5,
        weight_lr: float = 0.025,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks, update_every=update_every, delivery=delivery, sync=sync, process_group=process_group
        )
        self.alpha = real(alpha, "alpha", 0.0, math.inf)
        self.weight_lr = real(weight_lr, "weight_lr", 0.0, math.inf, low_open=True)
        count = len(self.tasks)
        self.register_buffer("task_weights", torch.ones(count))
        self.register_buffer("initial_losses", torch.full((count,), math.nan))
        self.register_buffer("grad_norms", torch.full((count,), math.nan))
        self.applied_weights.fill_(1.0)

    def weigh(self, signals: Signals) -> Tensor:
        """Return the weights so far, and step them by what was measured, if anything."""
        present_K = signals.present_K
        applied_K = self.current_weights(present_K)
        moves_K = moving(present_K, signals.finite)
        first_K = moves_K & self.initial_losses.isnan()
        self.initial_losses.copy_(torch.where(first_K, signals.losses_K, self.initial_losses))
        if signals.grad_norms_K is not None:
            self.grad_norms.copy_(choose(moves_K, signals.grad_norms_K, self.grad_norms))
            slopes_K = self._slopes(applied_K, signals.grad_norms_K, signals.losses_K, present_K)
            stepped_K = (applied_K - self.weight_lr * slopes_K).clamp(min=_SMALLEST_WEIGHT) * present_K
            share = (self.task_weights * present_K).sum() / stepped_K.sum()
            moves_K = moves_K & torch.isfinite(share)
            self.task_weights.copy_(torch.where(moves_K, stepped_K * share, self.task_weights))
        return applied_K

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the present tasks' weights, which share K."""
        return share_budget(self.task_weights, present_K)

    def _slopes(self, weights_K: Tensor, norms_K: Tensor, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return ∂/∂w_k Σ |w_k·n_k − t_k|, the targets held constant; 0 for absent tasks."""
        count = present_K.sum()
        fallen_K = torch.where(self.initial_losses == 0, 1.0, losses_K / self.initial_losses).clamp(min=0.0)
        mean_fallen = torch.where(present_K, fallen_K, 0.0).sum() / count
        rates_K = torch.where(mean_fallen > 0, fallen_K / mean_fallen, 1.0)
        weighted_K = torch.where(present_K, weights_K * norms_K, 0.0)
        targets_K = (weighted_K.sum() / count) * rates_K**self.alpha
        return torch.where(present_K, norms_K * torch.sign(weighted_K - targets_K), 0.0)

    def _report(self) -> dict[str, Tensor]:
        return {**super()._report(), "grad_norm": self.grad_norms}
