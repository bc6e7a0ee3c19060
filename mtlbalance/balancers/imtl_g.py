"""IMTL-G: the combination whose projections on all unit task gradients are equal."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mtlbalance.balancers.base import WeightSum
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer


class IMTLGLoss(GramianBalancer):
    """Move equally far along every task's gradient direction.

    Use it when tasks should progress alike whatever the size of their gradients; weights may be negative.

    With u_k = g_k/‖g_k‖: Σ α_k = 1 and u_k·(Σ α_j g_j) equal for all k, that is α ∝ G⁺n with n_k = ‖g_k‖.

    Args:
        tasks: K >= 1 unique task names.
        scale_heads: whether heads are weighted too. Default False, as in the paper.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights sum to 1; uniform where G⁺n sums to zero (no such combination). The pseudo-inverse makes a singular
    Gramian (parallel gradients) harmless. Zero gradients, absent tasks, State and Cost: see ``GramianBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = IMTLGLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 1.0]), theta @ torch.tensor([6.0, 1.0, 1.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad
        tensor([0.0767, 1.0000, 1.0000])

    Source: Liu et al. 2021 (Towards Impartial Multi-task Learning), equation 7, in terms of the Gramian.
    """

    method: ClassVar[str] = "IMTL-G"
    signed_weights: ClassVar[bool] = True
    weight_sum: ClassVar[WeightSum] = "1"

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the weights of the equal projections."""
        norms = np.sqrt(gramian.diagonal())
        cosines = gramian / np.outer(norms, norms)
        shares = np.linalg.pinv(cosines, rcond=1e-10, hermitian=True) @ np.ones(len(norms)) / norms
        total = float(shares.sum())
        if abs(total) <= 1e-12 * float(np.abs(shares).sum()):
            return np.full(len(norms), 1.0 / len(norms))
        return shares / total
