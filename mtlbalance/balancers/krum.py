"""Krum: follow the task gradients that the others agree with most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtlbalance.balancers.base import Sync, WeightSum
from mtlbalance.balancers.checks import integer
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer
from mtlbalance.errors import InvalidArgumentError

_ROUNDING = 1e-12  # of the squared gradients that a distance is the difference of


class KrumLoss(GramianBalancer):
    """Average the m task gradients that lie nearest to their neighbours, and leave the others out.

    Use it when up to f of the losses may be wrong (corrupt labels, an untrusted source) and the tasks are otherwise
    estimates of one direction. Tasks with different aims or scales lie far apart for good reason: do not use it.

    With P tasks present and N_k the P − f − 2 tasks nearest to k:

        score_k = Σ_{j ∈ N_k} ‖g_k − g_j‖²;  weight 1/m for each of the m lowest scores, else 0

    Args:
        tasks: K >= 1 unique task names.
        num_byzantine: f >= 0, how many gradients may be arbitrary; above 0 it needs K >= f + 3. What the paper proves
            needs K >= 2·f + 3. Default 0.
        num_selected: m in [1, K]; the paper's is at most K − f − 2. Default 1 (Krum).
        scale_heads: whether heads are weighted too. Default False: a task that is left out still trains its head.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Weights sum to 1. Tasks with equal scores share what is left to select, so that their order plays no role: with one
    neighbour (P = f + 3) the two nearest tasks always do. Absent tasks: the problem is solved for the P
    present ones, m at most P; with P < f + 3 no one has a neighbour to be judged by, and weights are 1/P each. So are
    they always for K < 3. Zero gradients, State and Cost: see ``GramianBalancer``.

    Raises:
        InvalidArgumentError: an argument is out of range, or there are too few tasks for it.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> balancer = KrumLoss(("a", "b", "c", "d"), num_byzantine=1, num_selected=2)
        >>> rows = torch.tensor([[1.0, 2.0], [1.0, 2.5], [1.0, 2.2], [-9.0, 40.0]])
        >>> balancer(*(rows @ theta), shared_params=[theta]).backward()
        >>> balancer.get_weights()
        {'a': 0.5, 'b': 0.0, 'c': 0.5, 'd': 0.0}

    Source: Blanchard et al. 2017, Krum and multi-Krum. Distances are squared, as there; torchjd sums plain
    ones. Difference: of equal scores the paper takes the one of the first task.
    """

    method: ClassVar[str] = "Krum"
    weight_sum: ClassVar[WeightSum] = "1"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        num_byzantine: int = 0,
        num_selected: int = 1,
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
        self.num_byzantine = integer(num_byzantine, "num_byzantine", 0)
        self.num_selected = integer(num_selected, "num_selected", 1)
        count = len(self.tasks)
        if self.num_byzantine and count < self.num_byzantine + 3:
            raise InvalidArgumentError(
                f"num_byzantine={self.num_byzantine} needs at least {self.num_byzantine + 3} tasks "
                f"(num_byzantine + 3); there are {count}"
            )
        if self.num_selected > count:
            raise InvalidArgumentError(f"num_selected={self.num_selected} is more than the {count} tasks")

    def get_name(self) -> str:
        """Return ``Krum``, or ``multi-Krum(m)`` where several are averaged."""
        return self.method if self.num_selected == 1 else f"multi-Krum({self.num_selected})"

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return 1/m for the tasks with the lowest scores."""
        count = len(gramian)
        neighbours = count - self.num_byzantine - 2
        if neighbours < 1:
            return np.full(count, 1.0 / count)
        squares = gramian.diagonal()
        distances = np.maximum(squares[:, None] + squares[None, :] - 2.0 * gramian, 0.0)
        np.fill_diagonal(distances, np.inf)  # a task is not its own neighbour
        nearest = np.argsort(distances, axis=1)[:, :neighbours]
        scores = np.take_along_axis(distances, nearest, axis=1).sum(axis=1)
        rounding = _ROUNDING * (neighbours * squares + squares[nearest].sum(axis=1))
        selected = min(self.num_selected, count)
        last = np.sort(scores)[selected - 1]
        before = scores < last - rounding
        level = ~before & (scores <= last + rounding)
        weights: Array = (before + level * (selected - before.sum()) / level.sum()) / selected
        return weights
