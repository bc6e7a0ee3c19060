"""The base of methods that read task gradients: when they are measured, and how they are delivered."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Balancer, Call, Reads, Sync
from mtlbalance.balancers.batched import batched_gradients
from mtlbalance.balancers.checks import integer, one_of
from mtlbalance.balancers.delivery import GradientSum
from mtlbalance.balancers.ghost import Layer, ghost_layers
from mtlbalance.balancers.graph import (
    Reach,
    casts_to_half,
    come_for_free,
    has_static_graph,
    obstacle_to_direct_delivery,
    reached,
    reaches,
    trace,
)
from mtlbalance.balancers.one_at_a_time import OneAtATime
from mtlbalance.balancers.presence import all_finite, both
from mtlbalance.balancers.probe import Plan, Probe
from mtlbalance.balancers.probe_scale import ProbeScale, autocast_dtype
from mtlbalance.balancers.ranks import GradientMeans
from mtlbalance.balancers.shared import (
    discover_shared,
    hidden_heads,
    list_shared,
    missing_shared,
    unrelated_shared,
)
from mtlbalance.balancers.signals import (
    Gradients,
    Signals,
    as_if_unseen,
    gradient_norm,
    gradient_norms,
    require_differentiable,
    require_related,
    task_gradients,
)
from mtlbalance.errors import InvalidArgumentError, SharedParametersError

Delivery = Literal["auto", "direct", "weighted_sum", "low_memory", "batched"]

_HALF_CHECK_EVERY = 100  # probes between looks for float16 in the graph, where autocast does not tell


class GradientBalancer(Balancer):
    """Base of balancers that weigh tasks by their gradients on the shared tensors.

    **Delivery.** *Direct* makes K trunk passes: the task gradients that were measured, weighted and summed,
    are what ``backward()`` hands over. *Weighted sum* probes (K passes, only down to the shared tensors) and
    then differentiates Σ w_k·L_k once more. ``"auto"`` delivers directly when a pass down to the shared tensors
    covers everything that two tasks share, and by weighted sum otherwise (a suffix of the trunk).

    Hooks registered on parameters, or on the representations that are read, run once, on the gradient that is
    delivered; what is read is the gradient before them. Hooks on other activations, and ``retain_grad()`` there,
    see each task's gradient in turn; where they must see the weighted sum, pass ``delivery="weighted_sum"``.
    Activation checkpointing needs ``use_reentrant=False``, and recomputes once a probe; representations avoid that.
    Of a module compiled by ``torch.compile``, K passes need ``torch._functorch.config.donated_buffer = False``.

    On one rank and a CPU, the float32 weights of linear layers that are wide for their number of rows N (batch × time)
    are measured by K gradients of (N, d_out) and one product, exact to rounding. Their inputs must not be changed in
    place before ``backward()``, and hooks on the layers' own graph nodes cannot change their weights' gradients.

    Args:
        tasks: K >= 1 unique task names.
        update_every: measure on the first call after warm-up and then on every N-th (>= 1); between, the
            weights are reused and a call costs one pass. A task is measured in such calls only, so with tasks
            that alternate in step with N, choose another N. Default 1.
        delivery: ``"auto"``, ``"direct"``, ``"weighted_sum"``, or ``"low_memory"``: by weighted sum, and of the
            measured gradients one task's (norms) or two tasks' (Gramians) are held at a time, not K. Norms take
            K + 1 passes, Gramians K(K + 1)/2. ``"batched"``: as ``"auto"``, but what tasks share is passed once for all
            of them (vmap): slower on a CPU, for GPUs that a small model's kernels do not fill; not measured there yet.
            cuDNN's recurrent layers and compiled modules have no rule for it, which is an error.
        sync: over ranks. ``"gradients"`` averages each task's gradients before they are read, so that N ranks
            weigh as one; ``"norms"`` averages the ranks' own norms, a cheap approximation; ``"none"`` nothing.
        process_group: the ranks to agree with; None: the default group.
    """

    reads: ClassVar[Reads] = "gradient norms"
    weighted_heads: ClassVar[str] = "pass scale_heads=True"  # how to have heads weighted, if they are not
    passes: ClassVar[str] = "K"
    extra_memory: ClassVar[str] = "K"
    reads_products: ClassVar[bool] = (
        True  # whether norms and inner products are all it reads of task gradients
    )
    warmup_steps: int = 0
    _unsaved_counters: ClassVar[tuple[str, ...]] = ("_probes",)

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
        self.probe_scale = ProbeScale(len(self.tasks))
        self._in_half = False  # whether float16 lies in the graphs; looked up now and then until it is found
        self._probes = 0
        self._discovered: list[Tensor] = []  # by the last call that had all tasks, for calls that have some
        self.delivery = one_of(delivery, "delivery", get_args(Delivery))

    def measures_now(self) -> bool:
        """Return whether the next call measures: every N-th, counted from the end of warm-up."""
        return (self.calls - self.warmup_steps) % self.update_every == 0

    def phase(self) -> tuple[Hashable, ...]:
        """Return whether the next call measures."""
        return (*super().phase(), self.measures_now())

    def obstacle_to_graphs(self) -> str:
        """Say why a call cannot be captured: also where float16 is in play, whose GradScaler decides on the host."""
        in_half = "float16 is in play, and its GradScaler decides on the host; use bfloat16"
        return super().obstacle_to_graphs() or (in_half if self._in_half else "")

    def _train_call(self, call: Call) -> Tensor:
        if call.shared_params is None and call.model is None:
            raise missing_shared(self.get_name())
        if self.calls == 0:
            _refuse_static_graph(call)
        if isinstance(call.shared_params, Iterator):  # it may be read twice
            call = call._replace(shared_params=list(call.shared_params))
        if (
            call.shared_params is None
            and len(call.losses) == 1
            and call.ranks is None
            and not self._discovered
        ):
            return super()._train_call(call)  # one task and nothing known to be shared: nothing to balance
        if not self.measures_now():
            if self.calls == 0:
                self._check_shared(call)
            return self._by_weighted_sum(call)
        return self._measured_call(call)

    def _measured_call(self, call: Call) -> Tensor:
        """Measure, weigh and deliver."""
        plan = self._plan(call, self._shared(call))
        if self.delivery == "low_memory":
            return self._by_weighted_sum(call._replace(signals=self._read_one_at_a_time(call, plan)))
        probe = self._probe(call, plan)
        signals = self._read(call, probe)
        if not plan.direct:
            return self._by_weighted_sum(call._replace(signals=signals))
        return self._deliver(call, probe, self._apply_weights(signals))

    def _read(self, call: Call, probe: Probe) -> Signals:
        """Turn what was probed into what the method weighs."""
        norms_K = self._norms(call, probe)
        return call.signals._replace(grad_norms_K=norms_K, finite=self._finite(call, probe, norms_K))

    def _read_one_at_a_time(self, call: Call, plan: Plan) -> Signals:
        """Turn gradients that are not kept into what the method weighs."""
        scales_K = self._scales(call, plan.shared)

        def differentiate(task: int) -> Gradients:
            with as_if_unseen(plan.shared):
                return self._differentiate(call, plan, scales_K, task)[0]

        averages = call.ranks is not None and self.sync == "gradients"
        rows = OneAtATime(call, plan, differentiate, averages=averages)
        return self._read_rows(call, Probe(plan, scales_K, {}, [], {}), rows)

    def _read_rows(self, call: Call, probe: Probe, rows: OneAtATime) -> Signals:
        leaf_K, features_K = (probe.unscaled(norms_K) for norms_K in rows.norms())
        if call.ranks is not None and call.counts_K is not None and self.sync == "gradients":
            features_K = call.ranks.combine_feature_norms(features_K, call.counts_K)
        norms_K = torch.hypot(leaf_K, features_K)
        if call.ranks is not None and call.counts_K is not None and self.sync == "norms":
            norms_K = call.ranks.mean_norms(norms_K, call.counts_K)
        return call.signals._replace(grad_norms_K=norms_K, finite=self._finite(call, probe, norms_K))

    def _finite(self, call: Call, probe: Probe, measured_K: Tensor) -> Tensor:
        """Return whether losses and what was measured are finite, and let the probe scale learn from it."""
        if probe.scales_K is None:
            return both(call.signals.finite, all_finite(measured_K))
        overflowed_K = ~torch.isfinite(measured_K) | _overflowed(call, probe.unread())
        self.probe_scale.update(call.signals.present_K & call.signals.finite, overflowed_K)
        return both(call.signals.finite, ~overflowed_K.any())

    def _by_weighted_sum(self, call: Call) -> Tensor:
        weights_K = self._apply_weights(call.signals)
        total = self._weighted_sum(call, weights_K)
        return total if self.scale_heads else total + self._unscaled_heads(call, weights_K)

    # ------------------------------------------------------------------ what is shared
    def _shared(self, call: Call) -> list[Tensor]:
        for index, loss in call.losses.items():
            require_differentiable(self.tasks[index], loss)
        if call.shared_params is not None:
            return list_shared(call.shared_params)
        assert call.model is not None
        losses = {self.tasks[index]: loss for index, loss in call.losses.items()}
        if len(losses) == len(self.tasks):
            self._discovered = discover_shared(losses, call.model)
        elif not self._discovered and call.ranks is not None:
            raise SharedParametersError(
                f"only {', '.join(map(repr, losses))} has a loss in this call of this rank, so what the tasks share "
                "cannot be discovered from model= alike on all ranks; pass shared_params"
            )
        return list_shared(self._discovered) if self._discovered else discover_shared(losses, call.model)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model's parameters out of copies and pickles of the balancer."""
        return super().__getstate__() | {"_discovered": []}  # type: ignore[no-untyped-call,no-any-return]

    def _check_shared(self, call: Call) -> None:
        """Find at the first call what would otherwise only show when gradients are first measured."""
        shared = self._shared(call)
        for index, loss in call.losses.items():
            if not reaches(loss, shared):
                raise unrelated_shared(self.tasks[index], shared)

    def _plan(self, call: Call, shared: list[Tensor]) -> Plan:
        """Decide on the delivery, and list what direct delivery must cover beside ``shared``."""
        if self.delivery in ("weighted_sum", "low_memory"):
            return self._plan_by_weighted_sum(call, shared)
        losses = [*call.losses.values(), *call.zeros]
        reach = trace(losses, shared)
        if reach.opaque and not self.scale_heads:
            raise hidden_heads(self.weighted_heads)
        if self.delivery != "direct" and reach.several and not come_for_free(reach.several, losses, shared):
            return self._plan_by_weighted_sum(call, shared, reach)
        own = dict(zip(call.losses, reach.own, strict=False))  # those of the zeros come last
        others = [*reach.several, *(tensor for tensors in reach.own for tensor in tensors)]
        obstacle = obstacle_to_direct_delivery(shared, others)
        if obstacle and self.delivery == "direct":
            raise InvalidArgumentError(f"delivery='direct' is not possible: {obstacle}; use delivery='auto'")
        if obstacle:
            return self._plan_by_weighted_sum(call, shared, reach)
        waiting = reached(call.zeros, [*shared, *others]) if call.zeros else []
        layers = self._layers(call, shared, reach)
        return Plan(shared, reach.several, own, waiting, direct=True, layers=layers)

    def _plan_by_weighted_sum(self, call: Call, shared: list[Tensor], reach: Reach | None = None) -> Plan:
        own: dict[int, list[Tensor]] = {index: [] for index in call.losses}
        return Plan(shared, [], own, [], direct=False, layers=self._layers(call, shared, reach))

    def _layers(self, call: Call, shared: list[Tensor], reach: Reach | None) -> dict[int, Layer]:
        """Return the layers whose weight gradients are kept as factors."""
        if not self.reads_products or self.delivery in ("low_memory", "batched") or call.ranks is not None:
            return {}  # ranks average the gradients themselves
        return ghost_layers(shared, list(call.losses.values()), None if reach is None else reach.products)

    # ------------------------------------------------------------------ measuring
    def _probe(self, call: Call, plan: Plan) -> Probe:
        columns = [*plan.shared, *plan.several]
        rows: dict[int, Gradients] = {}
        of_own: dict[int, Gradients] = {}
        scales_K = self._scales(call, plan.shared)
        averaged = [False] * len(columns)
        leaves: list[int] = []
        means: GradientMeans | None = None
        if call.ranks is not None and call.counts_K is not None and self.sync == "gradients":
            leaves = [column for column, tensor in enumerate(plan.shared) if tensor.is_leaf]
            means = GradientMeans(call.ranks, [plan.shared[column] for column in leaves], call.counts_K)
        with as_if_unseen(plan.all()):
            leaves_alone = all(tensor.is_leaf for tensor in plan.shared)  # else only heads are passed
            if self.delivery == "batched" and leaves_alone and len(call.losses) > 1:
                rows, of_own = batched_gradients(call, plan, scales_K, self.tasks)
            for index in call.losses if means is None else range(len(self.tasks)):
                if index in call.losses and index not in rows:
                    rows[index], of_own[index] = self._differentiate(call, plan, scales_K, index)
                if means is not None:
                    means.add(_taken_from(rows[index], leaves) if index in rows else None)
        if means is not None:
            for index, mean in means.finish().items():
                row = rows.setdefault(index, [None] * len(columns))
                for column, gradient in zip(leaves, mean, strict=True):
                    row[column] = gradient
                    averaged[column] = True
        return Probe(plan, scales_K, rows, averaged, of_own)

    def _differentiate(
        self, call: Call, plan: Plan, scales_K: Tensor | None, index: int
    ) -> tuple[Gradients, Gradients]:
        """Return one task's gradients of ``plan.shared`` and ``plan.several``, and those of its own leaves."""
        width = len(plan.shared) + len(plan.several)
        loss = call.losses[index]
        keep_graph = call.retain_graph or not plan.direct or index != next(reversed(call.losses))
        scaled = loss if scales_K is None else loss * scales_K[index]
        gradients = task_gradients(scaled, plan.ends_of(index), retain_graph=keep_graph)
        require_related(self.tasks[index], gradients, plan.shared)
        return gradients[:width], gradients[width:]

    def _scales(self, call: Call, shared: list[Tensor]) -> Tensor | None:
        """Return the scales to probe with where float16 is in play, else None."""
        device_type = call.losses_K.device.type
        if not self._in_half and self._probes % _HALF_CHECK_EVERY == 0:
            in_shared = any(tensor.dtype == torch.float16 for tensor in shared)
            self._in_half = in_shared or casts_to_half([*call.losses.values(), *call.zeros])
        self._probes += 1
        if not self._in_half and autocast_dtype(device_type) == torch.float16:
            self._in_half = True
        return self.probe_scale.scales(call.signals.losses_K) if self._in_half else None

    def _norms(self, call: Call, probe: Probe) -> Tensor:
        device, count = call.losses_K.device, len(self.tasks)

        def norms_of(averaged: bool | None) -> Tensor:
            return probe.unscaled(gradient_norms(probe.read(count, averaged=averaged), device))

        if call.ranks is None or call.counts_K is None:
            return norms_of(None)
        if self.sync == "norms":
            return call.ranks.mean_norms(norms_of(None), call.counts_K)
        if all(tensor.is_leaf for tensor in probe.plan.shared):
            return norms_of(None)
        features_K = call.ranks.combine_feature_norms(norms_of(False), call.counts_K)
        return torch.hypot(norms_of(True), features_K)

    # ------------------------------------------------------------------ handing over
    def _deliver(self, call: Call, probe: Probe, weights_K: Tensor) -> Tensor:
        plan = probe.plan
        local_K = probe.unscaled(call.local_weights(weights_K))
        averaged_K = local_K if call.ranks is None else probe.unscaled(weights_K)
        ones_K = None if self.scale_heads else torch.ones_like(weights_K)
        heads_K = local_K if ones_K is None else probe.unscaled(call.local_weights(ones_K))
        columns = [*plan.shared, *plan.several]
        total = GradientSum()
        positions = total.positions(columns)
        for is_averaged, columns_K in ((True, averaged_K), (False, local_K)):
            chosen = [column for column, done in enumerate(probe.averaged) if done is is_averaged]
            if chosen:
                places = [positions[column] for column in chosen]
                for index, row in probe.rows.items():
                    total.add(places, [row[column] for column in chosen], columns_K, index)
        for index, gradients in probe.of_own.items():
            total.add(total.positions(plan.own[index]), gradients, heads_K, index)
        for column, layer in plan.layers.items():
            total.through(columns[column], layer.inputs)
        total.reach(plan.waiting)
        return total.deliver(self._value(call, weights_K), keep=call.retain_graph)

    def _unscaled_heads(self, call: Call, weights_K: Tensor) -> Tensor:
        """Return a zero whose backward pass adds (1 − w_k)·∂L_k to each head, to make up for the weighted sum."""
        shared = self._shared(call)
        reach = trace([*call.losses.values(), *call.zeros], shared)
        if reach.opaque:
            raise hidden_heads(self.weighted_heads)
        given_K = self._scales(call, shared)
        scales_K = torch.ones_like(weights_K) if given_K is None else given_K
        missing_K = call.local_weights(1.0 - weights_K) / scales_K
        of_own: dict[int, Gradients] = {}
        total = GradientSum()
        for (index, loss), leaves in zip(call.losses.items(), reach.own, strict=False):
            if leaves:
                with as_if_unseen(leaves):
                    of_own[index] = task_gradients(loss * scales_K[index], leaves, retain_graph=True)
                total.add(total.positions(leaves), of_own[index], missing_K, index)
        if given_K is not None:
            overflowed_K = _overflowed(call, of_own) & call.signals.finite
            self.probe_scale.update(overflowed_K, overflowed_K)  # the scale grows by measured calls alone
        return total.deliver(torch.zeros_like(call.losses_K[0]), keep=call.retain_graph)


def _taken_from(row: Gradients, columns: Sequence[int]) -> Gradients:
    """Return the gradients at some columns, which the row then lacks: they are not to be held twice."""
    taken = [row[column] for column in columns]
    for column in columns:
        row[column] = None
    return taken


def _overflowed(call: Call, gradients: Mapping[int, Gradients]) -> Tensor:
    """Return (K,) whether some rank has a gradient among these, scaled for float16, that is not finite."""
    device = call.losses_K.device
    overflowed_K = torch.zeros_like(call.losses_K)
    for index, found in gradients.items():
        overflowed_K[index] = ~torch.isfinite(gradient_norm(found, device))
    if call.ranks is not None:
        overflowed_K = call.ranks.sum(overflowed_K)
    return overflowed_K > 0


def _refuse_static_graph(call: Call) -> None:
    """Raise for DDP with a static graph, whose ranks would drift: a probe outside its forward goes unseen."""
    wrapped = isinstance(call.model, nn.parallel.DistributedDataParallel) and call.model.static_graph
    if wrapped or has_static_graph(call.losses.values()):
        raise SharedParametersError(
            "DistributedDataParallel(static_graph=True) does not see gradients probed outside its forward pass, so "
            "ranks would drift apart; build it with static_graph=False"
        )
