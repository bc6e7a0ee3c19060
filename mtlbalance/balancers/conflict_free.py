"""ConFIG: the direction that makes the same angle with every task gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtlbalance.balancers.base import Delivers, Sync, WeightSum
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer

_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue of the cosines, whose rounding is about 1e-15


class ConFIGLoss(GramianBalancer):
    """Move so that all task losses fall at the same rate per unit gradient: the update conflicts with none.

    Use it where losses of very different kinds meet, such as the residuals, boundary and initial conditions of a
    physics-informed network.

    With the unit gradients u_k = g_k/‖g_k‖ as rows of U:

        v = U⁺1/‖U⁺1‖,  d = (Σ_k g_k·v)·v

    The cosine of v with every g_k is the same, and positive, wherever there is such a v; else it is the best in least
    squares. For opposite gradients, of which no v has a positive cosine with both, d is 0.

    The method has no task weights: ``get_weights()`` is NaN, and the value is the plain sum of the losses. But d lies
    in the span of the gradients and is found from their inner products, with C = UUᵀ the cosines and a = C⁺1:

        d = Σ c_k·g_k,  c_k = (Σ_j ‖g_j‖·(Ca)_j)/(aᵀCa)·a_k/‖g_k‖

    ``report()["raw"]`` shows the c_k. Each head gets its own gradient.

    Args:
        tasks: K >= 1 unique task names.
        update_every, delivery, sync, process_group: see ``GradientBalancer``; between measurements the c_k are reused.

    Zero gradients: left out of the problem. Absent tasks: the direction is that of the present ones; a single one keeps
    its gradient. State and Cost: see ``GramianBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = ConFIGLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 1.0]), theta @ torch.tensor([6.0, 1.0, 1.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad
        tensor([0.1588, 2.0706, 2.0706])

    Source: Liu et al. 2025, "ConFIG: towards conflict-free training of physics informed neural networks", Equation 2,
    with equal weights. Differences: the pseudo-inverse is that of the Gramian, in float64, its rank cut at 1e-12.
    """

    method: ClassVar[str] = "ConFIG"
    weight_sum: ClassVar[WeightSum] = "none"
    weighted_heads: ClassVar[str] = "use a method that weighs tasks, heads included"
    delivers: ClassVar[Delivers] = "combination"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks, update_every=update_every, delivery=delivery, sync=sync, process_group=process_group
        )
        self.solved_weights.fill_(1.0)  # until there is a direction: the plain sum

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the c_k."""
        norms = np.sqrt(gramian.diagonal())
        values, vectors = np.linalg.eigh(gramian / np.outer(norms, norms))
        kept = values > _RANK_TOLERANCE * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        ones = vectors.sum(axis=0)  # 1 in the basis of the range of C
        share = float(ones @ ones) / len(norms)
        if share < _RANK_TOLERANCE:  # 1 is orthogonal to the range: opposite gradients
            return np.zeros(len(norms))
        solution = vectors @ (ones / values)
        cosines = vectors @ ones  # Ca: what v has with each gradient, but for ‖U⁺1‖
        length = float(norms @ cosines) / float(ones @ (ones / values))
        return np.asarray(length * solution / norms)
