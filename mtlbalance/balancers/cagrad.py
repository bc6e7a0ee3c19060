"""CAGrad: the direction near the mean gradient that helps the worst-off task most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import one_of, real
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer, Indices
from mtlbalance.balancers.simplex import simplex_qp


class CAGradLoss(GramianBalancer):
    """Within a ball around the mean gradient, maximise the smallest improvement over tasks.

    Use it to keep converging to a minimum of the mean loss while protecting the worst task on the way.

    With g_0 = (1/K) Σ g_k and g_w = Σ w_k g_k:

        min over the simplex:  g_w·g_0 + c·‖g_0‖·‖g_w‖;   d = g_0 + c·‖g_0‖·g_w/‖g_w‖

    Args:
        tasks: K >= 1 unique task names.
        c: radius of the ball as a share of ‖g_0‖ (>= 0); 0 is the mean gradient. Default 0.5.
        rescale: ``"none"`` (d as above), ``"squared"`` (d/(1 + c²)) or ``"linear"`` (d/(1 + c)). Default ``"none"``.
        scale_heads: whether heads are weighted too. Default False: heads keep their own gradients.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights are 1/K + c·‖g_0‖/‖g_w‖·w_k. Where g_w = 0 (Pareto stationary) they are 1/K. Zero gradients, absent
    tasks, State and Cost: see ``GramianBalancer``.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = CAGradLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 1.0]), theta @ torch.tensor([6.0, 1.0, 1.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad
        tensor([0.1835, 1.2041, 1.2041])

    Source: Liu et al. 2021, Algorithm 1. The authors' code divides by 1 + c²: ``rescale="squared"``. The problem is
    solved to rounding as a sequence of quadratic ones, not by a general-purpose optimiser.
    """

    method: ClassVar[str] = "CAGrad"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        c: float = 0.5,
        rescale: str = "none",
        scale_heads: bool | None = None,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks,
            scale_heads=scale_heads,
            update_every=update_every,
            delivery=delivery,
            sync=sync,
            process_group=process_group,
        )
        self.c = real(c, "c", 0.0, np.inf, high_open=True)
        self.rescale = one_of(rescale, "rescale", ("none", "squared", "linear"))

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the weights of d."""
        count = len(gramian)
        mean = np.full(count, 1.0 / count)
        to_mean = gramian @ mean
        radius = self.c * math.sqrt(max(float(mean @ to_mean), 0.0))
        chosen = _worst_case(gramian, to_mean, radius)
        length = math.sqrt(max(float(chosen @ gramian @ chosen), 0.0))
        weights = mean.copy()
        if length > 1e-9 * float(np.sqrt(gramian.diagonal().min())):
            weights += radius / length * chosen
        scale = {"none": 1.0, "squared": 1.0 + self.c**2, "linear": 1.0 + self.c}[self.rescale]
        return weights / scale


def _worst_case(gramian: Array, to_mean: Array, radius: float) -> Array:
    """Minimise to_mean·w + radius·‖g_w‖ over the simplex.

    ‖g_w‖ = min over t > 0 of (‖g_w‖²/t + t)/2, so for a fixed t this is a quadratic problem, convex in t; the
    best t is where ‖g_w(t)‖ = t. While the same tasks have weights, w(t) is a line, so that t is known; where it
    lies outside the bracket it is bisected.
    """
    if radius == 0.0:
        return simplex_qp(gramian, np.zeros(len(gramian)))
    high = float(np.sqrt(gramian.diagonal().max()))
    low = 1e-14 * high
    weights = np.full(len(gramian), 1.0 / len(gramian))
    guess = math.sqrt(max(float(weights @ gramian @ weights), 0.0))
    for _ in range(100):
        if not low < guess < high:
            guess = math.sqrt(low * high) if low < 1e-3 * high else 0.5 * (low + high)
        weights = simplex_qp(radius / guess * gramian, to_mean, weights)
        length = math.sqrt(max(float(weights @ gramian @ weights), 0.0))
        if abs(length - guess) <= 1e-15 * high or high - low <= 1e-15 * high:
            break
        low, high = (guess, high) if length > guess else (low, guess)
        guess = _length_on(np.flatnonzero(weights), gramian, to_mean, radius)
    return weights


def _length_on(tasks: Indices, gramian: Array, to_mean: Array, radius: float) -> float:
    """Return the t where ‖g_w(t)‖ = t if only these tasks have weights; 0 where there is none.

    w(t) = p + t·q with p the shortest combination and q along it conjugate, so that ‖g_w(t)‖² = ‖g_p‖² + t²‖g_q‖².
    """
    part = gramian[np.ix_(tasks, tasks)]
    inverted = np.linalg.lstsq(part, np.stack([np.ones(len(tasks)), to_mean[tasks]], axis=1), rcond=1e-13)[0]
    if inverted[:, 0].sum() <= 0.0:
        return 0.0
    shortest = inverted[:, 0] / inverted[:, 0].sum()
    along = (inverted[:, 1].sum() * shortest - inverted[:, 1]) / radius
    squared = float(shortest @ part @ shortest) / max(1.0 - float(along @ part @ along), 1e-300)
    return math.sqrt(squared) if 0.0 < squared < math.inf else 0.0
