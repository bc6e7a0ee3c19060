"""GradDrop: keep one sign of the task gradients in each element, drawn by how much they agree on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtlbalance.balancers.base import Call, Sync
from mtlbalance.balancers.checks import integer, real, task_names, task_weights
from mtlbalance.balancers.jacobian_balancer import Combination, JacobianBalancer
from mtlbalance.balancers.layout import Layout
from mtlbalance.balancers.ranks import Ranks
from mtlbalance.balancers.signals import Signals, real_parts


class GradDropLoss(JacobianBalancer):
    """Keep, in each element of the shared gradient, only the positive or only the negative task gradients.

    Use it where tasks pull single parameters in opposite directions, and where noise in the choice helps to leave
    joint minima that suit only some tasks.

    In each element, over the task gradients g_k and with U drawn uniformly from [0, 1):

        P = ½·(1 + Σ g_k / Σ |g_k|)                                        purity of the positive sign
        d = Σ (l_k + (1 − l_k)·M_k)·g_k,  M_k = [P > U][g_k > 0] + [P < U][g_k < 0]

    An element whose gradients are all 0 stays 0. Each head gets its own gradient. The method has no task weights:
    ``get_weights()`` is NaN, and the value is the plain sum of the losses.

    Representations as ``shared_params`` are treated as in the paper: P and M are those of Σ sgn(a)·∂L_k/∂a over the
    batch (the first dimension) of activations a, one draw a feature, and each sample's gradient is masked by it.

    Args:
        tasks: K >= 1 unique task names.
        leak: l_k in [0, 1], one number for all tasks, a mapping by task or a sequence. 0 masks a task's gradient
            fully, 1 lets it through whole. Default 0.
        seed: of the draws. U comes from a generator on the gradients' device, seeded for the n-th call, from 0, by
            ``numpy.random.SeedSequence([seed, n])``: all ranks draw alike, and a resumed run needs n alone. A CPU and
            a GPU draw differently.
        sync, process_group: see ``JacobianBalancer``.

    Absent tasks: the others are combined; a single one keeps its gradient as it is.

    State: ``grad_norms``, the number of calls, and the base's.
    Cost: K backward passes through heads and trunk, but no K gradients: the sums of the positive and of the negative
    ones are enough, so that a step holds 3 copies of the trunk's gradients beyond the plain sum's, whatever K (7 where
    leaks differ, and for representations). No host sync.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, unrelated to a task, or not all that two tasks
            share.

    Example:
        >>> import torch
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> balancer = GradDropLoss(("a", "b"))
        >>> losses = [theta @ torch.tensor([-4.0, 1.0, 0.0]), theta @ torch.tensor([6.0, 1.0, 0.0])]
        >>> balancer(*losses, shared_params=[theta]).backward()
        >>> theta.grad  # of -4 and 6 one is kept, 6 with probability 0.6
        tensor([6., 2., 0.])

    Source: Chen et al. 2020, "Just pick a sign", Algorithm 1, with f(P) = P; also on parameters, where the paper has
    activations. The leak is the paper's, as in TorchJD and LibMTL; the balancer of the Aligned-MTL repository has
    1 − l_k for it.
    """

    method: ClassVar[str] = "GradDrop"
    extra_memory: ClassVar[str] = "3"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        leak: float | Mapping[str, float] | Sequence[float] = 0.0,
        seed: int = 0,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(tasks, sync=sync, process_group=process_group)
        self.leaks = _leaks(leak, self.tasks)
        self.seed = integer(seed, "seed", 0)

    def obstacle_to_graphs(self) -> str:
        """Say that the draws of a graph would be the same in every replay."""
        return super().obstacle_to_graphs() or "the host seeds its draws anew for every call"

    def combination(self, call: Call, layout: Layout) -> Combination:
        """Return the sums of positive and negative gradients."""
        ranks = call.ranks if self.sync == "gradients" else None
        return _SignSums(self, layout, ranks)

    def draw(self, like: Tensor) -> Tensor:
        """Return U for this call, of the shape, precision and device of ``like``."""
        if like.device.type == "meta":
            return torch.rand_like(like)
        seed = int(np.random.SeedSequence([self.seed, self.calls]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


class _SignSums(Combination):
    """Sums over tasks of the positive and of the negative gradients, which is all that the purity depends on.

    ``ups`` and ``downs`` are the signed sums that the draw looks at, ``positive`` and ``negative`` what it keeps. On
    parameters they are the same numbers, unless leaks differ.
    """

    def __init__(self, balancer: GradDropLoss, layout: Layout, ranks: Ranks | None) -> None:
        self._balancer = balancer
        self._layout = layout
        self._ranks = ranks
        self._leaks = balancer.leaks
        self._same = len(set(self._leaks)) == 1 and layout.leaf_size == layout.size
        self._ups: Tensor | None = None
        self._downs = self._positive = self._negative = self._leaked = torch.empty(0)

    def add(self, task: int, gradient_P: Tensor) -> None:
        pulls = self._pulls(gradient_P)
        if self._ups is None:
            self._ups, self._downs = torch.zeros_like(pulls), torch.zeros_like(pulls)
            if not self._same:
                self._positive, self._negative, self._leaked = (self._layout.zeros() for _ in range(3))
        self._ups += pulls.clamp(min=0.0)
        self._downs += pulls.clamp(max=0.0)
        if not self._same:
            leak = self._leaks[task]
            self._leaked += leak * gradient_P
            gradient_P *= 1.0 - leak
            self._positive += gradient_P * self._spread(pulls > 0)
            self._negative += gradient_P * self._spread(pulls < 0)

    def combine(self, signals: Signals) -> Tensor:
        """Keep what the draw says, or both signs where something is not finite: the plain sum."""
        assert self._ups is not None
        # P > U, times Σ|g|: no division, so nothing to guard where all gradients are 0.
        threshold = self._balancer.draw(self._ups).mul_(self._ups - self._downs)
        keeps_positive = (self._ups > threshold) | ~signals.finite
        keeps_negative = (self._ups < threshold) | ~signals.finite
        del threshold
        if not self._same:
            self._positive *= self._spread(keeps_positive)
            self._negative *= self._spread(keeps_negative)
            return self._leaked.add_(self._positive).add_(self._negative)
        leak = self._leaks[0]
        self._ups *= keeps_positive.to(self._ups.dtype).mul_(1.0 - leak).add_(leak)
        self._downs *= keeps_negative.to(self._ups.dtype).mul_(1.0 - leak).add_(leak)
        return self._ups.add_(self._downs)

    def _pulls(self, gradient_P: Tensor) -> Tensor:
        """Return the gradient of leaves as it is, and that of representations summed over the batch."""
        if self._layout.leaf_size == self._layout.size:
            return gradient_P
        pairs = zip(self._layout.tensors, self._layout.split(gradient_P), strict=True)
        features = [
            (real_parts(tensor.detach()).sign().to(part.device) * part).sum(0).reshape(-1)
            for tensor, part in pairs
            if not tensor.is_leaf
        ]
        of_features = torch.cat(features)
        if self._ranks is not None:
            self._ranks.sum(of_features)
        return torch.cat([gradient_P[: self._layout.leaf_size], of_features])

    def _spread(self, chosen: Tensor) -> Tensor:
        """Return flags of the pulls as flags of all numbers: a feature's flag is that of each sample."""
        if self._layout.leaf_size == self._layout.size:
            return chosen
        parts = [chosen[: self._layout.leaf_size]]
        start = self._layout.leaf_size
        for tensor, shape in zip(self._layout.tensors, self._layout.shapes, strict=True):
            if not tensor.is_leaf:
                size = shape[1:].numel()
                parts.append(chosen[start : start + size].view(shape[1:]).expand(shape).reshape(-1))
                start += size
        return torch.cat(parts)


def _leaks(leak: Any, tasks: Sequence[str]) -> list[float]:
    names = task_names(tasks)
    if isinstance(leak, Real):
        return [real(leak, "leak", 0.0, 1.0)] * len(names)
    given = task_weights(leak, names, "leak")
    return [real(value, f"leak[{task!r}]", 0.0, 1.0) for task, value in zip(names, given, strict=True)]
