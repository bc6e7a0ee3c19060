"""RLW: random weights for losses or gradients, drawn anew at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer, Reads, Sync
from mtlbalance.balancers.checks import integer
from mtlbalance.balancers.gradient_balancer import Delivery, GradientBalancer
from mtlbalance.balancers.presence import choose, moving, softmax_of_present
from mtlbalance.balancers.signals import Signals


class _RandomWeights(Balancer):
    """Mixin for a balancer whose weights are the softmax of normal numbers from a generator of its own."""

    draws_weights: ClassVar[bool] = True

    logits: Tensor
    _scale: float

    def _set_random_weights(self, seed: int, scale_by_tasks: bool) -> None:
        self.generator = torch.Generator().manual_seed(integer(seed, "seed", 0))
        self._scale = float(len(self.tasks)) if scale_by_tasks else 1.0
        self.register_buffer("logits", torch.zeros(len(self.tasks)))
        self.applied_weights.mul_(self._scale)

    def weigh(self, signals: Signals) -> Tensor:
        """Draw for every task, present or not, so that ranks and devices keep in step; use it where finite."""
        drawn_K = torch.randn(len(self.tasks), generator=self.generator, device="cpu")
        drawn_K = drawn_K.to(self.logits.device, non_blocking=True)
        self.logits.copy_(choose(moving(signals.present_K, signals.finite), drawn_K, self.logits))
        return self.current_weights(signals.present_K)

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the softmax of the last draw over the present tasks."""
        return self._scale * softmax_of_present(self.logits, present_K)


class RLWLoss(_RandomWeights):
    """Weigh the losses at random, anew at every call.

    Use it as a baseline: a method that balances should beat it.

        w = softmax(z),  z_k ~ N(0, 1)

    Args:
        tasks: K >= 1 unique task names.
        seed: of the generator (>= 0); give every rank the same. Default 0.
        scale_by_tasks: weights that sum to K instead of 1. The paper's sum to 1, which against a plain sum of the
            losses hides a learning rate 1/K times as large. Default False.
        sync, process_group: over ranks, see ``Balancer``; only absent tasks make a difference here.

    Absent tasks: the softmax is over the present ones. A call with a non-finite loss draws, but applies the draw
    before, for the generator must not depend on what only the device knows.

    State: ``logits`` (K,), the generator, and the base's. Cost: one backward pass. No host sync.

    Example:
        >>> import torch
        >>> balancer = RLWLoss(("a", "b"), seed=1)
        >>> _ = balancer(torch.tensor(4.0), torch.tensor(1.0))
        >>> round(sum(balancer.get_weights().values()), 6)
        1.0

    Source: Lin et al. 2022, "Reasonable effectiveness of random weighting" (RLW, normal). Differences: none.
    """

    method: ClassVar[str] = "RLW"
    reads: ClassVar[Reads] = "nothing"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int = 0,
        scale_by_tasks: bool = False,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self._set_random_weights(seed, scale_by_tasks)


class RGWLoss(_RandomWeights, GradientBalancer):
    """Weigh the task gradients of the shared parameters at random; heads get their own gradients unweighted.

    Use it as the baseline of gradient surgery, as ``RLWLoss`` is that of loss weighting.

        shared: Σ w_k·∂L_k,  w = softmax(z), z_k ~ N(0, 1);  heads: ∂L_k

    Args:
        tasks: K >= 1 unique task names.
        seed, scale_by_tasks: see ``RLWLoss``.
        delivery, sync, process_group: see ``GradientBalancer``.

    Absent and non-finite: see ``RLWLoss``.
    State: ``logits`` (K,), the generator, and the base's.
    Cost: K backward passes through heads and trunk and K copies of the trunk's gradients. No host sync.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, or unrelated to a task.

    Source: Lin et al. 2022 (RGW, normal). Differences: none.
    """

    method: ClassVar[str] = "RGW"
    scale_heads = False
    weighted_heads: ClassVar[str] = "use RLWLoss, which weighs heads too"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int = 0,
        scale_by_tasks: bool = False,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, delivery=delivery, sync=sync, process_group=process_group)
        self._set_random_weights(seed, scale_by_tasks)
