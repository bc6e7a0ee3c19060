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
from mtlbalance.balancers.simplex import simplex_qp, solve_semidefinite


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
    solved to rounding: in closed form on the tasks that get weights, as a sequence of quadratic problems where these
    are not found at once; not by a general-purpose optimiser.
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
    best t is where ‖g_w(t)‖ = t. While the same tasks have weights, w(t) is a line, so that the solution is known:
    tasks whose weights would be negative there are left out until none is. Where others ought to be among those
    left, t is bisected.
    """
    count = len(gramian)
    if count == 2:
        return _worst_of_two(gramian.tolist(), to_mean.tolist(), radius)
    if radius == 0.0:
        return simplex_qp(gramian, np.zeros(count))
    tasks = np.arange(count)
    for _ in range(count):
        length, on_line = _on_line(tasks, gramian, to_mean, radius)
        if on_line is None:
            break
        kept = tasks[on_line[tasks] >= 0.0]
        if len(kept) == len(tasks):
            if _is_best(on_line, gramian, to_mean, radius / length):
                return on_line
            break
        tasks = kept
    return _by_bisection(gramian, to_mean, radius)


def _by_bisection(gramian: Array, to_mean: Array, radius: float) -> Array:
    """Minimise to_mean·w + radius·‖g_w‖ over the simplex by a sequence of quadratic problems."""
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
        guess, _ = _on_line(np.flatnonzero(weights), gramian, to_mean, radius)
    return weights


def _worst_of_two(gramian: list[list[float]], to_mean: list[float], radius: float) -> Array:
    """Minimise to_mean·w + radius·‖g_w‖ over w = (1 − t, t).

    ‖g_w‖² = d + p·x² with x the way from the point of the line that is nearest to 0, p = ‖g_1 − g_2‖² and d its squared
    distance; the derivative b + r·p·x/‖g_w‖ is zero at x² = b²d/(p·(r²p − b²)), if r²p > b².
    """
    (first, cross), (_, second) = gramian
    curvature = first + second - 2.0 * cross
    if curvature <= 1e-13 * (first + second):  # the same gradient twice
        return np.array([0.5, 0.5])
    slope = to_mean[1] - to_mean[0]
    excess = radius * radius * curvature - slope * slope
    if excess <= 0.0:
        return np.array([1.0, 0.0] if slope > 0.0 else [0.0, 1.0])
    distance = max(first * second - cross * cross, 0.0) / curvature
    way = -slope * math.sqrt(distance / (curvature * excess))
    shares = [(second - cross) / curvature - way, (first - cross) / curvature + way]
    return np.array([min(max(share, 0.0), 1.0) for share in shares])


def _on_line(tasks: Indices, gramian: Array, to_mean: Array, radius: float) -> tuple[float, Array | None]:
    """Return the t where ‖g_w(t)‖ = t if only these tasks have weights, and these weights; 0 where there is none.

    w(t) = p + t·q with p the shortest combination and q along it conjugate, so that ‖g_w(t)‖² = ‖g_p‖² + t²‖g_q‖².
    """
    part = gramian[tasks][:, tasks]
    inverted = solve_semidefinite(part, np.stack([np.ones(len(tasks)), to_mean[tasks]], axis=1))
    (total, total_to_mean), (ones, to_mean_in) = inverted.sum(axis=0).tolist(), inverted.T
    if total <= 0.0:
        return 0.0, None
    shortest = ones / total
    along = (total_to_mean * shortest - to_mean_in) / radius
    squared = float(shortest @ part @ shortest) / max(1.0 - float(along @ part @ along), 1e-300)
    if not 0.0 < squared < math.inf:
        return 0.0, None
    length = math.sqrt(squared)
    weights = np.zeros(len(gramian))
    weights[tasks] = shortest + length * along
    return length, weights


def _is_best(weights: Array, gramian: Array, to_mean: Array, factor: float) -> bool:
    """Return whether no move within the simplex from these weights lowers to_mean·w + factor/2·‖g_w‖²."""
    slope = to_mean + factor * (gramian @ weights)
    lowest = float(slope.min())
    return float(weights @ slope) - lowest <= 1e-12 * float(np.abs(slope).max())
