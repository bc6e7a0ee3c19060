"""Uncertainty weighting: learned task variances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import known_task, one_of, task_names
from mtlbalance.balancers.learned_weights import LearnedWeights
from mtlbalance.balancers.presence import choose, only
from mtlbalance.balancers.signals import Signals
from mtlbalance.errors import InvalidArgumentError

KINDS = ("regression", "classification")


class UncertaintyLoss(LearnedWeights):
    """Weigh each task by the inverse of a variance that is learned with the model.

    Use it when task losses are likelihoods (squared errors, cross-entropies) of different noise. It equalises
    the sizes of the losses in the long run, not those of their gradients.

    With s_k = log σ_k² (``log_scales``, from 0), over the present tasks:

        f = Σ_regression (½·e^{−s_k}·L_k + ½·s_k) + Σ_classification (e^{−s_k}·L_k + ½·s_k)

    The weights are ½·e^{−s_k} and e^{−s_k}. The value is f, which becomes negative as losses shrink: watch the
    task losses, not f, for plateaus. A loss that goes to 0 drives σ to 0 and its weight up without bound.

    Args:
        tasks: K >= 1 unique task names.
        kinds: a mapping task -> ``"regression"`` or ``"classification"``, one for every task. Default: all
            regression. In a config: the kinds of the dataset's tasks.
        sync, process_group: see ``Balancer``.

    Absent tasks: both terms are left out; see ``LearnedWeights`` for that, State and ranks.
    Cost: one backward pass; K parameters.

    Raises:
        InvalidArgumentError: ``kinds`` lacks a task, or names an unknown task or kind.

    Example:
        >>> import torch
        >>> balancer = UncertaintyLoss(("rul", "health"), kinds={"rul": "regression", "health": "classification"})
        >>> loss = balancer({"rul": torch.tensor(4.0), "health": torch.tensor(1.0)})
        >>> loss.item()  # 0.5 * 4 + 1
        3.0
        >>> loss.backward()
        >>> balancer.log_scales.grad  # 0.5 - 0.5 * 4 and 0.5 - 1
        tensor([-1.5000, -0.5000])

    Source: Kendall, Gal and Cipolla 2018, equations 7 and 10; s instead of σ as they advise. Differences: none.
    """

    method: ClassVar[str] = "Uncertainty"

    loss_factors: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        kinds: Mapping[str, str] | None = None,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        names = task_names(tasks)
        factors = [1.0 if kind == "classification" else 0.5 for kind in _kinds(kinds, names)]
        super().__init__(names, first_weights=factors, sync=sync, process_group=process_group)
        self.register_buffer("loss_factors", torch.tensor(factors), persistent=False)

    def objective(self, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return f."""
        terms_K = self.loss_factors * torch.exp(-self.log_scales) * losses_K + 0.5 * self.log_scales
        return only(present_K, terms_K).sum()

    def _slopes(self, signals: Signals, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return f and its slopes in closed form: c·e^(−s) by a loss, 1/2 − c·e^(−s)·L by s."""
        present_K, scales_K = signals.present_K, self.log_scales.detach()
        pulls_K = self.loss_factors * torch.exp(-scales_K)
        terms_K = pulls_K * choose(present_K, signals.losses_K, 1.0)
        objective = only(present_K, terms_K + 0.5 * scales_K).sum()
        slopes = [only(present_K, 0.5 - terms_K)] if learned else []
        return objective, only(present_K, pulls_K), slopes


def _kinds(kinds: Mapping[str, str] | None, tasks: Sequence[str]) -> list[str]:
    if kinds is None:
        return [KINDS[0]] * len(tasks)
    if not isinstance(kinds, Mapping):
        raise InvalidArgumentError(f"kinds must map task names to {' or '.join(KINDS)}; got {kinds!r}")
    for task in kinds:
        known_task(task, tasks, "kinds")
    missing = [task for task in tasks if task not in kinds]
    if missing:
        raise InvalidArgumentError(f"kinds has no kind for {', '.join(map(repr, missing))}")
    return [one_of(kinds[task], f"kinds[{task!r}]", KINDS) for task in tasks]
