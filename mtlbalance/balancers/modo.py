"""MoDo: simplex weights that descend towards the shortest direction, from double samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.double_sampling import DoubleSamplingBalancer
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, Indices
from mtlbalance.balancers.simplex import project_on_simplex


class MoDoLoss(DoubleSamplingBalancer):
    """Follow MGDA's weights slowly, by unbiased stochastic steps.

    Use it for MGDA's aim with small batches; the step size trades how well conflicts are avoided (large) against
    optimisation and generalisation (small: nearly equal weights).

    With J₁, J₂ the task gradients of two independent batches and Π the nearest point of the simplex:

        λ ← Π(λ − γ·(J₁J₂ᵀλ + ρ·λ));  weights λ,  λ(0) = 1/K

    ``observe`` gives it the two batches: see ``DoubleSamplingBalancer``.

    Args:
        tasks: K >= 1 unique task names.
        gamma: γ > 0, to be chosen against the squared size of the gradients, unless ``normalise``. Default 0.1.
        rho: ρ >= 0, which draws λ to equal weights. Default 0.1.
        normalise: see ``DoubleSamplingBalancer``. Default False, as published.
        scale_heads: whether heads are weighted too. Default False.
        update_every, delivery, sync, process_group: see ``DoubleSamplingBalancer``.

    Weights sum to 1. Zero gradients, absent tasks, State and Cost: see ``DoubleSamplingBalancer``.

    Raises:
        InvalidArgumentError: an argument is out of range.
        SharedParametersError: see ``DoubleSamplingBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = MoDoLoss(("a", "b"), rho=0.0)
        >>> for noise in (0.1, -0.1):  # two more batches
        ...     balancer.observe((2.0 + noise) * theta[0], theta[1], shared_params=[theta])
        >>> _ = balancer(2.0 * theta[0], theta[1], shared_params=[theta])
        >>> round(balancer.get_weights()["a"], 5)  # 0.5 - 0.1/2·(3.99·0.5 - 1·0.5)
        0.42525
        >>> balancer.get_name()
        'MoDo'

    Source: Chen et al. 2023, Algorithm 1 and equation 2.9, with defaults of the authors' code. The gradients delivered
    are those of the ordinary call's batch, as in LibMTL; the authors' two-batch form delivers the sum of both.
    """

    method: ClassVar[str] = "MoDo"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        gamma: float = 0.1,
        rho: float = 0.1,
        normalise: bool = False,
        scale_heads: bool | None = None,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks,
            normalise=normalise,
            scale_heads=scale_heads,
            update_every=update_every,
            delivery=delivery,
            sync=sync,
            process_group=process_group,
        )
        self.gamma = real(gamma, "gamma", 0.0, np.inf, low_open=True, high_open=True)
        self.rho = real(rho, "rho", 0.0, np.inf, high_open=True)

    def step(self, tasks: Indices, weights: Array, products: Array) -> Array:  # noqa: ARG002
        """Return the projected step."""
        return project_on_simplex(weights - self.gamma * (products @ weights + self.rho * weights))
