"""GradVac: bring task gradients as close to each other as they usually are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import integer, real
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer, Indices

_LARGEST_TARGET = 0.999  # a cosine of 1 would take an infinite step; this one at most 22 gradient lengths
_VANISHED = 1e-7  # of the parts that a combination is the sum of: below it only rounding is left


class GradVacLoss(GramianBalancer):
    """Where two task gradients point further apart than they usually do, turn one towards the other; then sum.

    Use it when tasks are related to a degree that differs from pair to pair. PCGrad asks for a cosine of 0 of all
    pairs; this asks of each what it has had on average.

    For each i, starting from v = g_i, over j ≠ i in a random order, with c = cos(v, g_j) and the pair's target φ:

        if c < φ:  v ← v + ‖v‖·(φ·√(1 − c²) − c·√(1 − φ²)) / (‖g_j‖·√(1 − φ²))·g_j,   so that cos(v, g_j) = φ
        φ ← (1 − β)·φ + β·c,   φ(0) = 0, whether or not c < φ

    The update is the sum of all v.

    Args:
        tasks: K >= 1 unique task names.
        beta: β in [0, 1], the share of a new cosine in the target; 0 is PCGrad. Default 0.01.
        seed: of the generator that draws the orders (>= 0); part of the state, the same on all ranks. Default 0.
        scale_heads: whether heads are weighted too. Default False: no other task's gradient reaches a head.
        update_every, delivery, sync, process_group: see ``GradientBalancer``. Targets move once a measurement.

    Weights are 1 each where no pair is below its target. Zero gradients: see ``GramianBalancer``; a pair with one is
    not measured, nor is one whose v has vanished. Absent tasks: the targets of their pairs wait.

    State: ``target_cosines`` (K, K), row i column j for v of task i and g_j; the generator; and that of
    ``GramianBalancer``.
    Cost: see ``GramianBalancer``.

    Raises:
        InvalidArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = GradVacLoss(("a", "b"), beta=0.5)
        >>> losses = [theta @ torch.tensor([1.0, 0.0]), theta @ torch.tensor([3.0, 4.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad  # a cosine of 0.6 is above the first target, 0: the sum
        tensor([4., 4.])
        >>> balancer.target_cosines
        tensor([[0.0000, 0.3000],
                [0.3000, 0.0000]])

    Source: Wang et al. 2021, Gradient Vaccine, with one parameter group (all of ``shared_params``). Differences:
    a target beyond ±0.999 counts as ±0.999 in the step, which the formula would make without bound; no 1e-8 in
    denominators. Other implementations move targets on conflict only, or with β = 0.5.
    """

    method: ClassVar[str] = "GradVac"

    target_cosines: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        beta: float = 0.01,
        seed: int = 0,
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
        self.beta = real(beta, "beta", 0.0, 1.0)
        self.generator = torch.Generator().manual_seed(integer(seed, "seed", 0))
        self.register_buffer("target_cosines", torch.zeros(len(self.tasks), len(self.tasks)))

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the weights for targets of 0, as at the first measurement."""
        return self._vaccinate(gramian, np.zeros_like(gramian))

    def solve_for(self, tasks: Indices, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the weights for the tasks' targets, and move those towards the cosines that were met."""
        stored = self.target_cosines.double().cpu().numpy()
        targets = stored[np.ix_(tasks, tasks)]
        weights = self._vaccinate(gramian, targets)
        stored[np.ix_(tasks, tasks)] = targets
        self.target_cosines.copy_(torch.from_numpy(stored))
        return weights

    def _vaccinate(self, gramian: Array, targets: Array) -> Array:
        """Return the column sums of the coefficients of all v; ``targets`` moves in place."""
        count = len(gramian)
        norms = np.sqrt(gramian.diagonal())
        cosines = gramian / np.outer(norms, norms)  # the problem of unit gradients, solved for w_k·‖g_k‖
        coefficients = np.diag(norms)
        for i in range(count):
            row = coefficients[i]
            for j in torch.randperm(count, generator=self.generator, device="cpu").tolist():
                length = float(np.sqrt(max(row @ cosines @ row, 0.0)))
                if j == i or length <= _VANISHED * float(np.abs(row).sum()):
                    continue
                cosine = min(max(float(row @ cosines[:, j]) / length, -1.0), 1.0)
                target = min(max(float(targets[i, j]), -_LARGEST_TARGET), _LARGEST_TARGET)
                if cosine < target:
                    row[j] += length * (target * np.sqrt((1.0 - cosine**2) / (1.0 - target**2)) - cosine)
                targets[i, j] += self.beta * (cosine - targets[i, j])
        total: Array = coefficients.sum(axis=0)
        return total / norms
