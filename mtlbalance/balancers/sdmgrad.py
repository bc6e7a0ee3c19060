"""SDMGrad: simplex weights that descend towards the shortest direction near a preferred one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.double_sampling import DoubleSamplingBalancer
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, Indices
from mtlbalance.balancers.preferences import preferences
from mtlbalance.balancers.presence import share_of_present
from mtlbalance.balancers.simplex import project_on_simplex


class SDMGradLoss(DoubleSamplingBalancer):
    """Seek a common descent direction near that of a preferred sum of losses, by unbiased stochastic steps.

    Use it for MGDA's aim with small batches: weights move slowly, from gradients of independent batches, and λ keeps
    the direction from following the smallest gradients alone.

    With J₁, J₂ the task gradients of two independent batches, w̃ the preference, Π the nearest point of the simplex:

        w ← Π(w − β·J₁J₂ᵀ(w + λ·w̃));  weights (w + λ·w̃)/(1 + λ),  w(0) = 1/K

    ``observe`` gives it the two batches: see ``DoubleSamplingBalancer``.

    Args:
        tasks: K >= 1 unique task names.
        weight_lr: β > 0, for products over the squared gradient size unless ``normalise`` is False. Default 0.1.
        regularisation: λ >= 0: 0 is MGDA's direction, a large one the preferred sum's. Default 0.3.
        preference: w̃, a mapping by name or a sequence (> 0), scaled to sum to 1. Default: equal.
        normalise: see ``DoubleSamplingBalancer``. Default True.
        scale_heads: whether heads are weighted too. Default False.
        update_every, delivery, sync, process_group: see ``DoubleSamplingBalancer``.

    Weights sum to 1. Zero gradients, absent tasks, State and Cost: see ``DoubleSamplingBalancer``; of absent tasks w̃ is
    shared out as w is.

    Raises:
        InvalidArgumentError: an argument is out of range.
        SharedParametersError: see ``DoubleSamplingBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = SDMGradLoss(("a", "b"), weight_lr=1.0, regularisation=0.0)
        >>> for noise in (0.1, -0.1):  # two more batches
        ...     balancer.observe((1.0 + noise) * theta[0], theta[1] * 0.5, shared_params=[theta])
        >>> _ = balancer(theta[0], theta[1] * 0.5, shared_params=[theta])
        >>> round(balancer.get_weights()["a"], 3)  # 0.5 - 1/2·(0.99·0.5 - 0.25·0.5)/(0.8·0.7)
        0.17
        >>> balancer.get_name()
        'SDMGrad'

    Source: Xiao et al. 2023, Algorithm 1. As there, each inner step has a pair of its own and no momentum; the authors'
    code, LibMTL and torchjd make 20 steps with momentum 0.5 and β of 5 or 10 on one pair. They divide by the size of
    that same pair (section 6.1 of the paper), which correlates with its products; here by that of earlier ones.
    The authors' code also keeps its three batches in one tensor, and so multiplies the last one by itself.
    """

    method: ClassVar[str] = "SDMGrad"

    preference: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        weight_lr: float = 0.1,
        regularisation: float = 0.3,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        normalise: bool = True,
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
        self.weight_lr = real(weight_lr, "weight_lr", 0.0, np.inf, low_open=True, high_open=True)
        self.regularisation = real(regularisation, "regularisation", 0.0, np.inf, high_open=True)
        preferred = torch.tensor(preferences(preference, self.tasks))
        self.register_buffer("preference", preferred / preferred.sum(), persistent=False)

    def step(self, tasks: Indices, weights: Array, products: Array) -> Array:
        """Return the projected step."""
        preferred = self.preference.double().cpu().numpy()[tasks]
        slope = products @ (weights + self.regularisation * preferred / preferred.sum())
        return project_on_simplex(weights - self.weight_lr * slope)

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return (w + λ·w̃)/(1 + λ) of the present tasks."""
        preferred_K = share_of_present(self.preference, present_K)
        weights_K = super().current_weights(present_K)
        return (weights_K + self.regularisation * preferred_K) / (1.0 + self.regularisation)
