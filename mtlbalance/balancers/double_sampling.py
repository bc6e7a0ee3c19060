"""The base of methods that step simplex weights by products of the gradients of two independent batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Call, Sync, WeightSum
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer, Indices
from mtlbalance.balancers.layout import Layout
from mtlbalance.balancers.one_at_a_time import OneAtATime
from mtlbalance.balancers.presence import share_of_present
from mtlbalance.balancers.probe import Plan, Probe
from mtlbalance.balancers.products import cross_products
from mtlbalance.balancers.ranks import active_ranks
from mtlbalance.balancers.shared import missing_shared
from mtlbalance.balancers.signals import Signals
from mtlbalance.errors import InvalidArgumentError, SharedParametersError

_SIZE_MEMORY = 0.9  # the old share of the gradient size, a pair


class DoubleSamplingBalancer(GramianBalancer):
    """Base of balancers whose simplex weights w take one stochastic step for each pair of independent batches.

    The step needs A = J₁J₂ᵀ, with the task gradients of two batches at the same parameters as rows. Of one batch,
    J₁J₁ᵀ has the gradient noise squared on its diagonal, in every step: the noisier a task, the smaller its weight.

    **Observe.** ``observe(losses, shared_params=…)`` measures the losses of another batch and delivers nothing. Call
    it twice before the ordinary call, with a fresh batch each time: that is one exact step, and the ordinary call, with
    a third batch, applies its weights in one backward pass. Four times are two steps. An odd one is paired with the
    ordinary call's own batch: still two independent ones, but then weights and delivered gradients have a batch in
    common. Without ``observe`` both factors are the ordinary batch, and ``get_name()`` ends in ``(one batch)`` until
    it is called. ``update_every`` counts only in calls without observed batches.

    Args:
        tasks: K >= 1 unique task names.
        normalise: divide A by the square of the usual gradient size: the mean of ‖g_k‖ over the tasks, averaged over
            the pairs *before* this one, so that the step stays unbiased (the first pair has only its own).
        scale_heads, update_every, delivery, process_group: see ``GramianBalancer``.
        sync: see ``GradientBalancer``; observed gradients are averaged over ranks with ``"norms"``, too.

    Zero gradients: count as the vectors that they are; such a task gains weight as any that is ahead.
    Absent tasks: a step is of the tasks that both batches have, two at least, within what their w sum to; the
    others' w wait. The weights applied share 1 among the tasks of the call.
    A non-finite observed batch is counted in ``num_nonfinite`` and forgotten.

    State: ``solved_weights`` is w (K,); ``pending_gradients`` (K, P) of an observed batch that waits for its pair, for
    P shared numbers, (K, 0) without one; ``pending_present`` (K,); ``gradient_size``; how many batches were observed,
    and how many since the last call; that of ``GramianBalancer``.

    Cost: K trunk passes an observed batch, K copies of the trunk's gradients until it is paired, K×K numbers to the
    host a pair. An ordinary call costs one trunk pass if its step was observed, and K else.

    Raises:
        SharedParametersError: ``observe`` is given representations, whose gradients are of other samples in each batch;
            or the second batch of a pair has other shared parameters than the first.
    """

    weight_sum: ClassVar[WeightSum] = "1"
    reads_products: ClassVar[bool] = False  # those of two batches
    _counters: ClassVar[tuple[str, ...]] = ("calls", "observed", "observed_since_call")

    pending_gradients: Tensor
    pending_present: Tensor
    gradient_size: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        normalise: bool,
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
        self.normalise = bool(normalise)
        self.observed = 0
        self.observed_since_call = 0
        self.register_buffer("pending_gradients", torch.zeros(len(self.tasks), 0))
        self.register_buffer("pending_present", torch.zeros(len(self.tasks), dtype=torch.bool))
        self.register_buffer("gradient_size", torch.zeros(()))

    @abstractmethod
    def step(self, tasks: Indices, weights: Array, products: Array) -> Array:
        """Return the simplex weights of the P tasks with these indices after a step by their (P, P) J₁J₂ᵀ."""

    def solve(self, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return w of the first P tasks after one step from equal ones, both factors of one batch."""
        count = len(gramian)
        return self.step(np.arange(count), np.full(count, 1.0 / count), gramian)

    def get_name(self) -> str:
        """Return the method's name, with ``(one batch)`` while ``observe`` has not been called."""
        return self.method if self.observed else f"{self.method}(one batch)"

    # ------------------------------------------------------------------ another batch
    def observe(
        self,
        *losses: Mapping[str, Tensor | None] | Tensor | None,
        shared_params: Any = None,
        model: nn.Module | None = None,
        sample_weights: Mapping[str, Tensor] | None = None,
        retain_graph: bool = False,
        **context: Any,
    ) -> None:
        """Measure the losses of another, independent batch at the same parameters, given as in the call itself.

        Their graph is consumed, nothing is delivered, no ``.grad`` is touched. In ``eval()``, or without gradients, the
        call does nothing.
        """
        if not (self.training and torch.is_grad_enabled()):
            return
        ranks = active_ranks(self.process_group)
        reduced, zeros = self._reduce(losses, sample_weights, context, several_ranks=ranks is not None)
        if shared_params is None and model is None:
            raise missing_shared(f"{self.method}.observe")
        if isinstance(shared_params, Iterator):
            shared_params = list(shared_params)
        stacked = self._stack(reduced, zeros)
        call = self._digest(reduced, *stacked, zeros, ranks, shared_params, model, retain_graph)
        if not bool(call.signals.present_K.any()):
            return
        if self.delivery == "low_memory":
            raise self._holds_gradients()
        shared = self._shared(call)
        self._require_parameters(shared)
        probe = self._probe(call, Plan(shared, [], {index: [] for index in reduced}, [], direct=True))
        gradients_KP = self._flat(call, probe)
        norms_K = torch.linalg.vector_norm(gradients_KP, dim=1)
        finite = self._finite(call, probe, norms_K)
        self.observed += 1
        self.observed_since_call += 1
        self.nonfinite_calls += (~finite).to(torch.int64)
        if bool(finite):
            present_K = call.signals.present_K
            self._note_norms(norms_K, present_K)
            if self._has_pending():
                self._pair(self._products(gradients_KP), norms_K, present_K)
            else:
                self.pending_gradients = gradients_KP
                self.pending_present.copy_(present_K)
        self._warn_nonfinite()

    def _has_pending(self) -> bool:
        return self.pending_gradients.shape[1] > 0

    def _forget_pending(self) -> None:
        self.pending_gradients = self.pending_gradients.new_zeros(len(self.tasks), 0)
        self.pending_present.fill_(False)

    def _require_parameters(self, shared: Sequence[Tensor]) -> None:
        if not all(tensor.is_leaf for tensor in shared):
            raise SharedParametersError(
                f"{self.method} multiplies the gradients of two batches, so with observe() shared_params must hold "
                "parameters in every call, not representations: those are of other samples in each batch"
            )

    def _shared(self, call: Call) -> list[Tensor]:
        shared = super()._shared(call)
        if self._has_pending():
            self._require_parameters(shared)
        return shared

    def _flat(self, call: Call, probe: Probe) -> Tensor:
        """Return the (K, P) gradients of the shared parameters, averaged over ranks; zeros where a task is absent."""
        layout = Layout(probe.plan.shared, call.losses_K.device)
        flat_KP = torch.zeros(len(self.tasks), layout.size, dtype=layout.dtype, device=layout.device)
        for row_P, row in zip(flat_KP, probe.read(len(self.tasks)), strict=True):
            if row:
                row_P.copy_(layout.flatten(row))
        if probe.scales_K is not None:
            flat_KP /= probe.scales_K.to(flat_KP)[:, None]
        if call.ranks is not None and call.counts_K is not None and not all(probe.averaged):
            call.ranks.sum(flat_KP)
            flat_KP /= call.counts_K.clamp(min=1.0).to(flat_KP)[:, None]
        return flat_KP

    def _products(self, gradients_KP: Tensor) -> Tensor:
        """Return J₁J₂ᵀ with the pending gradients as J₁."""
        if self.pending_gradients.shape != gradients_KP.shape:
            raise SharedParametersError(
                f"{self.method} observed gradients of {self.pending_gradients.shape[1]} shared numbers, but "
                f"shared_params now holds {gradients_KP.shape[1]}; pass the same parameters in every call"
            )
        return cross_products(self.pending_gradients, gradients_KP)

    # ------------------------------------------------------------------ the ordinary call
    def measures_now(self) -> bool:
        """Return whether the next call measures: where a batch waits for its pair, or none was observed."""
        return self._has_pending() or (self.observed_since_call == 0 and super().measures_now())

    def _read(self, call: Call, probe: Probe) -> Signals:
        signals = super()._read(call, probe)
        assert signals.gramian_KK is not None
        if not self._has_pending():
            return signals._replace(grad_norms_K=signals.gramian_KK.diagonal().sqrt())
        own_KP = self._flat(call, probe)
        norms_K = torch.linalg.vector_norm(own_KP, dim=1)
        return signals._replace(gramian_KK=self._products(own_KP), grad_norms_K=norms_K)

    def _read_rows(self, call: Call, probe: Probe, rows: OneAtATime) -> Signals:
        if self._has_pending():
            raise self._holds_gradients()
        signals = super()._read_rows(call, probe, rows)
        assert signals.gramian_KK is not None
        return signals._replace(grad_norms_K=signals.gramian_KK.diagonal().sqrt())

    def _holds_gradients(self) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{self.method} multiplies the gradients of two batches, so it holds those of the first; with "
            "delivery='low_memory' it cannot observe() one"
        )

    def weigh(self, signals: Signals) -> Tensor:
        """Step w by what was measured, if anything, and apply it."""
        norms_K = signals.grad_norms_K
        if signals.gramian_KK is None or norms_K is None:
            self._forget_pending()  # the optimizer's step will make it stale
        elif bool(signals.finite):
            self._note_norms(norms_K, signals.present_K)
            self._pair(signals.gramian_KK, norms_K, signals.present_K)
        self.observed_since_call = 0
        return self.current_weights(signals.present_K)

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return w of the present tasks, as shares of 1."""
        return share_of_present(self.solved_weights, present_K)

    def _note_norms(self, norms_K: Tensor, present_K: Tensor) -> None:
        self.grad_norms.copy_(torch.where(present_K, norms_K.to(self.grad_norms), self.grad_norms))

    def _pair(self, products_KK: Tensor, norms_K: Tensor, present_K: Tensor) -> None:
        """Step w by the products of the pending gradients, or else this batch's own, with this batch's."""
        first_K = norms_K
        if self._has_pending():
            first_K = torch.linalg.vector_norm(self.pending_gradients, dim=1)
            present_K = present_K & self.pending_present
            self._forget_pending()
        tasks = np.flatnonzero(present_K.cpu().numpy())
        if len(tasks) < 2:
            return  # nothing to balance
        products = products_KK.double().cpu().numpy()[np.ix_(tasks, tasks)]
        norms = torch.stack([first_K, norms_K.to(first_K)]).double().cpu().numpy()[:, tasks]
        weights = self.solved_weights.double().cpu().numpy()
        share = weights[tasks].sum()
        before = weights[tasks] / share if share > 0 else np.full(len(tasks), 1.0 / len(tasks))
        weights[tasks] = share * self.step(tasks, before, self._normalised(products, norms))
        self.solved_weights.copy_(torch.from_numpy(weights))

    def _normalised(self, products: Array, norms: Array) -> Array:
        """Return the products over the square of the usual gradient size, and move that by this pair's norms."""
        if not self.normalise:
            return products
        square = float(np.prod(norms.mean(axis=1)))
        usual = float(self.gradient_size) ** 2
        if usual == 0:  # none yet
            usual = square
        self.gradient_size.fill_(np.sqrt(_SIZE_MEMORY * usual + (1.0 - _SIZE_MEMORY) * square))
        return products / usual if usual > 0 else products

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "pending_gradients")
        if saved is not None and saved.dim() == 2 and len(saved) == len(self.tasks):
            self.pending_gradients = saved.new_zeros(saved.shape, device=self.pending_gradients.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
