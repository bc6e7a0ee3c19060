"""Aligned-MTL: remove the dominance and the conflict of gradients by aligning their principal components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import one_of
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer


class AlignedMTLLoss(GramianBalancer):
    """Give the gradient matrix equal principal components, then average the tasks.

    Use it when the linear system of task gradients is ill-conditioned: dominance and conflict at once.

    With G = V Λ Vᵀ: weights √λ·V Λ^(−½) Vᵀ·(1/K)·1 over the numerical rank, λ the smallest eigenvalue kept.

    Args:
        tasks: K >= 1 unique task names.
        scale: which eigenvalue the components are set to: ``"min"``, ``"median"`` or ``"mean"``. Default ``"min"``.
        scale_heads: whether heads are weighted too. Default False.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights of K orthogonal gradients of equal length are 1/K. Zero gradients, absent tasks, State and Cost: see
    ``GramianBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = AlignedMTLLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 1.0]), theta @ torch.tensor([6.0, 1.0, 1.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad
        tensor([0.2133, 0.9673, 0.9673])

    Source: Senushkin et al. 2023, Algorithm 1. Difference: the rank is cut at 1e-10 of the largest eigenvalue in
    float64, where the authors' cut depends on the default precision.
    """

    method: ClassVar[str] = "Aligned-MTL"
    signed_weights: ClassVar[bool] = True

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        scale: str = "min",
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
        self.scale = one_of(scale, "scale", ("min", "median", "mean"))

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the balanced weights of the mean."""
        values, vectors = np.linalg.eigh(gramian)
        kept = values > 1e-10 * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        match self.scale:
            case "min":
                level = values[0]
            case "median":
                level = np.median(values)
            case _:
                level = values.mean()
        balance = np.sqrt(level) * (vectors / np.sqrt(values)) @ vectors.T
        weights: Array = balance.mean(axis=1)
        return weights
