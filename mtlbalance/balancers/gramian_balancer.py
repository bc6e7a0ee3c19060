"""The base of methods that are a function of the Gramian: they solve a K×K problem for task weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtlbalance.balancers.base import Call, Reads, Sync, WeightSum
from mtlbalance.balancers.gradient_balancer import Delivery, GradientBalancer
from mtlbalance.balancers.one_at_a_time import OneAtATime
from mtlbalance.balancers.presence import all_finite, both, choose, is_everyone, share_of_present
from mtlbalance.balancers.probe import Probe
from mtlbalance.balancers.products import gram_matrix
from mtlbalance.balancers.signals import Signals
from mtlbalance.errors import BalancerError

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


_LARGEST = float(np.finfo(np.float32).max)


def in_float32(weights: Array) -> Array:
    """Return weights that stay finite in float32, as they are kept: one over a norm of 1e-40 would not."""
    return np.clip(weights, -_LARGEST, _LARGEST)


class GramianBalancer(GradientBalancer):
    """Base of balancers whose weights w make Σ w_k·g_k, and depend on the task gradients only through G = JJᵀ.

    A subclass implements `solve` on float64 NumPy arrays of the present tasks; this class measures G, keeps
    the weights between measurements and out of the way of non-finite ones, and hands over the gradients. A method
    that remembers something of its tasks overrides `solve_for` as well.

    Args:
        tasks: K >= 1 unique task names.
        scale_heads: whether the parameters of one task alone get w_k·∂L_k (True) or ∂L_k (False). Default: the
            method's own, an attribute of its class.
        update_every, delivery, sync, process_group: see ``GradientBalancer``.

    Zero gradients: a task that does not pull at the shared tensors is left out of the problem and gets the mean
    of the other weights, which only its head sees; the weights then sum to more by that.
    Absent tasks: the problem is solved for the present ones; a single one has weight 1.

    State: ``solved_weights`` (K,), those of the last measurement, ``solved_present``, and the base's.

    Cost: K trunk passes, K copies of the trunk's gradients, and one copy of K×K numbers to the host a measured
    call.
    """

    reads: ClassVar[Reads] = "gramian"
    weight_sum: ClassVar[WeightSum] = "free"
    copies_to_host: ClassVar[bool] = True
    scale_heads: bool = False

    solved_weights: Tensor
    solved_present: Tensor
    grad_norms: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        scale_heads: bool | None = None,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks, update_every=update_every, delivery=delivery, sync=sync, process_group=process_group
        )
        self.scale_heads = type(self).scale_heads if scale_heads is None else bool(scale_heads)
        self.register_buffer("solved_weights", torch.full((len(self.tasks),), 1.0 / len(self.tasks)))
        self.register_buffer("solved_present", torch.ones(len(self.tasks), dtype=torch.bool))
        self.register_buffer("grad_norms", torch.full((len(self.tasks),), torch.nan))

    @abstractmethod
    def solve(self, gramian: Array, losses: Array) -> Array:
        """Return the weights of P >= 1 tasks from their (P, P) Gramian, its diagonal positive, and (P,) losses."""

    def solve_for(self, tasks: Indices, gramian: Array, losses: Array) -> Array:  # noqa: ARG002
        """Return the weights of the tasks with these (P,) indices, and move what the method remembers of them."""
        return self.solve(gramian, losses)

    def weights_at_rest(self, tasks: Indices, losses: Array) -> Array:
        """Return the weights of several tasks none of which pulls, so that only heads see them; no state change."""
        return self.solve(np.eye(len(tasks)), losses)

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for the present tasks if there is something new and finite, else keep the last weights."""
        if signals.gramian_KK is not None and bool(signals.finite):
            gramian = signals.gramian_KK.detach().double().cpu().numpy()
            weights = self._solve_present(signals.present_K, gramian, signals.losses_K)
            if not all(map(math.isfinite, weights.tolist())):
                raise BalancerError(f"{self.get_name()} found no finite weights for the Gramian\n{gramian}")
            solved_K = torch.from_numpy(in_float32(weights)).to(self.solved_weights)
            norms_K = torch.from_numpy(np.sqrt(gramian.diagonal())).to(self.grad_norms)
            self.solved_present.copy_(signals.present_K)
            self.solved_weights.copy_(choose(signals.present_K, solved_K, self.solved_weights))
            self.grad_norms.copy_(choose(signals.present_K, norms_K, self.grad_norms))
            return solved_K
        return self.current_weights(signals.present_K)

    def _solve_present(self, present_K: Tensor, gramian: Array, losses_K: Tensor) -> Array:
        losses = np.array(losses_K.tolist())
        pulls = gramian.diagonal() > 0
        if is_everyone(present_K) and len(losses) > 1 and all(pulls.tolist()):
            return self.solve_for(np.arange(len(losses)), gramian.copy(), losses)
        present = present_K.cpu().numpy()
        pulling = present & pulls
        weights = np.zeros(len(self.tasks))
        if present.sum() == 1:
            weights[present] = 1.0  # nothing to balance
        elif pulling.any():
            tasks = np.flatnonzero(pulling)
            weights[tasks] = self.solve_for(tasks, gramian[np.ix_(tasks, tasks)], losses[tasks])
            weights[present & ~pulling] = weights[tasks].mean()
        else:
            weights[present] = self.weights_at_rest(np.flatnonzero(present), losses[present])
        return weights

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the last solved weights, as they are if the same tasks are present.

        For other tasks than were solved for: 1 for a single one; else the weights that they have, none of them
        negative, sharing 1 where the method's weights sum to 1.
        """
        positive_K = self.solved_weights.clamp(min=0.0)
        kept_K = share_of_present(positive_K, present_K) if self.weight_sum == "1" else positive_K * present_K
        alone = present_K.sum() == 1
        same = (present_K == self.solved_present).all()
        others_K = torch.where(alone, present_K.to(kept_K.dtype), kept_K)
        return torch.where(same, self.solved_weights * present_K, others_K)

    def _read(self, call: Call, probe: Probe) -> Signals:
        device, count = call.losses_K.device, len(self.tasks)
        if call.ranks is None or call.counts_K is None:
            gramian_KK = gram_matrix(probe.read(count), device)
        elif self.sync == "norms":
            gramian_KK = call.ranks.mean_gramian(gram_matrix(probe.read(count), device), call.counts_K)
        else:
            gramian_KK = gram_matrix(probe.read(count, averaged=True), device)
            if not all(tensor.is_leaf for tensor in probe.plan.shared):
                features_KK = gram_matrix(probe.read(count, averaged=False), device)
                gramian_KK = gramian_KK + call.ranks.combine_feature_gramian(features_KK, call.counts_K)
        return self._signals(call, probe, gramian_KK)

    def _read_rows(self, call: Call, probe: Probe, rows: OneAtATime) -> Signals:
        gramian_KK, features_KK = rows.gramians()
        if call.ranks is not None and call.counts_K is not None and self.sync == "gradients":
            features_KK = call.ranks.combine_feature_gramian(features_KK, call.counts_K)
        gramian_KK = gramian_KK + features_KK
        if call.ranks is not None and call.counts_K is not None and self.sync == "norms":
            gramian_KK = call.ranks.mean_gramian(gramian_KK, call.counts_K)
        return self._signals(call, probe, gramian_KK)

    def _signals(self, call: Call, probe: Probe, gramian_KK: Tensor) -> Signals:
        if probe.scales_K is not None:
            gramian_KK = gramian_KK / torch.outer(probe.scales_K, probe.scales_K).to(gramian_KK)
        finite = call.signals.finite
        if probe.scales_K is not None:
            finite = self._finite(call, probe, gramian_KK.diagonal())
        return call.signals._replace(gramian_KK=gramian_KK, finite=both(finite, all_finite(gramian_KK)))

    def _report(self) -> dict[str, Tensor]:
        return {**super()._report(), "raw": self.solved_weights, "grad_norm": self.grad_norms}
