"""PBI: penalty-based boundary intersection, a scalarisation by a preferred direction of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import real, task_names, task_weights
from mtlbalance.balancers.objective import ObjectiveBalancer
from mtlbalance.balancers.preferences import preferences


class PBILoss(ObjectiveBalancer):
    """Move the losses along a preferred direction towards the ideal point, and penalise leaving it.

    Use it to ask for a trade-off: the losses should end in the proportions of ``preference``.

    With F = L − z over the present tasks, and u = p/‖p‖:

        d₁ = |F·u|,  d₂ = ‖F − (F·u)·u‖,  f = d₁ + θ·d₂

    The weights are the slopes of f; that of a loss well below its proportion is negative. The value is f.

    Args:
        tasks: K >= 1 unique task names.
        preference: p, a mapping by name or a sequence, each > 0. Default: 1 each.
        penalty: θ >= 0. Default 5.
        ideal: z, the lowest losses to expect, a mapping by name or a sequence (>= 0). Default: 0 each.
        sync, process_group: see ``Balancer``.

    Absent tasks: F and p are of the present ones; one alone has weight 1.
    State and Cost: see ``ObjectiveBalancer``.

    Raises:
        InvalidArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> balancer = PBILoss(("a", "b"), preference=(3.0, 4.0), penalty=0.0)
        >>> balancer(torch.tensor(3.0), torch.tensor(4.0)).item()
        5.0
        >>> {task: round(weight, 4) for task, weight in balancer.get_weights().items()}
        {'a': 0.6, 'b': 0.8}

    Source: Zhang and Li 2007, "MOEA/D", as a loss. Differences: none.
    """

    method: ClassVar[str] = "PBI"
    signed_weights: ClassVar[bool] = True

    preference: Tensor
    ideal: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        penalty: float = 5.0,
        ideal: Mapping[str, float] | Sequence[float] | None = None,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        names = task_names(tasks)
        direction = torch.tensor(preferences(preference, names))
        direction = direction / direction.norm()
        super().__init__(names, first_weights=direction.tolist(), sync=sync, process_group=process_group)
        self.penalty = real(penalty, "penalty", 0.0, math.inf)
        bounds = [0.0] * len(names) if ideal is None else task_weights(ideal, names, "ideal")
        self.register_buffer("preference", direction, persistent=False)
        self.register_buffer("ideal", torch.tensor(bounds), persistent=False)

    def objective(self, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return f."""
        direction_K = self.preference * present_K
        direction_K = direction_K / torch.linalg.vector_norm(direction_K)
        excess_K = (losses_K - self.ideal) * present_K
        along = (excess_K * direction_K).sum()
        across: Tensor = torch.linalg.vector_norm(excess_K - along * direction_K)
        # At 0 the slope is the limit from above, that of losses above the ideal point.
        return torch.where(along < 0, -along, along) + self.penalty * across
