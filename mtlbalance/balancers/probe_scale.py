"""Scales for probing in float16: task losses times a power of two, so that small gradients do not vanish.

A GradScaler multiplies what a balancer returns, after the probes; without a scale of their own, the
gradients of a loss of 1e-5 would be exactly zero in float16, and read as a task that pulls at nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mtlbalance.balancers.state import FullPrecision

INITIAL_EXPONENT = 12.0
# Of the whole scale: a loss that happens to be near 0 says little about its gradient.
LARGEST_EXPONENT = 24.0
GROWTH_INTERVAL = 200  # finite probes before the scale doubles
BACKOFF = 4.0  # an overflow costs a step, so few of them should find the right scale


_may_autocast = cache(torch.amp.is_autocast_available)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in right now on such devices, None where it is off."""
    if not (_may_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    return torch.get_autocast_dtype(device_type)


def half_scale(losses: Tensor, exponent: Tensor | float = INITIAL_EXPONENT) -> Tensor:
    """Return 2^exponent over the power of two in each loss, for a graph with float16 in it."""
    size = losses.detach().float().abs()
    known = torch.isfinite(size) & (size > 0)
    power = torch.where(known, torch.where(known, size, 1.0).log2().floor(), 0.0)
    return torch.exp2((exponent - power).clamp(-60.0, LARGEST_EXPONENT))


class ProbeScale(FullPrecision):
    """One power of two a task: 2^(adaptive exponent), divided by the size of the loss.

    Dividing by the loss's own power of two starts losses of 1e-6 and 1e6 alike; the exponent then grows
    while probes stay finite and falls where one overflows. Powers of two are exact, so results
    depend on it only where float16 itself runs out.

    State: ``exponents`` and ``finite_probes``, each (K,).
    """

    exponents: Tensor
    finite_probes: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("exponents", torch.full((count,), INITIAL_EXPONENT))
        self.register_buffer("finite_probes", torch.zeros(count))

    def scales(self, losses_K: Tensor) -> Tensor:
        """Return the (K,) scales for losses of this size (the same on all ranks if the losses are)."""
        return half_scale(losses_K, self.exponents)

    def update(self, probed_K: Tensor, overflowed_K: Tensor) -> None:
        """Note which of the tasks that were probed on finite losses overflowed all the same."""
        grown_K = self.finite_probes + probed_K
        grows_K = grown_K >= GROWTH_INTERVAL
        exponents_K = (self.exponents + grows_K).clamp(max=LARGEST_EXPONENT)
        failed_K = probed_K & overflowed_K
        self.exponents.copy_(torch.where(failed_K, self.exponents - BACKOFF, exponents_K))
        self.finite_probes.copy_(torch.where(grows_K | failed_K, 0.0, grown_K))
