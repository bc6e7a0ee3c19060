"""Failure weights: samples near their end of life count up to ``max_weight`` times as much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtlbalance.balancers.base import Balancer
from mtlbalance.balancers.checks import known_task, real
from mtlbalance.balancers.losses import checked_sample_weight
from mtlbalance.errors import InvalidArgumentError


def failure_weights(targets: Tensor, cap: float = 125.0, max_weight: float = 2.0) -> Tensor:
    """Weight samples by how near they are to failure, for ``sample_weights`` of any balancer.

    Use it where an error near the end of life costs more than one far from it:
    w = 1 + (max_weight − 1)·clip(1 − y/cap, 0, 1).

    Args:
        targets: remaining useful life y >= 0, any shape, in the unit of ``cap``.
        cap: the value of y from which on the weight is 1 (> 0).
        max_weight: the weight at y = 0 (>= 1).

    Returns:
        A detached tensor of the shape and device of ``targets``, values in [1, max_weight].

    Raises:
        InvalidArgumentError: ``cap`` or ``max_weight`` is out of range.

    Example:
        >>> import torch
        >>> failure_weights(torch.tensor([0.0, 62.5, 125.0, 300.0]))
        tensor([2.0000, 1.5000, 1.0000, 1.0000])

    Source: the AMNL loss of the C-MAPSS study (weighted MSE, mean not divided by the sum of weights).
    """
    cap = real(cap, "cap", 0.0, math.inf, low_open=True)
    max_weight = real(max_weight, "max_weight", 1.0, math.inf)
    targets = targets.detach()
    if not targets.is_floating_point():
        targets = targets.float()
    return 1.0 + (max_weight - 1.0) * (1.0 - targets / cap).clamp(0.0, 1.0)


class FailureWeighting(Balancer):
    """Mixin for a balancer that weights the samples of one task by ``failure_weights`` of its targets."""

    def _set_failure_weighting(self, biased_task: str, target_cap: float, max_weight: float) -> None:
        self.biased_task = known_task(biased_task, self.tasks, "biased_task")
        self.target_cap = real(target_cap, "target_cap", 0.0, math.inf, low_open=True)
        self.max_weight = real(max_weight, "max_weight", 1.0, math.inf)

    def sample_weights_of(
        self, losses: Mapping[str, Tensor], given: dict[str, Tensor], context: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Multiply the failure weights of the biased task into the sample weights given in the call."""
        task = self.biased_task
        if task not in losses:
            return given
        targets = context.get("targets")
        if not isinstance(targets, Mapping) or not isinstance(targets.get(task), Tensor):
            raise InvalidArgumentError(
                f"{self.get_name()} needs the targets of task {task!r}: "
                f"call it with targets={{{task!r}: y}}, y of shape (B,)"
            )
        if targets[task].shape != losses[task].shape:
            raise InvalidArgumentError(
                f"{self.get_name()} weights each sample of task {task!r} by its target, so its loss (computed with "
                f"reduction='none') and its targets must both have shape (B,); they have {tuple(losses[task].shape)} "
                f"and {tuple(targets[task].shape)}"
            )
        weight = failure_weights(targets[task], self.target_cap, self.max_weight)
        if task in given:
            weight = weight.to(losses[task].device) * checked_sample_weight(given[task], losses[task], task)
        return {**given, task: weight}
