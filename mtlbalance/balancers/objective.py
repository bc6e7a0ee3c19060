"""The base of methods that minimise one function of the losses, their own objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer, Call, Shows, Sync, WeightSum
from mtlbalance.balancers.delivery import with_slopes
from mtlbalance.balancers.presence import all_finite, both, choose, is_true, known_finite, moving, only
from mtlbalance.balancers.signals import Signals


class ObjectiveBalancer(Balancer):
    """Base of balancers that minimise f(L_1, …, L_K), whose slopes w_k = ∂f/∂L_k are the weights applied.

    A subclass writes down `objective`; this class differentiates it by the losses, delivers Σ w_k·∂L_k with
    f as the value, and leaves out of the state whatever has no finite slope. Over ranks, f and its slopes
    are those of the rank-averaged losses, and every rank shows that f: of its own losses alone it would be another
    number, whose mean is not f of the whole batch.

    Args:
        tasks: K >= 1 unique task names.
        first_weights: the slopes before the first call, one for all tasks or one a task.
        sync, process_group: see ``Balancer``.

    In ``eval()`` or without gradients the value is f, as in training.

    State: ``last_weights`` (K,), the last finite slope of each task, and the base's.
    Cost: one backward pass, and a few operations on K numbers. No host sync.
    """

    weight_sum: ClassVar[WeightSum] = "free"
    shows: ClassVar[Shows] = "objective"
    unusable: ClassVar[str] = "a loss was NaN or infinite, or outside the domain of the method's objective"

    last_weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        first_weights: float | Sequence[float],
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.register_buffer("last_weights", torch.ones(len(self.tasks)) * torch.as_tensor(first_weights))
        self.applied_weights.copy_(self.last_weights)

    @abstractmethod
    def objective(self, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return f (0-d) of the present tasks' losses, differentiable.

        An absent task's loss is given as 1, and must not count.
        """

    def observe(self, signals: Signals) -> None:
        """Move what the objective remembers of the losses, where ``signals.finite``; called after it was used."""

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the last slopes of the present tasks."""
        return only(present_K, self.last_weights.clone())

    def _train_call(self, call: Call) -> Tensor:
        learned = [parameter for parameter in self.parameters(recurse=False) if parameter.requires_grad]
        read, slopes_K, slopes = self._slopes(call.signals, learned)
        finite = both(call.signals.finite, all_finite(slopes_K))
        weights_K = self._note(self._move(call.signals, slopes_K, finite), finite)
        if not is_true(finite):
            slopes = [torch.where(finite, slope, 0.0) for slope in slopes]
        value = read
        if not known_finite(read):
            value = torch.where(torch.isfinite(read), read, call.value(weights_K))
        return with_slopes(value, [*call.slopes(weights_K), *zip(learned, slopes, strict=True)])

    def _slopes(self, signals: Signals, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return f of the losses that were read, and its slopes by them and by the method's own parameters."""
        losses_K = choose(signals.present_K, signals.losses_K, 1.0).detach().requires_grad_()
        with torch.enable_grad():
            objective = self.objective(losses_K, signals.present_K)
            slopes_K, *slopes = torch.autograd.grad(objective, [losses_K, *learned])
        return objective.detach(), slopes_K, slopes

    def _move(self, signals: Signals, slopes_K: Tensor, finite: Tensor) -> Tensor:
        """Remember good slopes, let the method observe the losses, and return what is to be applied."""
        moves_K = moving(signals.present_K, finite)
        slopes_K = choose(moves_K, slopes_K.to(self.last_weights), self.last_weights)
        self.last_weights.copy_(slopes_K)
        self.observe(Signals(signals.losses_K, signals.present_K, None, finite))
        return self.current_weights(signals.present_K)

    def _eval_call(self, losses: dict[int, Tensor], present_K: Tensor) -> Tensor:
        device = self.last_weights.device
        one = torch.ones((), device=device)
        losses_K = torch.stack([losses.get(index, one).to(device) for index in range(len(self.tasks))])
        return self.objective(losses_K, present_K)
