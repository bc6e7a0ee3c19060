"""MGDA: the shortest vector in the convex hull of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtlbalance.balancers.base import Sync, WeightSum
from mtlbalance.balancers.checks import one_of
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer
from mtlbalance.balancers.simplex import simplex_qp


class MGDALoss(GramianBalancer):
    """Descend along the min-norm convex combination of the task gradients.

    Use it to stop where no direction improves every task (Pareto stationarity). It follows the smallest
    gradients, so a task that has converged slows all others.

        min ‖Σ α_k g_k / s_k‖²  over the simplex {α >= 0, Σ α_k = 1};  weights α

    Args:
        tasks: K >= 1 unique task names.
        normalise: the scale s_k in the problem only: ``"none"`` (1), ``"l2"`` (n_k), ``"loss"`` (L_k) or
            ``"loss+"`` (L_k·n_k). The raw gradients are what the weights are applied to. Default ``"none"``.
        scale_heads: whether heads are weighted too. Default False, as in the paper.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights sum to 1. Zero gradients, absent tasks, State and Cost: see ``GramianBalancer``. Exact: an active-set
    solver, not Frank-Wolfe steps.

    Example:
        >>> import torch
        >>> theta = torch.ones(2, requires_grad=True)
        >>> balancer = MGDALoss(("a", "b"))
        >>> balancer(theta[0] * 1.0, theta[1] * 2.0, shared_params=[theta]).backward()
        >>> theta.grad  # 0.8 * (1, 0) + 0.2 * (0, 2)
        tensor([0.8000, 0.4000])

    Source: Sener and Koltun 2018, Algorithm 2. Difference: their code also applies weights found on normalised
    gradients to raw ones; here that is the option it is.
    """

    method: ClassVar[str] = "MGDA"
    weight_sum: ClassVar[WeightSum] = "1"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        normalise: str = "none",
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
        self.normalise = one_of(normalise, "normalise", ("none", "l2", "loss", "loss+"))

    def solve(self, gramian: Array, losses: Array) -> Array:
        """Return the simplex weights of the shortest combination."""
        if self.normalise == "none":
            return simplex_qp(gramian, np.zeros(len(losses)))
        chosen = np.ones_like(losses) if self.normalise == "l2" else np.abs(losses)
        if self.normalise != "loss":
            chosen = chosen * np.sqrt(gramian.diagonal())
        scale = np.maximum(chosen, 1e-12 * chosen.max(initial=1e-300))
        return simplex_qp(gramian / np.outer(scale, scale), np.zeros(len(losses)))
