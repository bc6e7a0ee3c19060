"""DWA: weights that follow how fast each loss falls from epoch to epoch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer, Sync, WeightSum
from mtlbalance.balancers.checks import integer, real
from mtlbalance.balancers.presence import choose, is_everyone, moving, softmax_of_present
from mtlbalance.balancers.signals import Signals

_LARGEST_RATIO = 1e6


class DWALoss(Balancer):
    """Give more weight to the tasks whose losses fell least from one epoch to the next.

    Use it when tasks learn at different speeds and losses are of one scale: the ratio does not see the scale,
    so a large loss still dominates. It needs no gradients.

    With L̄_k(t) the mean loss over epoch t (over the calls that had the task):

        r_k = L̄_k(t − 1) / L̄_k(t − 2),  w_k = K·exp(r_k/T) / Σ_j exp(r_j/T)

    The first two epochs have weights 1.

    Args:
        tasks: K >= 1 unique task names.
        temperature: T > 0; the larger, the more uniform. Default 2.
        steps_per_epoch: calls (>= 1) of an epoch. Default None: call ``end_epoch()`` after each; with a number
            ``end_epoch()`` does nothing.
        sync, process_group: see ``Balancer``; the means are of rank-averaged losses.

    Absent tasks: the present ones share K. A task that was absent for a whole epoch keeps its two means; one
    that has fewer than two has ratio 1. A call with a non-finite loss does not enter a mean.

    State: ``epoch_means`` and ``epoch_counts`` of the running epoch, ``means_1`` and ``means_2`` of the last and
    the one before (NaN: none yet), each (K,), the calls in this epoch, and the base's.
    Cost: one backward pass; means are kept on the device. No host sync.

    Raises:
        InvalidArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> balancer = DWALoss(("a", "b"), steps_per_epoch=1)
        >>> for a, b in [(4.0, 4.0), (4.0, 2.0), (4.0, 2.0)]:
        ...     loss = balancer(torch.tensor(a), torch.tensor(b))
        >>> {task: round(weight, 4) for task, weight in balancer.get_weights().items()}  # exp(1/2) to exp(0.5/2)
        {'a': 1.1244, 'b': 0.8756}

    Source: Liu, Johns and Davison 2019, equation 7. Differences: ratios are capped at 1e6.
    """

    method: ClassVar[str] = "DWA"
    weight_sum: ClassVar[WeightSum] = "K"
    _counters: ClassVar[tuple[str, ...]] = ("calls", "calls_in_epoch")

    epoch_means: Tensor
    epoch_counts: Tensor
    means_1: Tensor
    means_2: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        temperature: float = 2.0,
        steps_per_epoch: int | None = None,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.temperature = real(temperature, "temperature", 0.0, math.inf, low_open=True)
        self.steps_per_epoch = (
            None if steps_per_epoch is None else integer(steps_per_epoch, "steps_per_epoch", 1)
        )
        self.calls_in_epoch = 0
        count = len(self.tasks)
        self.register_buffer("epoch_means", torch.zeros(count))
        self.register_buffer("epoch_counts", torch.zeros(count))
        self.register_buffer("means_1", torch.full((count,), math.nan))
        self.register_buffer("means_2", torch.full((count,), math.nan))
        self.applied_weights.fill_(1.0)

    def phase(self) -> tuple[Hashable, ...]:
        """Return whether the next call closes an epoch."""
        return (*super().phase(), self.calls_in_epoch + 1 == self.steps_per_epoch)

    def weigh(self, signals: Signals) -> Tensor:
        """Add the losses to the epoch's means, and apply the weights of the epochs before."""
        weights_K = self.current_weights(signals.present_K)
        moves_K = moving(signals.present_K, signals.finite)
        self.epoch_counts += moves_K
        counts_K = self.epoch_counts if is_everyone(moves_K) else self.epoch_counts.clamp(min=1.0)
        means_K = torch.addcdiv(self.epoch_means, signals.losses_K - self.epoch_means, counts_K)
        self.epoch_means.copy_(choose(moves_K, means_K, self.epoch_means))
        self.calls_in_epoch += 1
        if self.calls_in_epoch == self.steps_per_epoch:
            self._roll()
        return weights_K

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return K times the softmax of the present tasks' ratios."""
        ratios_K = (self.means_1 / self.means_2).clamp(max=_LARGEST_RATIO)
        ratios_K = ratios_K.nan_to_num(nan=1.0, neginf=-math.inf)
        shares_K = softmax_of_present(ratios_K / self.temperature, present_K)
        return len(self.tasks) * shares_K

    def end_epoch(self) -> None:
        """Close the epoch, unless ``steps_per_epoch`` does; without a call since the last one, do nothing."""
        if self.steps_per_epoch is None and self.calls_in_epoch > 0:
            self._roll()

    def _roll(self) -> None:
        seen_K = self.epoch_counts > 0
        self.means_2.copy_(torch.where(seen_K, self.means_1, self.means_2))
        self.means_1.copy_(torch.where(seen_K, self.epoch_means, self.means_1))
        self.epoch_means.zero_()
        self.epoch_counts.zero_()
        self.calls_in_epoch = 0
