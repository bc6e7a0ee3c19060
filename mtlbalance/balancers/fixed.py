"""Fixed task weights: the baseline, and the control experiment for every other method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer, Reads, Sync, WeightSum
from mtlbalance.balancers.checks import task_weights
from mtlbalance.balancers.presence import share_budget


class FixedWeightLoss(Balancer):
    """Σ w_k·L_k with constant weights.

    Use it as the baseline, or with the weights that another method settled at, as its control.

    Args:
        tasks: K >= 1 unique task names.
        weights: a mapping by name or a sequence in task order, each >= 0; used as given, never normalised
            (weights that sum to 2 double the learning signal). Default: 1/K each, the mean of the losses.
        sync: over ranks, see ``Balancer``; only absent tasks make a difference here.
        process_group: the ranks to agree with; None: the default group.

    Absent tasks: the present ones share Σ w_k in proportion to their weights.
    State: none beyond the base's. Cost: one backward pass, no extra memory.

    Raises:
        InvalidArgumentError: a weight is negative, missing, or for an unknown task.

    Example:
        >>> import torch
        >>> balancer = FixedWeightLoss(("rul", "health"), weights={"rul": 0.75, "health": 0.25})
        >>> balancer({"rul": torch.tensor(4.0), "health": torch.tensor(8.0)}).item()
        5.0
        >>> balancer.get_name()
        'Fixed(0.75/0.25)'

    Source: linear scalarisation; the study's baseline is (0.5, 0.5), its legacy V7 (0.75, 0.25).
    """

    method: ClassVar[str] = "Fixed"
    reads: ClassVar[Reads] = "nothing"
    weight_sum: ClassVar[WeightSum] = "given"

    fixed_weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.register_buffer("fixed_weights", torch.tensor(task_weights(weights, self.tasks)))
        self.applied_weights.copy_(self.fixed_weights)

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the configured weights of the present tasks, which share the whole budget."""
        return share_budget(self.fixed_weights, present_K)

    def get_name(self) -> str:
        """Return ``Fixed`` with the weights, such as ``Fixed(0.50/0.50)``."""
        return f"{self.method}({'/'.join(f'{weight:.2f}' for weight in self.fixed_weights.tolist())})"
