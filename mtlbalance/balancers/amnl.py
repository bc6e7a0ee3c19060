"""AMNL: fixed task weights, with the samples of one task weighted towards failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Reads, Sync
from mtlbalance.balancers.fixed import FixedWeightLoss
from mtlbalance.balancers.presence import share_budget
from mtlbalance.balancers.sample_weights import FailureWeighting
from mtlbalance.balancers.signals import Signals


class AMNLLoss(FailureWeighting, FixedWeightLoss):
    """Fixed task weights; the biased task's samples count more the nearer they are to failure.

    Use it where late predictions near the end of life are what costs.

    The biased task's loss is mean(v·l) with v = 1 + (max_weight − 1)·clip(1 − y/target_cap, 0, 1), see
    ``failure_weights``; then Σ w_k·L_k. With ``normalise=True``, the legacy form, each loss is divided by its own
    detached value: Σ w_k·L_k/sg(L_k), whose value is Σ w_k and whose gradient is that of Σ w_k·log L_k.

    Args:
        tasks: K >= 1 unique task names.
        biased_task: the task whose samples are weighted; its loss must be per sample, shape (B,).
        target_cap: the target y from which on a sample has weight 1, in the targets' unit (> 0), such as 125 cycles.
        max_weight: the weight at y = 0 (>= 1). Default 2.
        weights: task weights as in ``FixedWeightLoss``. Default: 1/K each.
        normalise: the legacy magnitude-normalised form. Default False.
        sync, process_group: as in ``FixedWeightLoss``.

    Call: ``balancer(losses, targets={biased_task: y})`` with y of shape (B,).
    State: none beyond the base's. Cost: one backward pass.

    Raises:
        InvalidArgumentError: an argument is out of range; targets or per-sample losses are missing in a call.

    Example:
        >>> import torch
        >>> balancer = AMNLLoss(("rul", "health"), biased_task="rul", target_cap=125.0)
        >>> squared_error, cross_entropy = torch.tensor([4.0, 4.0]), torch.tensor(1.0)
        >>> balancer(squared_error, cross_entropy, targets={"rul": torch.tensor([0.0, 125.0])}).item()
        3.5

    Source: the C-MAPSS study; ``normalise=True`` is its legacy V7, which produced the published AMNL row.
    """

    method: ClassVar[str] = "AMNL"
    reads: ClassVar[Reads] = "losses"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        biased_task: str,
        target_cap: float,
        max_weight: float = 2.0,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        normalise: bool = False,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, weights=weights, sync=sync, process_group=process_group)
        self._set_failure_weighting(biased_task, target_cap, max_weight)
        self.normalise = bool(normalise)

    def weigh(self, signals: Signals) -> Tensor:
        """Return the fixed weights, each divided by its task's loss in the legacy form."""
        weights_K = super().current_weights(signals.present_K)
        if not self.normalise:
            return weights_K
        size_K = signals.losses_K.abs()
        usable_K = torch.isfinite(size_K) & (size_K > torch.finfo(size_K.dtype).tiny)
        divided_K = torch.where(usable_K, weights_K / torch.where(usable_K, size_K, 1.0), weights_K)
        return torch.where(signals.finite, divided_K, self.current_weights(signals.present_K))

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the configured weights; in the legacy form those applied last."""
        if self.normalise:
            return share_budget(self.applied_weights, present_K)
        return super().current_weights(present_K)

    def get_name(self) -> str:
        """Return ``AMNL``, or ``AMNL(normalised)`` for the legacy form."""
        return f"{self.method}(normalised)" if self.normalise else self.method
