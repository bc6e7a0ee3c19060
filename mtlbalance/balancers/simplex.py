"""Small convex solvers in float64, for K×K problems: exact active sets, no external solver.

Matrices are scaled to a unit diagonal first, so that tolerances mean the same whatever the scale of the
gradients. K is a number of tasks; each solver takes of the order of K steps of a K×K linear solve.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TOLERANCE = 1e-12
_FLAT = 1e-10  # curvature, of the largest one, that rounding may have left


def simplex_qp(quadratic: Array, linear: Array, start: Array | None = None) -> Array:
    """Minimise ½wᵀQw + bᵀw over the simplex {w >= 0, Σw = 1}, Q positive semidefinite with a positive diagonal.

    A primal active-set method: it moves between supports, and stops where no multiplier is negative.

    Args:
        quadratic: Q, (K, K).
        linear: b, (K,).
        start: a point of the simplex to start from, such as the solution of a problem nearby; None: a corner.
    """
    count = len(linear)
    root = np.sqrt(quadratic.diagonal())
    # In v_k = w_k·root_k/min(root) the diagonal is 1 and the constraint is Σ sums_k·v_k = 1.
    smallest = root.min()
    sums = smallest / root
    unit = quadratic / np.outer(root, root)
    slope = linear / (root * smallest)
    size = max(1.0, float(np.abs(slope).max()))
    unit, slope = unit / size, slope / size
    if start is None:
        values = np.zeros(count)
        corner = int(np.argmin(0.5 * unit.diagonal() / sums**2 + slope / sums))
        values[corner] = 1.0 / sums[corner]
    else:
        values = start / sums
    support = values > 0
    for _ in range(50 * count):
        target, multiplier = _equality_qp(unit, slope, sums, support)
        shrinking = support & (target < 0)
        if shrinking.any():  # stop at the first bound on the way, and drop it
            steps = values[shrinking] / (values[shrinking] - target[shrinking])
            values = values + steps.min() * (target - values)
            dropped = np.flatnonzero(shrinking)[int(np.argmin(steps))]
            values[dropped] = 0.0
            support[dropped] = False
            continue
        values = target
        reduced = np.where(support, np.inf, unit @ values + slope - multiplier * sums)
        entering = int(np.argmin(reduced))
        if reduced[entering] >= -_TOLERANCE:
            break
        support[entering] = True
    weights: Array = np.clip(values * sums, 0.0, None)
    return np.asarray(weights / weights.sum())


def nonnegative_qp(quadratic: Array, linear: Array) -> Array:
    """Minimise ½uᵀQu − bᵀu over u >= 0, Q positive semidefinite with a positive diagonal (Lawson and Hanson).

    Where the objective falls without bound (a direction with Qz = 0, bᵀz > 0, z >= 0) the result is no minimum: some
    entry of Qu − b is negative.
    """
    count = len(linear)
    root = np.sqrt(quadratic.diagonal())
    unit = quadratic / np.outer(root, root)
    target = linear / root
    size = max(float(np.abs(target).max(initial=0.0)), np.finfo(np.float64).tiny)
    target = target / size
    solution: Array = np.zeros(count)
    support = np.zeros(count, dtype=bool)
    for _ in range(50 * count):
        descent = np.where(support, -np.inf, target - unit @ solution)
        entering = int(np.argmax(descent))
        if descent[entering] <= _TOLERANCE * max(1.0, float(solution.max())):
            break
        support[entering] = True
        while support.any():
            inside = np.flatnonzero(support)
            found, bounded = _stationary(unit[np.ix_(inside, inside)], target[inside])
            step = found - solution[inside] if bounded else found
            blocking = found <= 0 if bounded else found < 0
            if not blocking.any():
                if not bounded:
                    return np.asarray(solution * size / root)
                solution[inside] = found
                break
            # Go as far as the first bound on the way, and drop it.
            lengths = np.full(len(inside), np.inf)
            lengths[blocking] = solution[inside][blocking] / np.maximum(
                -step[blocking], np.finfo(np.float64).tiny
            )
            first = int(np.argmin(lengths))
            solution[inside] = np.maximum(solution[inside] + lengths[first] * step, 0.0)
            blocking &= solution[inside] <= _TOLERANCE
            blocking[first] = True
            solution[inside[blocking]] = 0.0
            support[inside[blocking]] = False
    return np.asarray(solution * size / root)


def project_on_simplex(point: Array) -> Array:
    """Return the nearest point of {w >= 0, Σw = 1}: all entries less one number, and 0 where that is negative."""
    shifted = point - point.max()  # a common shift changes nothing, and keeps large numbers exact
    falling = np.sort(shifted)[::-1]
    excess = (np.cumsum(falling) - 1.0) / np.arange(1, len(point) + 1)
    threshold = excess[np.flatnonzero(falling > excess)[-1]]
    nearest: Array = np.maximum(shifted - threshold, 0.0)
    return nearest


def barrier_newton(
    gramian: Array, slope: Callable[[Array], Array], curvature: Callable[[Array], Array]
) -> Array:
    """Solve Gw = slope(w) for w > 0 by damped Newton steps, where slope is positive and decreasing.

    The solution minimises the convex ½wᵀGw − ∫slope, so a step that lowers the residual always exists.

    Args:
        gramian: (K, K), positive semidefinite, positive diagonal.
        slope: elementwise, such as 1/w.
        curvature: its derivative, elementwise, negative.
    """
    weights: Array = np.ones(len(gramian))
    # Start on the right scale: one task alone solves g·w = slope(w).
    for _ in range(200):
        step = (gramian.diagonal() * weights - slope(weights)) / (gramian.diagonal() - curvature(weights))
        weights = np.maximum(weights - step, 0.1 * weights)
        if np.all(np.abs(step) <= 1e-6 * weights):
            break
    for _ in range(200):
        residual = gramian @ weights - slope(weights)
        step = _solve(gramian - np.diag(curvature(weights)), residual)
        decrement = float(residual @ step)
        falling = step > 0
        longest = float((0.9 * weights[falling] / step[falling]).min(initial=1.0))
        length = min(1.0, longest)
        # Close to the solution full steps converge quadratically; far from it, damp as self-concordance asks.
        if decrement > 0.25:
            length = min(length, 1.0 / (1.0 + np.sqrt(decrement)))
        weights = weights - length * step
        if decrement <= 1e-28 or np.all(np.abs(step) <= 1e-15 * weights):
            break
    return weights


def _equality_qp(
    quadratic: Array, linear: Array, sums: Array, support: NDArray[np.bool_]
) -> tuple[Array, float]:
    """Minimise ½vᵀQv + bᵀv over Σ sums_k·v_k = 1 on a support, without bounds; return v and the multiplier."""
    inside = np.flatnonzero(support)
    size = len(inside)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = quadratic[np.ix_(inside, inside)]
    system[size, :size] = system[:size, size] = sums[inside]
    solution = _solve(system, np.append(-linear[inside], 1.0))
    values = np.zeros(len(linear))
    values[inside] = solution[:size]
    return values, -float(solution[size])


def _stationary(quadratic: Array, linear: Array) -> tuple[Array, bool]:
    """Return where ½vᵀQv − bᵀv is stationary, and True; if it is nowhere, a direction of steady fall, and False."""
    values, vectors = np.linalg.eigh(quadratic)
    parts = vectors.T @ linear
    flat = values <= _FLAT * values[-1]
    if np.abs(parts[flat]).max(initial=0.0) > _FLAT:
        return np.asarray(vectors[:, flat] @ parts[flat]), False
    return np.asarray(vectors[:, ~flat] @ (parts[~flat] / values[~flat])), True


def _solve(matrix: Array, right: Array) -> Array:
    """Solve a linear system; the least-norm solution where it is singular."""
    solution: Array = np.asarray(np.linalg.lstsq(matrix, right, rcond=1e-13)[0], dtype=np.float64)
    return solution
