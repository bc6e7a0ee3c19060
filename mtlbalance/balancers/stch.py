"""STCH: the smooth Tchebycheff scalarisation of log losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import integer, real, task_names
from mtlbalance.balancers.objective import ObjectiveBalancer
from mtlbalance.balancers.preferences import preferences
from mtlbalance.balancers.signals import Signals


class STCHLoss(ObjectiveBalancer):
    """Minimise a smooth maximum of the log losses, each relative to its nadir: the worst task counts most.

    Use it to improve the task that lags most behind where it started, with one backward pass, and for a set
    of trade-offs by ``preference``.

    With the nadir v_k, the mean of L_k over the task's first ``nadir_steps`` calls, and preferences p, over the
    present tasks:

        f = μ·log Σ exp(p_k·log(L_k/v_k)/μ),  w_k = q_k·p_k/L_k,  q = softmax(p·log(L/v)/μ)

    Until every present task has its nadir, f is the mean of log L_k, so w_k = 1/(P·L_k). The value is f.

    Args:
        tasks: K >= 1 unique task names.
        mu: μ > 0; small values come near the maximum, large ones near the mean. Default 1.
        preference: p, a mapping by name or a sequence, each > 0. Default: 1 each.
        nadir_steps: calls (>= 1) over which a nadir is averaged. Default 100; the authors use an epoch.
        sync, process_group: see ``Balancer``.

    Absent tasks: f is over the present ones; a nadir waits.
    Losses that are not positive: the call counts in ``num_nonfinite``, with the last good weights.

    State: ``nadir`` and ``nadir_counts``, each (K,), and that of ``ObjectiveBalancer``.
    Cost: one backward pass. No host sync.

    Raises:
        InvalidArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> balancer = STCHLoss(("a", "b"), nadir_steps=1)
        >>> _ = balancer(torch.tensor(4.0), torch.tensor(2.0))
        >>> round(balancer(torch.tensor(1.0), torch.tensor(2.0)).item(), 4)  # log(1/4 + 2/2)
        0.2231
        >>> {task: round(weight, 4) for task, weight in balancer.get_weights().items()}
        {'a': 0.2, 'b': 0.4}

    Source: Lin et al. 2024, "Smooth Tchebycheff scalarization", on log losses as in its multi-task experiments.
    Differences: the nadir is averaged over calls, not over one epoch after a warm-up of others; the authors' code
    multiplies f by K, and sums the logs where the mean is taken here.
    """

    method: ClassVar[str] = "STCH"
    free_alone: ClassVar[bool] = True
    needs_positive_losses: ClassVar[bool] = True

    nadir: Tensor
    nadir_counts: Tensor
    preference: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        mu: float = 1.0,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        nadir_steps: int = 100,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        names = task_names(tasks)
        super().__init__(names, first_weights=1.0 / len(names), sync=sync, process_group=process_group)
        self.mu = real(mu, "mu", 0.0, math.inf, low_open=True)
        self.nadir_steps = integer(nadir_steps, "nadir_steps", 1)
        self.register_buffer("preference", torch.tensor(preferences(preference, names)), persistent=False)
        self.register_buffer("nadir", torch.ones(len(names)))
        self.register_buffer("nadir_counts", torch.zeros(len(names)))

    def objective(self, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return f; the logarithm of an absent task's 1 is 0."""
        logs_K = losses_K.log()
        known = ((self.nadir_counts >= self.nadir_steps) | ~present_K).all()
        terms_K = self.preference * (logs_K - self.nadir.log()) / self.mu
        smooth_maximum = self.mu * terms_K.masked_fill(~present_K, -torch.inf).logsumexp(0)
        return torch.where(known, smooth_maximum, logs_K.sum() / present_K.sum())

    def observe(self, signals: Signals) -> None:
        """Average the nadirs that are not complete."""
        moves_K = signals.present_K & signals.finite & (self.nadir_counts < self.nadir_steps)
        self.nadir_counts += moves_K
        before_K = torch.where(self.nadir_counts > 1, self.nadir, 0.0)
        mean_K = before_K + (signals.losses_K - before_K) / self.nadir_counts.clamp(min=1.0)
        self.nadir.copy_(torch.where(moves_K, mean_K.to(self.nadir), self.nadir))
