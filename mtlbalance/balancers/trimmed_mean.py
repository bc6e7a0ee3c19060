"""The trimmed mean of the task gradients: extremes are dropped in each element, the rest is averaged."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call, Sync
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.jacobian_balancer import Combination, JacobianBalancer
from mtlbalance.balancers.layout import Layout
from mtlbalance.balancers.signals import Signals


class TrimmedMeanLoss(JacobianBalancer):
    """Average the task gradients in each element, without the largest and the smallest of them.

    Use it with many tasks of which some have gradients that should not be trusted: corrupt labels, outliers.

    In each element, over the P present tasks and with g₍₁₎ <= … <= g₍P₎ their gradients in order:

        d = 1/(P − 2b)·Σ_{b < i <= P − b} g₍ᵢ₎,  b = ⌊trim_fraction·P⌋

    Each head gets its own gradient. The method has no task weights: ``get_weights()`` is NaN, and the value is the
    plain sum of the losses. It averages: with equal gradients the trunk moves by one of them, not by their sum.

    Args:
        tasks: K >= 1 unique task names.
        trim_fraction: the share of tasks dropped at either end, in [0, ½). Default ¼, the interquartile mean, which
            drops nothing for fewer than 4 tasks; 0 is the mean.
        sync, process_group: see ``JacobianBalancer``.

    Absent tasks: P counts the present ones; a single one keeps its gradient.

    State: ``grad_norms``, and the base's.
    Cost: K backward passes through heads and trunk, but no K gradients: with the extremes and the sum of the rest, a
    step holds 2b + 4 copies of the trunk's gradients beyond the plain sum's. No host sync on one rank; over
    ranks, which tasks are present (K flags) is copied to the host.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, unrelated to a task, or not all that two tasks
            share.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = TrimmedMeanLoss(("a", "b", "c", "d"))
        >>> rows = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, -9e9], [1e15, 7.0]])
        >>> balancer(*(row @ theta for row in rows), shared_params=[theta]).backward()
        >>> theta.grad
        tensor([2.5000, 5.5000])

    Source: Yin et al. 2018, "Byzantine-robust distributed learning", Definition 2, with tasks for machines. TorchJD
    has the number b itself for an argument.
    """

    method: ClassVar[str] = "TrimmedMean"
    extra_memory: ClassVar[str] = "2·⌊trim_fraction·K⌋ + 4"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        trim_fraction: float = 0.25,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.trim_fraction = real(trim_fraction, "trim_fraction", 0.0, 0.5, high_open=True)

    def combination(self, call: Call, layout: Layout) -> Combination:
        """Return the extremes and the sum of the rest."""
        own: Collection[int] = call.losses
        if call.ranks is None:
            return self._trimmed(own, len(own), layout)
        anywhere = {task for task, here in enumerate(call.signals.present_K.tolist()) if here}
        combined = anywhere if self.sync == "gradients" else own
        return self._trimmed(combined, len(anywhere), layout)

    def _trimmed(self, combined: Collection[int], present: int, layout: Layout) -> Combination:
        trim = math.floor(self.trim_fraction * len(combined) + 1e-9)  # 0.29 of 100 is 29
        return _Trimmed(combined, present, trim, layout)


class _Trimmed(Combination):
    """The ``trim`` largest and smallest gradients so far in each element, and the sum of the others.

    ``combined`` are the tasks that it gets, of ``present`` over all ranks: a rank that combines its own alone has that
    share in the mean. The sum never holds what is dropped, so that an outlier of 1e15 takes no digit off the rest.
    """

    def __init__(self, combined: Collection[int], present: int, trim: int, layout: Layout) -> None:
        self._combined = combined
        self._present = present
        self._trim = trim
        self._largest: list[Tensor] = []  # falling, in each element
        self._smallest: list[Tensor] = []  # rising
        self._rest = layout.zeros()

    def add(self, task: int, gradient_P: Tensor) -> None:
        if task not in self._combined:
            return
        passed_on = gradient_P
        for kept, first, second in (
            (self._largest, torch.maximum, torch.minimum),
            (self._smallest, torch.minimum, torch.maximum),
        ):
            for place, extreme in enumerate(kept):
                kept[place], passed_on = first(extreme, passed_on), second(extreme, passed_on)
            if len(kept) < self._trim:
                kept.append(passed_on)
                return
        self._rest += passed_on

    def combine(self, signals: Signals) -> Tensor:
        """Return the mean of the rest, or the plain sum where something is not finite."""
        count = len(self._combined)
        mean_P = self._rest / max(count - 2 * self._trim, 1)
        if count < self._present:
            mean_P *= count / self._present
        for extreme_P in (*self._largest, *self._smallest):
            self._rest += extreme_P
        return torch.where(signals.finite, mean_P, self._rest)
