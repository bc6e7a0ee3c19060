"""The base of methods that follow each task gradient by a running mean, and deliver a sum of those means."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call, Sync
from mtlbalance.balancers.jacobian_balancer import Combination, JacobianBalancer
from mtlbalance.balancers.layout import Layout
from mtlbalance.balancers.per_parameter import PerParameter
from mtlbalance.balancers.signals import Signals


class TrackingBalancer(PerParameter, JacobianBalancer):
    """Base of balancers with a running mean y_k of each task gradient that deliver Σ c_k·y_k.

    y_k ← y_k + r·(s_k·g_k − y_k), where r is 1 at a task's first finite call, so that nothing starts from zero.
    Absent tasks: their means wait, and are left out of the sum.

    State: ``tracked`` (K, P) for P shared numbers, ``tracked_calls`` (K,), and that of ``JacobianBalancer``.
    """

    per_parameter: ClassVar[str] = "tracked"
    unusable: ClassVar[str] = "a loss or a task gradient was NaN or infinite, or too large once it was scaled"
    extra_memory: ClassVar[str] = "2·K + 3, K of them kept"

    tracked: Tensor
    tracked_calls: Tensor

    def __init__(self, tasks: Sequence[str], *, sync: Sync = "gradients", process_group: Any = None) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.register_buffer("tracked", torch.zeros(len(self.tasks), 0))
        self.register_buffer("tracked_calls", torch.zeros(len(self.tasks)))

    def usable(self, signals: Signals) -> Tensor:
        """Return whether all is finite, also what would be tracked: a loss of 1e-40 has no inverse in float32."""
        scales_K = self.scales(signals)
        norms_K = torch.ones_like(scales_K) if signals.grad_norms_K is None else signals.grad_norms_K
        fits_K = torch.isfinite(scales_K) & torch.isfinite(scales_K * norms_K)
        return signals.finite & (fits_K | ~signals.present_K).all()

    @abstractmethod
    def scales(self, signals: Signals) -> Tensor:
        """Return (K,) s_k, what each gradient is multiplied by before it is tracked."""

    @abstractmethod
    def rates(self, moves_K: Tensor) -> Tensor:
        """Return (K,) r of this call, 1 at a task's first; called once, after ``tracked_calls`` has counted it."""

    @abstractmethod
    def coefficients(self, call: Call, signals: Signals) -> Tensor:
        """Move the weights where ``signals.finite``, and return (K,) c_k of the present tasks, 0 elsewhere."""

    def combination(self, call: Call, layout: Layout) -> Combination:
        """Return the gradients of this call, to be tracked once all of them are known to be finite."""
        self.size_state(layout)
        return _Rows(self, call, layout)


class _Rows(Combination):
    """The gradients of a call as they are."""

    def __init__(self, balancer: TrackingBalancer, call: Call, layout: Layout) -> None:
        self._balancer = balancer
        self._call = call
        self._zeros = layout.zeros
        self._rows: dict[int, Tensor] = {}

    def add(self, task: int, gradient_P: Tensor) -> None:
        self._rows[task] = gradient_P

    def combine(self, signals: Signals) -> Tensor:
        balancer = self._balancer
        moves_K = signals.present_K & signals.finite
        scales_K = balancer.scales(signals)
        balancer.tracked_calls += moves_K
        rates_K = balancer.rates(moves_K).to(balancer.tracked.dtype)
        for task, mean_P in enumerate(balancer.tracked):
            if task not in self._rows and self._call.ranks is None:
                continue
            gradient_P = self._rows[task] if task in self._rows else self._zeros()
            scaled_P = (gradient_P * scales_K[task]).to(mean_P.dtype)
            mean_P.copy_(torch.where(moves_K[task], torch.lerp(mean_P, scaled_P, rates_K[task]), mean_P))
        coefficients_K = balancer.coefficients(self._call, signals).to(balancer.tracked.dtype)
        combined_P = coefficients_K @ balancer.tracked
        weights_K = balancer.current_weights(signals.present_K)
        plain_P = self._zeros()
        for task, gradient_P in self._rows.items():
            plain_P += gradient_P.mul_(weights_K[task])
        return torch.where(signals.finite, combined_P.to(plain_P), plain_P)
