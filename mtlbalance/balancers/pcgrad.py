"""PCGrad: project conflicting task gradients onto each other's normal planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import integer
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer


class PCGradLoss(GramianBalancer):
    """Remove from each task gradient its component against every other task, then sum.

    Use it when task gradients point against each other (negative cosine), not when only their sizes differ.

    For each k, in a random order of j ≠ k: if v_k·g_j < 0, v_k ← v_k − (v_k·g_j / ‖g_j‖²)·g_j, starting from
    v_k = g_k and always projecting on the *original* g_j. The update is Σ_k v_k.

    Args:
        tasks: K >= 1 unique task names.
        seed: of the generator that draws the orders (>= 0); part of the state, the same on all ranks. Default 0.
        scale_heads: whether heads are weighted too. Default False: no other task's gradient reaches a head.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights are 1 each without conflict (a sum, not a mean). Zero gradients, absent tasks, State and Cost: see
    ``GramianBalancer``; the state includes the generator.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = PCGradLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 1.0]), theta @ torch.tensor([6.0, 1.0, 1.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad
        tensor([0.5848, 3.8012, 3.8012])

    Source: Yu et al. 2020, Algorithm 1.
    """

    method: ClassVar[str] = "PCGrad"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int = 0,
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
        self.generator = torch.Generator().manual_seed(integer(seed, "seed", 0))

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the column sums of the projection coefficients."""
        count = len(gramian)
        coefficients = np.eye(count)
        products = gramian.copy()  # of the gradients as they are changed, with those as they were
        squares = gramian.diagonal().tolist()
        for k in range(count):
            for j in torch.randperm(count, generator=self.generator, device="cpu").tolist():
                dot = float(products[k, j])
                if j != k and dot < 0:
                    coefficients[k, j] -= dot / squares[j]
                    products[k] -= dot / squares[j] * gramian[j]
        total: Array = coefficients.sum(axis=0)
        return total
