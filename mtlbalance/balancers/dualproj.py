"""DualProj: the mean gradient, projected so that it conflicts with no task."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer
from mtlbalance.balancers.upgrad import project_on_dual_cone


class DualProjLoss(GramianBalancer):
    """Project the mean gradient on the cone where no loss increases.

    Use it for steps that stay as near to the mean gradient as they can without harming a task (to first order).

    d = argmin ‖d − (1/K) Σ g_k‖ subject to d·g_j >= 0 for all j.

    Args:
        tasks: K >= 1 unique task names.
        scale_heads: whether heads are weighted too. Default False.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights without conflict are 1/K each. Zero gradients, absent tasks, State and Cost: see ``GramianBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = DualProjLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([1.0, 0.0]), theta @ torch.tensor([-3.0, 4.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad  # the mean is (-1, 2); its component against the first task is removed
        tensor([0., 2.])

    Source: Lopez-Paz and Ranzato 2017 (GEM), for the mean gradient. Difference: no regularisation is added.
    """

    method: ClassVar[str] = "DualProj"

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the weights of the projected mean."""
        return project_on_dual_cone(gramian, np.full(len(gramian), 1.0 / len(gramian)))
