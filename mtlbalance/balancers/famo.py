"""FAMO: weights that make the losses fall at equal relative rates, from the losses alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer, Sync
from mtlbalance.balancers.checks import real, task_weights
from mtlbalance.balancers.losses import check_sample_weights, name_losses, no_losses, reduce_losses
from mtlbalance.balancers.presence import (
    all_finite,
    choose,
    is_everyone,
    known_finite,
    moving,
    share_budget,
    softmax_of_present,
)
from mtlbalance.balancers.ranks import active_ranks
from mtlbalance.balancers.signals import Signals

_MARGIN = 1e-8  # added to L − b, as by the authors
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class FAMOLoss(Balancer):
    """Give more weight to tasks whose loss falls relatively less, in one backward pass.

    Use it where MGDA-like balancing is wanted for many tasks without K backward passes.

    With D_k = L_k − b_k + 1e-8 and z = softmax(ξ):

        w_k = (z_k/D_k) / Σ_j (z_j/D_j)                           applied
        δ_k = log D_k before the step − log D_k after it
        ξ ← Adam step along z_k·(δ_k − Σ_j z_j·δ_j) + γ·ξ_k

    **After the step.** Exactly as published, call ``balancer.update(losses)`` after ``optimizer.step()`` with the
    losses of the *same batch*, computed anew. Without it the losses of the next call serve, of another batch:
    its noise enters δ. ``get_name()`` is ``FAMO(next batch)`` until ``update`` is called, then ``FAMO``. With
    gradient accumulation use ``update``: between micro-batches there is no step.

    Args:
        tasks: K >= 1 unique task names.
        lr: of Adam on ξ (> 0). Default 0.025.
        gamma: decay γ >= 0 of ξ, which keeps weights from freezing. Default 0.001.
        min_losses: lower bounds b, a mapping by name or a sequence (>= 0). Default: 0 each.
        sync, process_group: see ``Balancer``; δ is of rank-averaged losses.

    Absent tasks: z is over the present ones; ξ_k, its moments and its earlier loss wait.
    A loss below its b, like a non-finite one, counts in ``num_nonfinite`` and leaves the state as it was.

    Reports: ``raw`` is z, as the next call will use it.
    State: ``logits`` ξ, Adam's ``moment_1``, ``moment_2`` and ``adam_steps``, ``previous_losses`` (NaN: none),
    ``last_weights``, each (K,), the number of updates, and the base's. ``parameters()`` is empty.
    Cost: one backward pass; ``update`` one more forward pass of yours. No host sync.

    Raises:
        InvalidArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> balancer = FAMOLoss(("a", "b"))
        >>> _ = balancer(torch.tensor(4.0), torch.tensor(1.0))
        >>> {task: round(weight, 4) for task, weight in balancer.get_weights().items()}
        {'a': 0.2, 'b': 0.8}
        >>> balancer.update(torch.tensor(3.0), torch.tensor(1.0))  # a fell, so b gains
        >>> {task: round(weight, 4) for task, weight in balancer.report()["raw"].items()}  # z
        {'a': 0.4875, 'b': 0.5125}
        >>> balancer.get_name()
        'FAMO'

    Source: Liu et al. 2023, Algorithm 1 and the authors' code (1e-8, Adam with L2 decay). Differences: the value
    is Σ w_k·L_k, whose gradient is that of their Σ z_k·log(D_k)/c.
    """

    method: ClassVar[str] = "FAMO"
    unusable: ClassVar[str] = "a loss was NaN or infinite, or below its min_losses"
    _counters: ClassVar[tuple[str, ...]] = ("calls", "updates")

    logits: Tensor
    moment_1: Tensor
    moment_2: Tensor
    adam_steps: Tensor
    previous_losses: Tensor
    last_weights: Tensor
    min_losses: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        lr: float = 0.025,
        gamma: float = 0.001,
        min_losses: Mapping[str, float] | Sequence[float] | None = None,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        count = len(self.tasks)
        self.lr = real(lr, "lr", 0.0, math.inf, low_open=True)
        self.gamma = real(gamma, "gamma", 0.0, math.inf)
        bounds = [0.0] * count if min_losses is None else task_weights(min_losses, self.tasks, "min_losses")
        self.updates = 0
        for name in ("logits", "moment_1", "moment_2", "adam_steps"):
            self.register_buffer(name, torch.zeros(count))
        self.register_buffer("previous_losses", torch.full((count,), math.nan))
        self.register_buffer("last_weights", torch.full((count,), 1.0 / count))
        self.register_buffer("min_losses", torch.tensor(bounds), persistent=False)

    def get_name(self) -> str:
        """Return ``FAMO``, or ``FAMO(next batch)`` while ``update`` has not been called."""
        return self.method if self.updates else f"{self.method}(next batch)"

    def phase(self) -> tuple[Hashable, ...]:
        """Return what all methods do: ``updates`` decides on the name alone."""
        return super().phase()

    def _apply_weights(self, signals: Signals) -> Tensor:
        finite = self._usable(signals.losses_K, signals.present_K, signals.finite)
        return super()._apply_weights(Signals(signals.losses_K, signals.present_K, None, finite))

    def weigh(self, signals: Signals) -> Tensor:
        """Step the logits if no ``update`` has done so since the last call, and apply their weights."""
        moves_K = moving(signals.present_K, signals.finite)
        self._step_logits(signals.losses_K, moves_K)
        pulls_K = self._shares(signals.present_K) / self._distance(signals.losses_K)
        weights_K = pulls_K / pulls_K.sum()
        self.last_weights.copy_(choose(moves_K, weights_K.to(self.last_weights), self.last_weights))
        self.previous_losses.copy_(
            choose(moves_K, signals.losses_K.to(self.previous_losses), self.previous_losses)
        )
        if is_everyone(moves_K):
            return weights_K
        return torch.where(signals.finite, weights_K, self.current_weights(signals.present_K))

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the last weights of the present tasks, which share their sum."""
        return share_budget(self.last_weights, present_K)

    @torch.no_grad()
    def update(
        self,
        *losses: Mapping[str, Tensor | None] | Tensor | None,
        sample_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Learn from the losses of the same batch after the optimizer's step, given as in the call itself."""
        weights = check_sample_weights(sample_weights, self.tasks)
        ranks = active_ranks(self.process_group) if self.sync != "none" else None
        present, empty = name_losses(losses, self.tasks)
        if not present and (ranks is None or not empty):
            raise no_losses(self.tasks, several_ranks=ranks is not None)
        reduced = reduce_losses(present, weights)
        _, losses_K, present_K = self._stack(self._by_index(reduced), empty)
        if ranks is not None:
            losses_K, counts_K = ranks.mean_losses(losses_K, present_K)
            present_K = counts_K > 0
        finite = self._usable(losses_K, present_K, all_finite(losses_K))
        self._step_logits(losses_K, moving(present_K, finite))
        self.previous_losses.fill_(math.nan)  # not used a second time by the next call
        self.updates += 1
        self._count_nonfinite(finite)

    def _usable(self, losses_K: Tensor, present_K: Tensor, finite: Tensor) -> Tensor:
        above_K = losses_K >= self.min_losses
        return finite & (above_K if is_everyone(present_K) else above_K | ~present_K).all()

    def _distance(self, losses_K: Tensor) -> Tensor:
        return (losses_K - self.min_losses).clamp(min=0.0) + _MARGIN

    def _shares(self, present_K: Tensor) -> Tensor:
        return softmax_of_present(self.logits, present_K)

    def _step_logits(self, losses_K: Tensor, moves_K: Tensor) -> None:
        """Take Adam's step on the logits of the tasks that have an earlier loss, where ``moves_K``."""
        if not (is_everyone(moves_K) and known_finite(self.previous_losses)):
            moves_K = moves_K & ~self.previous_losses.isnan()
        fall_K = self._distance(self.previous_losses).log() - self._distance(losses_K).log()
        fall_K = choose(moves_K, fall_K, 0.0).to(self.logits)
        shares_K = choose(moves_K, self._shares(moves_K), 0.0)  # none moves: the softmax is of nothing
        slope_K = shares_K * (fall_K - (shares_K * fall_K).sum()) + self.gamma * self.logits
        beta_1, beta_2 = _BETAS
        first_K = torch.lerp(self.moment_1, slope_K, 1.0 - beta_1)
        second_K = torch.lerp(self.moment_2, slope_K.square(), 1.0 - beta_2)
        steps_K = self.adam_steps + 1.0
        scale_K = (second_K / (1.0 - beta_2**steps_K)).sqrt() + _EPSILON
        logits_K = torch.addcdiv(self.logits, first_K / (1.0 - beta_1**steps_K), scale_K, value=-self.lr)
        for state, moved_K in (
            (self.moment_1, first_K),
            (self.moment_2, second_K),
            (self.adam_steps, steps_K),
            (self.logits, logits_K),
        ):
            state.copy_(choose(moves_K, moved_K, state))

    def _report(self) -> dict[str, Tensor]:
        return {**super()._report(), "raw": self.logits.softmax(0)}
