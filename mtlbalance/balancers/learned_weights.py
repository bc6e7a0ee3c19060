"""The base of methods whose weights are parameters of their own, trained by the user's optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Call, Sync
from mtlbalance.balancers.objective import ObjectiveBalancer
from mtlbalance.errors import UntrainedWeightsWarning

PATIENCE_CALLS = 100


class LearnedWeights(ObjectiveBalancer):
    """Base of balancers with a parameter ``log_scales`` (K,), one s_k a task, that your optimizer trains.

    Hand ``balancer.parameters()`` to the optimizer, in a group without weight decay: decay would pull the
    weights to those of s = 0. If s has not moved over 100 training calls, a warning says so (on a GPU at the
    next read-out).

    Args:
        tasks: K >= 1 unique task names.
        first_weights: the weights at s = 0, see ``ObjectiveBalancer``.
        sync, process_group: see ``Balancer``.

    Absent and non-finite: s_k gets a zero gradient (momentum in your optimizer may still carry it on).
    Ranks: the gradient of s is that of the rank-averaged losses, the same on every rank, so s stays equal
    without DDP.

    State: ``log_scales``, and that of ``ObjectiveBalancer``.
    """

    free_alone: ClassVar[bool] = True
    _unsaved_counters: ClassVar[tuple[str, ...]] = ("_calls_since_look",)

    log_scales: nn.Parameter
    _log_scales_before: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        first_weights: float | Sequence[float],
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, first_weights=first_weights, sync=sync, process_group=process_group)
        self.log_scales = nn.Parameter(torch.zeros(len(self.tasks)))
        self.register_buffer("_log_scales_before", torch.zeros(len(self.tasks)), persistent=False)
        self._calls_since_look = 0
        self._warned_untrained = False

    def phase(self) -> tuple[Hashable, ...]:
        """Return whether the next call notes s, to see later whether it has moved."""
        return (*super().phase(), self._calls_since_look == 0)

    def _train_call(self, call: Call) -> Tensor:
        self._count_call()
        return super()._train_call(call)

    def _count_call(self) -> None:
        if self._calls_since_look == 0:
            self._log_scales_before.copy_(self.log_scales.detach())
        elif self._calls_since_look == PATIENCE_CALLS and self.log_scales.device.type == "cpu":
            self._warn_untrained()
        self._calls_since_look += 1

    def _warn_untrained(self) -> None:
        """Look whether s moved since the last look, if that is long ago; a host sync on a GPU."""
        if self._warned_untrained or self._calls_since_look < PATIENCE_CALLS:
            return
        if self.log_scales.requires_grad and torch.equal(self.log_scales, self._log_scales_before):
            self._warned_untrained = True
            warnings.warn(
                f"{self.get_name()}: the learned weights did not change in {self._calls_since_look} calls; add "
                "balancer.parameters() to your optimizer, in a group with weight_decay=0",
                UntrainedWeightsWarning,
                stacklevel=3,
            )
        self._calls_since_look = 0

    def report(self) -> dict[str, dict[str, float]]:
        """Return what the method shows, by task, see ``Balancer.report``."""
        self._warn_untrained()
        return super().report()
