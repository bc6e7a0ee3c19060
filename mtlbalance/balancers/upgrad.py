"""UPGrad: the mean of the task gradients, each projected so that it conflicts with no task."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer
from mtlbalance.balancers.simplex import nonnegative_qp, nonnegative_qps


class UPGradLoss(GramianBalancer):
    """Project every task gradient on the cone where no loss increases, then average.

    Use it for steps that harm no task (to first order) and still count each task in proportion to its gradient.

    v_k = argmin ‖v − g_k‖ subject to v·g_j >= 0 for all j; the update is (1/K) Σ v_k.

    Args:
        tasks: K >= 1 unique task names.
        scale_heads: whether heads are weighted too. Default False.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights without conflict are 1/K each (a mean). Zero gradients, absent tasks, State and Cost: see
    ``GramianBalancer``; K small quadratic problems are solved.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = UPGradLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 1.0]), theta @ torch.tensor([6.0, 1.0, 1.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad
        tensor([0.2924, 1.9006, 1.9006])

    Source: Quinton and Rey 2024, Definition 2. Difference: no regularisation is added to the Gramian.
    """

    method: ClassVar[str] = "UPGrad"

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the mean of the tasks' projected weights."""
        if len(gramian) == 2:  # each correction is by the other gradient alone
            (first, cross), (_, second) = gramian.tolist()
            conflict = max(-cross, 0.0)
            return 0.5 * np.array([1.0 + conflict / first, 1.0 + conflict / second])
        root = np.sqrt(gramian.diagonal())
        unit = gramian / np.outer(root, root)
        corrections = nonnegative_qps(unit, -unit)  # one problem a task, as in `project_on_dual_cone`
        weights: Array = (1.0 + root @ corrections / root) / len(gramian)
        return weights


def project_on_dual_cone(gramian: Array, weights: Array) -> Array:
    """Return the weights of the projection of Σ w_k g_k on {v: v·g_k >= 0 for all k}.

    The projection is Σ (w_k + u_k) g_k with the u >= 0 that minimises ‖Σ (w_k + u_k) g_k‖².
    """
    return weights + nonnegative_qp(gramian, -gramian @ weights)
