"""Nash-MTL: the Nash bargaining solution between tasks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer
from mtlbalance.balancers.simplex import barrier_newton


class NashMTLLoss(GramianBalancer):
    """Weigh tasks so that the product of their improvements is largest.

    Use it when no task should profit at another's expense; it is invariant to the scale of the losses.

        G·α = 1/α (elementwise), α > 0

    Args:
        tasks: K >= 1 unique task names.
        scale_heads: whether heads are weighted too. Default True: the authors weigh the losses.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights have the scale of 1/‖g_k‖: the update is as long as √K whatever the gradients, so tune the learning
    rate. Exactly opposed gradients have no solution; a part of 1e-10 of each ‖g_k‖² is added to the diagonal, which
    bounds the weights. Zero gradients, absent tasks, State and Cost: see ``GramianBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = NashMTLLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 1.0]), theta @ torch.tensor([6.0, 1.0, 1.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad
        tensor([0.0766, 0.9985, 0.9985])

    Source: Navon et al. 2022, Claim 3.1. Difference: solved by Newton's method on ½αᵀGα − Σ log α_k, which has the same
    stationary point (of two tasks: α_k = 1/(‖g_k‖·√(1 + cosine))), instead of a sequence of convex programs; no
    dependence on a solver that may be missing.
    """

    method: ClassVar[str] = "Nash-MTL"
    scale_heads: bool = True

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the positive solution of Gα = 1/α."""
        norms = np.sqrt(gramian.diagonal())
        # In α_k·n_k the problem has unit gradients, and no scale.
        cosines = gramian / np.outer(norms, norms) + 1e-10 * np.eye(len(norms))
        return barrier_newton(cosines) / norms
