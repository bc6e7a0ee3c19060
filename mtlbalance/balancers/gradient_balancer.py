"""The base of methods that read task gradients: when they are measured, and how they are delivered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Balancer, Call, Sync
from mtlbalance.balancers.checks import integer, one_of
from mtlbalance.balancers.delivery import GradientSum
from mtlbalance.balancers.graph import come_for_free, obstacle_to_direct_delivery, reaches, trace
from mtlbalance.balancers.shared import discover_shared, list_shared, missing_shared, unrelated_shared
from mtlbalance.balancers.signals import (
    Gradients,
    gradient_norm,
    require_differentiable,
    require_related,
    task_gradients,
)
from mtlbalance.errors import InvalidArgumentError, SharedParametersError

Delivery = Literal["auto", "direct", "weighted_sum"]


@dataclass(frozen=True)
class Probe:
    """The gradients measured in one call.

    Args:
        shared: the shared tensors, in the order of the gradients.
        of_shared: task index -> gradients of ``shared``; after averaging over ranks, for every task.
        averaged: for each shared tensor, whether its gradients are averaged over ranks already.
        others: for each present task, the tensors delivered beside the shared ones (its head).
        of_others: for each present task, their gradients.
    """

    shared: list[Tensor]
    of_shared: dict[int, Gradients]
    averaged: list[bool]
    others: dict[int, list[Tensor]]
    of_others: dict[int, Gradients]


class GradientBalancer(Balancer):
    """Base of balancers that weigh tasks by their gradients on the shared tensors.

    **Delivery.** *Direct* makes K trunk passes: the task gradients that were measured, weighted and summed,
    are what ``backward()`` hands over. *Weighted sum* probes (K passes, only down to the shared tensors) and
    then differentiates Σ w_k·L_k once more. ``"auto"`` delivers directly when a pass down to the shared tensors
    covers everything that two tasks share, and by weighted sum otherwise (a suffix of the trunk, tensor hooks).

    Args:
        tasks: K >= 1 unique task names.
        update_every: measure on the first call after warm-up and then on every N-th (>= 1); between, the
            smoothed weights are reused and a call costs one pass. Default 1.
        delivery: ``"auto"``, ``"direct"`` or ``"weighted_sum"``.
        sync: over ranks. ``"gradients"`` averages each task's gradients before they are read, so that N ranks
            weigh as one; ``"norms"`` averages the ranks' own norms, a cheap approximation; ``"none"`` nothing.
        process_group: the ranks to agree with; None: the default group.
    """

    reads: ClassVar[Literal["nothing", "losses", "gradient norms"]] = "gradient norms"
    warmup_steps: int = 0

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.update_every = integer(update_every, "update_every", 1)
        self.delivery = one_of(delivery, "delivery", ("auto", "direct", "weighted_sum"))

    def measures_now(self) -> bool:
        """Return whether the next call measures: every N-th, counted from the end of warm-up."""
        return (self.calls - self.warmup_steps) % self.update_every == 0

    def _train_call(self, call: Call) -> Tensor:
        if call.shared_params is None and call.model is None:
            raise missing_shared(self.get_name())
        _require_dynamic_ddp(call.model)
        if not self.measures_now():
            if self.calls == 0:
                self._check_shared(call)
            return super()._train_call(call)
        shared = self._shared(call)
        direct, others = self._plan(call, shared)
        probe = self._probe(call, shared, others, keep_graph=call.retain_graph or not direct)
        norms_K = self._norms(call, probe)
        finite = call.signals.finite & torch.isfinite(norms_K).all()
        signals = replace(call.signals, grad_norms_K=norms_K, finite=finite)
        if not direct:
            return super()._train_call(replace(call, signals=signals))
        weights_K = self._apply_weights(signals)
        return self._deliver(call, probe, weights_K)

    # ------------------------------------------------------------------ what is shared
    def _shared(self, call: Call) -> list[Tensor]:
        for index, loss in call.losses.items():
            require_differentiable(self.tasks[index], loss)
        if call.shared_params is not None:
            return list_shared(call.shared_params)
        assert call.model is not None
        losses = {self.tasks[index]: loss for index, loss in call.losses.items()}
        if len(losses) < len(self.tasks) and (call.ranks is not None or len(losses) < 2):
            raise SharedParametersError(
                f"only {', '.join(map(repr, losses))} has a loss in this call, so what the tasks share cannot be "
                "discovered from model=; pass shared_params"
            )
        return discover_shared(losses, call.model) if len(losses) > 1 else list_shared(call.model)

    def _check_shared(self, call: Call) -> None:
        """Find at the first call what would otherwise only show when gradients are first measured."""
        shared = self._shared(call)
        for index, loss in call.losses.items():
            if not reaches(loss, shared):
                raise unrelated_shared(self.tasks[index], shared)

    def _plan(self, call: Call, shared: list[Tensor]) -> tuple[bool, dict[int, list[Tensor]]]:
        """Decide on the delivery, and list for each task what direct delivery must cover beside ``shared``."""
        nothing: dict[int, list[Tensor]] = {index: [] for index in call.losses}
        if self.delivery == "weighted_sum":
            return False, nothing
        losses = list(call.losses.values())
        reach = trace(losses, shared)
        if self.delivery == "auto" and reach.several and not come_for_free(reach.several, losses, shared):
            return False, nothing
        others = {index: own + reach.several for index, own in zip(call.losses, reach.own, strict=True)}
        obstacle = obstacle_to_direct_delivery(shared, [tensor for own in others.values() for tensor in own])
        if obstacle and self.delivery == "direct":
            raise InvalidArgumentError(f"delivery='direct' is not possible: {obstacle}; use delivery='auto'")
        return (False, nothing) if obstacle else (True, others)

    # ------------------------------------------------------------------ measuring
    def _probe(
        self, call: Call, shared: list[Tensor], others: dict[int, list[Tensor]], keep_graph: bool
    ) -> Probe:
        of_shared: dict[int, Gradients] = {}
        of_others: dict[int, Gradients] = {}
        last = next(reversed(call.losses))
        for index, loss in call.losses.items():
            gradients = task_gradients(
                loss, [*shared, *others[index]], retain_graph=keep_graph or index != last
            )
            require_related(self.tasks[index], gradients, shared)
            of_shared[index], of_others[index] = gradients[: len(shared)], gradients[len(shared) :]
        averaged = [False] * len(shared)
        if call.ranks is not None and call.counts_K is not None and self.sync == "gradients":
            leaves = [position for position, tensor in enumerate(shared) if tensor.is_leaf]
            averaged = [tensor.is_leaf for tensor in shared]
            if leaves:
                local = {index: [row[position] for position in leaves] for index, row in of_shared.items()}
                means = call.ranks.mean_gradients(
                    local, [shared[position] for position in leaves], call.counts_K
                )
                for index, row in means.items():
                    full = of_shared.setdefault(index, [None] * len(shared))
                    for position, gradient in zip(leaves, row, strict=True):
                        full[position] = gradient
        return Probe(shared, of_shared, averaged, others, of_others)

    def _norms(self, call: Call, probe: Probe) -> Tensor:
        device = call.losses_K.device

        def norms_of(chosen: Callable[[bool], bool]) -> Tensor:
            positions = [position for position, averaged in enumerate(probe.averaged) if chosen(averaged)]
            rows = {
                index: [row[position] for position in positions] for index, row in probe.of_shared.items()
            }
            zero = torch.zeros((), device=device)
            return torch.stack(
                [gradient_norm(rows[i], device) if i in rows else zero for i in range(len(self.tasks))]
            )

        if call.ranks is None or call.counts_K is None:
            return norms_of(lambda _: True)
        if self.sync == "norms":
            return call.ranks.mean_norms(norms_of(lambda _: True), call.counts_K)
        norms_K = norms_of(lambda averaged: averaged)
        if not all(probe.averaged):
            features_K = call.ranks.combine_feature_norms(
                norms_of(lambda averaged: not averaged), call.counts_K
            )
            norms_K = torch.hypot(norms_K, features_K)
        return norms_K

    def _deliver(self, call: Call, probe: Probe, weights_K: Tensor) -> Tensor:
        local_K = call.local_weights(weights_K)
        total = GradientSum()
        for index, row in probe.of_shared.items():
            for is_averaged, weights in ((True, weights_K), (False, local_K)):
                chosen = [
                    position for position, averaged in enumerate(probe.averaged) if averaged is is_averaged
                ]
                total.add(
                    [probe.shared[position] for position in chosen],
                    [row[position] for position in chosen],
                    weights[index],
                )
        for index, gradients in probe.of_others.items():
            total.add(probe.others[index], gradients, local_K[index])
        return total.deliver(call.value(weights_K), keep=call.retain_graph)


def _require_dynamic_ddp(model: nn.Module | None) -> None:
    """Raise for DDP with a static graph, whose ranks would drift: a probe outside its forward goes unseen."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
        raise SharedParametersError(
            "DistributedDataParallel(static_graph=True) does not see gradients probed outside its forward pass, so "
            "ranks would drift apart; build it with static_graph=False"
        )
