"""FairGrad: α-fair improvements over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer
from mtlbalance.balancers.simplex import barrier_newton


class FairGradLoss(GramianBalancer):
    """Weigh tasks so that their improvements are α-fair: from the sum of improvements to the worst one.

    Use it to choose between total progress (α near 0), proportional fairness (α = 1, Nash-MTL) and max-min
    fairness (large α).

        G·w = w^(−1/α) (elementwise), w > 0

    Args:
        tasks: K >= 1 unique task names.
        alpha: α > 0. Default 1.
        scale_heads: whether heads are weighted too. Default True: the authors weigh the losses.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    As in ``NashMTLLoss``, 1e-10 of each ‖g_k‖² is added to the diagonal. Zero gradients, absent tasks, State and
    Cost: see ``GramianBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = FairGradLoss(("a", "b"), alpha=1.0)
        >>> balancer(theta[0] * 2.0, theta[1] * 4.0, shared_params=[theta]).backward()
        >>> balancer.get_weights()  # without conflict and at α = 1: 1/‖g_k‖
        {'a': 0.5, 'b': 0.25}

    Source: Ban and Ji 2024, equation 6. Difference: Newton's method, see ``NashMTLLoss``.
    """

    method: ClassVar[str] = "FairGrad"
    scale_heads: bool = True

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        alpha: float = 1.0,
        scale_heads: bool | None = None,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks,
            scale_heads=scale_heads,
            update_every=update_every,
            delivery=delivery,
            sync=sync,
            process_group=process_group,
        )
        self.alpha = real(alpha, "alpha", 0.0, np.inf, low_open=True, high_open=True)

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the positive solution of Gw = w^(−1/α)."""
        return barrier_newton(gramian + 1e-10 * np.diag(gramian.diagonal()), 1.0 / self.alpha)
