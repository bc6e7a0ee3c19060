"""IMTL-L: learned scales that make the scaled losses equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.learned_weights import LearnedWeights
from mtlbalance.balancers.presence import only


class IMTLLLoss(LearnedWeights):
    """Scale each loss by a learned factor that drives every scaled loss to 1.

    Use it when losses differ in scale and no distribution is assumed of them. All losses must be positive in
    the long run: one that goes to 0 drives its weight up without bound.

    With s_k (``log_scales``, from 0), over the present tasks:

        f = Σ (e^{s_k}·L_k − s_k),  so that e^{s_k}·L_k = 1 where f is least in s

    The weights are e^{s_k}; the value is f. It is twice ``UncertaintyLoss`` for regression, at −s.

    Args:
        tasks: K >= 1 unique task names.
        sync, process_group: see ``Balancer``.

    Absent tasks: both terms are left out; see ``LearnedWeights`` for that, State and ranks.
    Cost: one backward pass; K parameters.

    Example:
        >>> import torch
        >>> balancer = IMTLLLoss(("a", "b"))
        >>> loss = balancer(torch.tensor(4.0), torch.tensor(1.0))
        >>> loss.backward()
        >>> loss.item(), balancer.log_scales.grad
        (5.0, tensor([3., 0.]))

    Source: Liu et al. 2021, "Towards impartial multi-task learning". Differences: none.
    """

    method: ClassVar[str] = "IMTL-L"

    def __init__(self, tasks: Sequence[str], *, sync: Sync = "gradients", process_group: Any = None) -> None:
        super().__init__(tasks, first_weights=1.0, sync=sync, process_group=process_group)

    def objective(self, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return f."""
        return only(present_K, torch.exp(self.log_scales) * losses_K - self.log_scales).sum()
