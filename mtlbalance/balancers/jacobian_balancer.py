"""The base of methods that combine the task gradients themselves, rather than weigh tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Call, Delivers, Reads, Sync, WeightSum
from mtlbalance.balancers.delivery import GradientSum
from mtlbalance.balancers.gradient_balancer import GradientBalancer
from mtlbalance.balancers.graph import obstacle_to_direct_delivery, reached, trace
from mtlbalance.balancers.layout import Layout
from mtlbalance.balancers.probe import Plan, Probe
from mtlbalance.balancers.shared import hidden_heads, not_all_shared
from mtlbalance.balancers.signals import Signals, as_if_unseen
from mtlbalance.errors import SharedParametersError


class Combination(ABC):
    """What one call makes of the task gradients, which it is given one after another, each as a flat vector.

    So a method holds no more of them than it needs: two sums for one that looks at signs, not K gradients.
    """

    @abstractmethod
    def add(self, task: int, gradient_P: Tensor) -> None:
        """Take one task's gradient, to keep or to change in place.

        Tasks come in order. Over ranks, one that another rank has comes too, and one that nobody has as zeros.
        """

    @abstractmethod
    def combine(self, signals: Signals) -> Tensor:
        """Move the method's state by one call, and return the (P,) combination; called once, last.

        Where ``signals.finite`` is False the state stays as it is and Σ w_k·g_k is returned, with the current
        weights: a combination might hide what is not finite from a GradScaler, such a sum does not.
        """


class JacobianBalancer(GradientBalancer):
    """Base of balancers that combine the gradients g_k of K tasks on the shared tensors in a way of their own.

    A subclass gives a `Combination`; this class measures, averages over ranks before anything is combined, keeps
    non-finite gradients out of the state, and hands over the combination to the shared tensors and to each head its
    own gradient. There is no scalar to differentiate for that, so delivery is always direct: ``shared_params`` must
    hold every parameter that two tasks share, or the representations where trunk meets heads. Further tensors that
    several tasks reach and that are no parameters, such as inputs that require a gradient, get the plain sum.
    Hooks on shared tensors run once, on what is delivered. Gradients of sparse embeddings are handed over dense.

    Args:
        tasks: K >= 1 unique task names.
        sync: over ranks. ``"gradients"`` averages each task's gradients before they are combined, so that N ranks
            combine as one; ``"norms"`` combines each rank's own gradients, and agrees on norms and state; ``"none"``
            nothing.
        process_group: the ranks to agree with; None: the default group.

    State: ``grad_norms`` (K,), and the base's.
    """

    reads: ClassVar[Reads] = "jacobian"
    weight_sum: ClassVar[WeightSum] = "none"
    delivers: ClassVar[Delivers] = "combination"
    weighted_heads: ClassVar[str] = "use a method that weighs tasks, heads included"
    scale_heads: bool = False

    grad_norms: Tensor

    def __init__(self, tasks: Sequence[str], *, sync: Sync = "gradients", process_group: Any = None) -> None:
        super().__init__(tasks, delivery="direct", sync=sync, process_group=process_group)
        self.register_buffer("grad_norms", torch.full((len(self.tasks),), torch.nan))

    # ------------------------------------------------------------------ what a method says
    @abstractmethod
    def combination(self, call: Call, layout: Layout) -> Combination:
        """Return what is to take the task gradients of this call."""

    def usable(self, signals: Signals) -> Tensor:
        """Return whether the method can work with this call; ``signals.finite``, and what else it needs."""
        return signals.finite

    def head_weights(self, signals: Signals) -> Tensor:
        """Return (K,) what the gradients of each task's own parameters are multiplied by."""
        return torch.ones_like(signals.losses_K)

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return 1 for the present tasks: what a method without task weights shows and falls back on."""
        return present_K.to(self.applied_weights.dtype)

    def weigh(self, signals: Signals) -> Tensor:
        """Note the norms, and return the current weights."""
        if signals.grad_norms_K is not None:
            moves_K = signals.present_K & signals.finite
            norms_K = signals.grad_norms_K.to(self.grad_norms)
            self.grad_norms.copy_(torch.where(moves_K, norms_K, self.grad_norms))
        return self.current_weights(signals.present_K)

    def _report(self) -> dict[str, Tensor]:
        return {**super()._report(), "grad_norm": self.grad_norms}

    # ------------------------------------------------------------------ the call
    def _apply_weights(self, signals: Signals) -> Tensor:
        return super()._apply_weights(signals._replace(finite=self.usable(signals)))

    def _plan(self, call: Call, shared: list[Tensor]) -> Plan:
        reach = trace([*call.losses.values(), *call.zeros], shared)
        if reach.opaque:
            raise hidden_heads(self.weighted_heads)
        left_out = [leaf for leaf in reach.several if isinstance(leaf, nn.Parameter)]
        if left_out:
            self._check_shared(call)  # what is unrelated altogether has an error of its own
            raise not_all_shared(self.get_name(), left_out)
        others = [*reach.several, *(tensor for tensors in reach.own for tensor in tensors)]
        obstacle = obstacle_to_direct_delivery(shared, others)
        if obstacle:
            raise SharedParametersError(
                f"{self.get_name()} hands over gradients that it combined itself, but {obstacle}; pass the trunk's "
                "parameters, or one representation that everything the tasks share lies below"
            )
        waiting = reached(call.zeros, [*shared, *others]) if call.zeros else []
        own = dict(zip(call.losses, reach.own, strict=False))  # those of the zeros come last
        return Plan(shared, reach.several, own, waiting, direct=True)

    def _measured_call(self, call: Call) -> Tensor:
        plan = self._plan(call, self._shared(call))
        device = call.losses_K.device
        layout = Layout(plan.shared, device)
        probe = Probe(plan, self._scales(call, plan.shared), {}, [False] * len(plan.shared), {})
        with _without_autocast(device):  # what is summed must not lose precision
            combination = self.combination(call, layout)
            norms_K, touched = self._feed(call, probe, layout, combination)
            finite = self._finite(call, probe, norms_K)
            signals = call.signals._replace(grad_norms_K=norms_K, finite=finite)
            signals = signals._replace(finite=self.usable(signals))
            combined_P = combination.combine(signals)
            weights_K = self._apply_weights(signals)
        del combination
        one_K = torch.ones_like(call.losses_K)
        several_K = probe.unscaled(call.local_weights(one_K))
        heads_K = probe.unscaled(call.local_weights(self.head_weights(signals)))
        pairs = zip(layout.tensors, layout.unflatten(combined_P), strict=True)
        parts = [part if call.ranks is not None or id(tensor) in touched else None for tensor, part in pairs]
        total = GradientSum()
        total.add(total.positions(layout.tensors), parts, one_K, 0)
        del combined_P, parts
        for index, row in probe.rows.items():
            total.add(total.positions(plan.several), row[len(plan.shared) :], several_K, index)
            total.add(total.positions(plan.own[index]), probe.of_own[index], heads_K, index)
        total.reach(plan.waiting)
        return total.deliver(self._value(call, weights_K), keep=call.retain_graph)

    def _feed(
        self, call: Call, probe: Probe, layout: Layout, combination: Combination
    ) -> tuple[Tensor, set[int]]:
        """Give the combination each task's gradient in turn; return the (K,) norms, and the ids of what tasks reach."""
        touched: set[int] = set()
        leaf_norms_K = torch.zeros(len(self.tasks), dtype=layout.dtype, device=layout.device)
        feature_norms_K = torch.zeros_like(leaf_norms_K)
        local_K = call.local_weights(torch.ones_like(leaf_norms_K))
        averages = call.ranks is not None and self.sync == "gradients"
        for task in range(len(self.tasks)):
            if task in call.losses:
                gradient_P = self._flat_gradient(call, probe, layout, task, touched)
            elif averages:
                gradient_P = layout.zeros()
            else:
                continue
            leaves_P, features_P = gradient_P[: layout.leaf_size], gradient_P[layout.leaf_size :]
            if averages and call.ranks is not None and call.counts_K is not None:
                call.ranks.mean_gradient(leaves_P, call.counts_K[task])
            leaf_norms_K[task] = torch.linalg.vector_norm(leaves_P)
            feature_norms_K[task] = torch.linalg.vector_norm(features_P)
            if call.ranks is not None:  # this rank's own, which the backward pass will average over all ranks
                (features_P if averages else gradient_P).mul_(local_K[task])
            combination.add(task, gradient_P)
            del gradient_P, leaves_P, features_P  # not to be held while the next is computed
        if call.ranks is None or call.counts_K is None:
            return torch.hypot(leaf_norms_K, feature_norms_K), touched
        if not averages:
            norms_K = torch.hypot(leaf_norms_K, feature_norms_K)
            return call.ranks.mean_norms(norms_K, call.counts_K), touched
        if layout.leaf_size < layout.size:
            feature_norms_K = call.ranks.combine_feature_norms(feature_norms_K, call.counts_K)
        return torch.hypot(leaf_norms_K, feature_norms_K), touched

    def _flat_gradient(
        self, call: Call, probe: Probe, layout: Layout, task: int, touched: set[int]
    ) -> Tensor:
        """Differentiate one loss; what is not of the shared tensors is noted in the probe."""
        width = len(probe.plan.shared)
        with as_if_unseen(probe.plan.all()):
            row, probe.of_own[task] = self._differentiate(call, probe.plan, probe.scales_K, task)
        probe.rows[task] = [*[None] * width, *row[width:]]
        pairs = zip(probe.plan.shared, row, strict=False)
        touched.update(id(tensor) for tensor, gradient in pairs if gradient is not None)
        gradient_P = layout.flatten(row[:width])
        return gradient_P if probe.scales_K is None else gradient_P.div_(probe.scales_K[task])


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
