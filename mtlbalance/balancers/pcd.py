"""PCD: follow the primary task as closely as progress on the others allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import known_task, real
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer, Indices
from mtlbalance.balancers.simplex import nonnegative_qp
from mtlbalance.errors import InvalidArgumentError

_VANISHED = 1e-7  # of the parts that a direction is the sum of: below it only rounding is left
_VIOLATED = 1e-8  # of the largest term of a constraint


class PCDLoss(GramianBalancer):
    """Take the primary task's gradient, changed no more than needed for every other task to gain its share.

    Use it when one task is the aim and the others are conditions on how to get there (sparsity, robustness, an
    auxiliary loss), not for tasks of equal rank.

    With p the primary task, g̃_k = g_k/√v̂_k, and v̂_k the bias-corrected moving average of ‖g_k‖²:

        d̃ = argmin ‖d − g̃_p‖² subject to g̃_j·d >= τ_j·‖g̃_j‖² for all j ≠ p;   the update is ‖g_p‖·d̃/‖d̃‖

    Args:
        tasks: K >= 1 unique task names.
        primary: the primary task. Default: the first of ``tasks``.
        tau: τ in [0, 1], the share of the progress that a step along its own normalised gradient would bring which each
            other task is assured of; a number for all, or a mapping with one for each other task. Default 0.02.
        beta: decay of the moving averages, in [0, 1). Default 0.999.
        scale_heads: whether heads are weighted too. Default False: a task that asks for nothing has weight 0.
        update_every, delivery, sync, process_group: see ``GradientBalancer``. Averages move once a measurement.

    Weights are 1 for the primary and 0 for the others at first, and where its gradient satisfies all constraints. No
    direction satisfies them (two secondary tasks that oppose each other): they are dropped for this step. The primary's
    gradient is zero, or d̃ is: so is the update, and all weights are 0.
    Absent tasks: their averages wait and their constraints are not asked for. The primary is absent: there is nothing
    to put first, and the others weigh 1/P each. Nothing pulls: 1/P each.

    State: ``norm_averages`` (K,), the square roots of the averages before their bias correction,
    ``norm_counts`` (K,), how many norms went in, and that of ``GramianBalancer``.
    Cost: see ``GramianBalancer``.

    Raises:
        InvalidArgumentError: an argument is out of range, or names an unknown task.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = PCDLoss(("accuracy", "sparsity"), tau=0.6)
        >>> losses = [theta @ torch.tensor([5.0, 0.0]), theta @ torch.tensor([0.0, 0.1])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad  # along (1, 0.6), as long as the primary's
        tensor([4.2875, 2.5725])

    Source: Varam and AlHajri 2026, Definitions 4.1 and 4.5 and Algorithm 1. Differences: no 1e-8 under the root (a task
    with a constraint has v̂ > 0), so that gradients of any size keep their scale; one τ a task as in the authors' code.
    """

    method: ClassVar[str] = "PCD"

    norm_averages: Tensor
    norm_counts: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        primary: str | None = None,
        tau: float | Mapping[str, float] = 0.02,
        beta: float = 0.999,
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
        self.primary = self.tasks[0] if primary is None else known_task(primary, self.tasks, "primary")
        self.taus = _taus(tau, self.tasks, self.primary)
        self.beta = real(beta, "beta", 0.0, 1.0, high_open=True)
        for weights_K in (self.solved_weights, self.applied_weights):
            weights_K.copy_(torch.eye(len(self.tasks))[self.tasks.index(self.primary)])
        self.register_buffer("norm_averages", torch.zeros(len(self.tasks)))
        self.register_buffer("norm_counts", torch.zeros(len(self.tasks)))

    def solve(self, gramian: Array, losses: Array) -> Array:
        """Return the weights for the first P tasks, as at the first measurement."""
        tasks = np.arange(len(losses))
        return self._direction(tasks, gramian, gramian.diagonal())

    def solve_for(self, tasks: Indices, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the weights for gradients scaled by their averages."""
        averages = self.norm_averages.double().cpu().numpy()[tasks] ** 2
        counts = self.norm_counts.double().cpu().numpy()[tasks]
        unbiased = averages / (1.0 - self.beta**counts)
        return self._direction(tasks, gramian, np.where(unbiased > 0, unbiased, gramian.diagonal()))

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the last weights, and equal ones without the primary task: it alone may have some."""
        equal_K = present_K / present_K.sum()
        has_primary = present_K[self.tasks.index(self.primary)]
        return torch.where(has_primary, super().current_weights(present_K), equal_K.to(self.solved_weights))

    def weights_at_rest(self, tasks: Indices, losses: Array) -> Array:  # noqa: ARG002
        """Return equal weights."""
        return np.full(len(tasks), 1.0 / len(tasks))

    def _solve_present(self, present_K: Tensor, gramian: Array, losses_K: Tensor) -> Array:
        """Move the averages first, those of tasks with a zero gradient or without company included."""
        present = present_K.cpu().numpy()
        squares_K = gramian.diagonal()
        before_K = self.norm_averages.double().cpu().numpy()
        roots_K = np.sqrt(self.beta * before_K**2 + (1.0 - self.beta) * squares_K)
        self.norm_averages.copy_(torch.from_numpy(np.where(present, roots_K, before_K)))
        self.norm_counts += torch.from_numpy(present).to(self.norm_counts)
        first = self.tasks.index(self.primary)
        if present[first] and squares_K[first] == 0 and squares_K.any():
            return np.zeros(len(self.tasks))
        return super()._solve_present(present_K, gramian, losses_K)

    def _direction(self, tasks: Indices, gramian: Array, averages: Array) -> Array:
        """Return the weights of the update from gradients divided by the roots of their ``averages``."""
        found = np.flatnonzero(tasks == self.tasks.index(self.primary))
        if not len(found):
            return np.full(len(tasks), 1.0 / len(tasks))
        first = int(found[0])
        others = np.flatnonzero(np.arange(len(tasks)) != first)
        scales = 1.0 / np.sqrt(averages)
        unit = gramian * np.outer(scales, scales)
        inside = unit[np.ix_(others, others)]
        wanted = self.taus[tasks[others]] * inside.diagonal()
        weights = np.zeros(len(tasks))
        weights[first] = 1.0
        if len(others):
            multipliers = nonnegative_qp(inside, wanted - unit[others, first])
            gained = unit[others, first] + inside @ multipliers
            terms = np.abs(unit[others, first]) + np.abs(inside) @ multipliers + wanted
            if (gained >= wanted - _VIOLATED * terms).all():
                weights[others] = multipliers
        length = float(np.sqrt(max(float(weights @ unit @ weights), 0.0)))
        if length <= _VANISHED * float(weights @ np.sqrt(unit.diagonal())):
            return np.zeros(len(tasks))
        scaled: Array = weights * scales * float(np.sqrt(gramian[first, first])) / length
        return scaled


def _taus(tau: float | Mapping[str, float], tasks: Sequence[str], primary: str) -> Array:
    """Return τ for every task; the primary's is not used."""
    if not isinstance(tau, Mapping):
        return np.full(len(tasks), real(tau, "tau", 0.0, 1.0))
    for task in tau:
        known_task(task, tasks, "tau")
    missing = [task for task in tasks if task != primary and task not in tau]
    if missing or primary in tau:
        wrong = f"has none for {', '.join(map(repr, missing))}" if missing else f"has one for {primary!r}"
        raise InvalidArgumentError(f"tau {wrong}; it needs one for every task but the primary, {primary!r}")
    return np.array([real(tau.get(task, 0.0), f"tau[{task!r}]", 0.0, 1.0) for task in tasks])
