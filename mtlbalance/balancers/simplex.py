"""Small convex solvers in float64, for K×K problems: exact active sets, no external solver.

Matrices are scaled to a unit diagonal first, so that tolerances mean the same whatever the scale of the
gradients. K is a number of tasks; each solver takes a few, at most of the order of K, steps of a K×K linear solve. Two
tasks have closed forms, in Python's own numbers: in a training step an operation of NumPy's takes microseconds.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TOLERANCE = 1e-12
_ROUNDED = 1e-13  # of the terms of a sum that cancel: what rounding may have left
_LARGE = 1e5  # solutions of blocks that are singular but for rounding
_FLAT = 1e-10  # curvature, of the largest one, that rounding may have left


def simplex_qp(quadratic: Array, linear: Array, start: Array | None = None) -> Array:
    """Minimise ½wᵀQw + bᵀw over the simplex {w >= 0, Σw = 1}, Q positive semidefinite with a positive diagonal.

    A primal active-set method: it moves between supports, and stops where no multiplier is negative. Two tasks have a
    closed form.

    Args:
        quadratic: Q, (K, K).
        linear: b, (K,).
        start: a point of the simplex to start from, such as the solution of a problem nearby; None: the solution for
            gradients at right angles and b = 0.
    """
    if len(linear) == 2:
        return _segment_qp(quadratic.tolist(), linear.tolist())
    root = np.sqrt(quadratic.diagonal())
    # In v_k = w_k·root_k/min(root) the diagonal is 1 and the constraint is Σ sums_k·v_k = 1.
    smallest = root.min()
    sums = smallest / root
    unit = quadratic / np.outer(root, root)
    slope = linear / (root * smallest)
    size = max(1.0, float(np.abs(slope).max()))
    unit, slope = unit / size, slope / size
    values = sums / (sums @ sums) if start is None else start / sums
    support = values > 0
    for _ in range(50 * len(linear)):
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
        if support.all():
            break
        reduced = np.where(support, np.inf, unit @ values + slope - multiplier * sums)
        entering = int(np.argmin(reduced))
        if reduced[entering] >= -_TOLERANCE:
            break
        support[entering] = True
    weights: Array = np.clip(values * sums, 0.0, None)
    return np.asarray(weights / weights.sum())


def _segment_qp(quadratic: list[list[float]], linear: list[float]) -> Array:
    """Minimise ½wᵀQw + bᵀw over {w >= 0, w_1 + w_2 = 1}; the middle where no point is better than another."""
    (first, cross), (_, second) = quadratic
    rise = linear[1] - linear[0]
    curvature = first + second - 2.0 * cross
    if curvature > _ROUNDED * (first + second):
        shares = [(second - cross + rise) / curvature, (first - cross - rise) / curvature]
    else:  # a line
        fall = first - cross - rise
        level = abs(fall) <= _ROUNDED * (first + second + abs(linear[0]) + abs(linear[1]))
        shares = [0.5, 0.5] if level else [float(fall < 0.0), float(fall > 0.0)]
    return np.array([min(max(share, 0.0), 1.0) for share in shares])


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


def nonnegative_qps(unit: Array, targets: Array) -> Array:
    """Minimise ½uᵀQu − bᵀu over u >= 0 for each row b of ``targets``, all at once (Kim and Park's block pivoting).

    Supports change in blocks, and those of all rows in one batched solve. A row whose supports do not settle, or meet a
    singular block, goes to `nonnegative_qp`.

    Args:
        unit: Q, (K, K), positive semidefinite with a diagonal of ones.
        targets: (M, K), with a largest entry of about 1 in each row.
    """
    solutions = np.zeros(targets.shape)
    for row in _pivot_blocks(unit, targets, solutions):
        solutions[row] = nonnegative_qp(unit, targets[row])
    return solutions


def _pivot_blocks(unit: Array, targets: Array, solutions: Array) -> list[int]:
    """Fill in the ``solutions`` of the rows whose supports settle, and return the other rows."""
    count = len(unit)
    support = targets > _TOLERANCE
    rows = np.flatnonzero(support.any(axis=1))  # the others are solved by 0
    support, targets = support[rows], targets[rows]
    identity = np.eye(count)
    fewest, chances = np.full(len(rows), count + 1), np.full(len(rows), 3)
    unsettled: list[int] = []
    for _ in range(5 * count):
        if not len(rows):
            break
        blocks = np.where(support[:, :, None] & support[:, None, :], unit, identity)
        try:
            found = np.linalg.solve(blocks, np.where(support, targets, 0.0)[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            break
        sizes = np.abs(found).max(axis=1, keepdims=True)
        wrong = np.where(support, found, found @ unit - targets) < -_TOLERANCE * np.maximum(1.0, sizes)
        wrongs = wrong.sum(axis=1)
        large = sizes[:, 0] >= _LARGE
        settled = (wrongs == 0) & ~large
        solutions[rows[settled]] = np.maximum(found[settled], 0.0)
        if settled.all():
            return unsettled
        unsettled += rows[large].tolist()
        # While fewer and fewer are wrong all of them change sides; else, after three more tries, the last one alone.
        chances = np.where(wrongs < fewest, 3, chances - 1)
        fewest = np.minimum(fewest, wrongs)
        alone = np.zeros_like(wrong)
        alone[np.arange(len(rows)), count - 1 - np.argmax(wrong[:, ::-1], axis=1)] = True
        support ^= np.where((chances >= 0)[:, None], wrong, alone)
        left = ~(settled | large)
        rows, support, targets = rows[left], support[left], targets[left]
        fewest, chances = fewest[left], chances[left]
    return [*unsettled, *rows.tolist()]


def project_on_simplex(point: Array) -> Array:
    """Return the nearest point of {w >= 0, Σw = 1}: all entries less one number, and 0 where that is negative."""
    shifted = point - point.max()  # a common shift changes nothing, and keeps large numbers exact
    falling = np.sort(shifted)[::-1]
    excess = (np.cumsum(falling) - 1.0) / np.arange(1, len(point) + 1)
    threshold = excess[np.flatnonzero(falling > excess)[-1]]
    nearest: Array = np.maximum(shifted - threshold, 0.0)
    return nearest


def barrier_newton(gramian: Array, power: float = 1.0) -> Array:
    """Solve Gw = w^(−power), elementwise, for w > 0, by damped Newton steps.

    The solution minimises a convex function, ½wᵀGw less an integral of w^(−power), so a step that lowers it always
    exists. In v_k = w_k/a_k, where a_k solves the equation of task k alone, the scales of the tasks are gone. For two
    tasks and a power of 1 the solution is w_k = 1/(‖g_k‖·√(1 + cosine)).

    Args:
        gramian: G, (K, K), positive semidefinite, with a positive diagonal; no two rows exactly opposed.
        power: > 0.
    """
    if len(gramian) == 2 and power == 1.0:
        (first, cross), (_, second) = gramian.tolist()
        ratio = math.sqrt(first / second)
        if (sums := first + cross * ratio) > 0.0:
            return np.array([1.0, ratio]) / math.sqrt(sums)
    alone = gramian.diagonal() ** (-1.0 / (1.0 + power))
    matrix = gramian * np.outer(alone**power, alone)  # its diagonal is 1
    values: Array = np.ones(len(gramian))
    for _ in range(200):
        slope = values**-power
        curvature = matrix.copy()
        curvature.ravel()[:: len(matrix) + 1] += power * slope / values
        step = np.linalg.solve(curvature, matrix @ values - slope)
        shares = step / values
        largest = float(np.abs(shares).max())
        # Close to the solution full steps converge quadratically; far from it, damp, and stay positive.
        length = 1.0 if largest <= 0.5 else min(1.0 / (1.0 + largest), 0.9 / max(float(shares.max()), 0.9))
        values = values - length * step
        if largest <= 1e-8:  # what is left after a full step is about its square
            break
    return values * alone


def _equality_qp(
    quadratic: Array, linear: Array, sums: Array, support: NDArray[np.bool_]
) -> tuple[Array, float]:
    """Minimise ½vᵀQv + bᵀv over Σ sums_k·v_k = 1 on a support, without bounds; return v and the multiplier."""
    inside = np.flatnonzero(support)
    part, sums_in, falls = quadratic[inside][:, inside], sums[inside], -linear[inside]
    values = np.zeros(len(linear))
    if _is_definite(part):
        free, along = np.linalg.solve(part, np.stack([falls, sums_in], axis=1)).T
        multiplier = float((1.0 - sums_in @ free) / (sums_in @ along))
        values[inside] = free + multiplier * along
        return values, multiplier
    size = len(inside)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = part
    system[size, :size] = system[:size, size] = sums_in
    solution = _least_norm(system, np.append(falls, 1.0))
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


def _is_definite(matrix: Array) -> bool:
    """Return whether a positive semidefinite matrix is definite by more than rounding."""
    try:
        pivots = np.linalg.cholesky(matrix).diagonal()
    except np.linalg.LinAlgError:
        return False
    return bool((pivots**2 > _FLAT * matrix.diagonal()).all())


def solve_semidefinite(matrix: Array, right: Array) -> Array:
    """Solve a system of a positive semidefinite matrix; the solution of the least norm where it is singular."""
    return np.asarray(np.linalg.solve(matrix, right)) if _is_definite(matrix) else _least_norm(matrix, right)


def _least_norm(matrix: Array, right: Array) -> Array:
    return np.asarray(np.linalg.lstsq(matrix, right, rcond=1e-13)[0], dtype=np.float64)
