"""Norms and Gramians of task gradients that are never held all at once: ``delivery="low_memory"``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call
from mtlbalance.balancers.probe import Plan
from mtlbalance.balancers.products import gram_matrix, product_dtype
from mtlbalance.balancers.signals import Gradients, gradient_norm


class OneAtATime:
    """The task gradients of a call on the shared tensors, differentiated each time that they are asked for.

    Args:
        call: the call.
        plan: what is differentiated.
        differentiate: task index -> its gradients of ``plan.shared``, for a task that is present on this rank.
        averages: whether gradients of leaves are averaged over the ranks before they are read.
    """

    def __init__(
        self, call: Call, plan: Plan, differentiate: Callable[[int], Gradients], *, averages: bool
    ) -> None:
        self._call = call
        self._shared = plan.shared
        self._differentiate = differentiate
        self._averages = averages
        self._leaves = [column for column, tensor in enumerate(plan.shared) if tensor.is_leaf]
        self._features = [column for column, tensor in enumerate(plan.shared) if not tensor.is_leaf]
        # Ranks take part in what is averaged of every task, whether they have it or not.
        self.tasks = list(range(len(call.losses_K))) if averages else list(call.losses)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return (K,) norms on the leaves, and on the representations, from one pass a task."""
        device = self._call.losses_K.device
        leaf_K = torch.zeros_like(self._call.losses_K)
        features_K = torch.zeros_like(leaf_K)
        for task in self.tasks:
            leaves, features = self._row(task)
            leaf_K[task] = gradient_norm(leaves, device)
            features_K[task] = gradient_norm(features, device)
            del leaves, features  # not to be held while the next is computed
        return leaf_K, features_K

    def gramians(self) -> tuple[Tensor, Tensor]:
        """Return the (K, K) Gramians on the leaves, and on the representations, from K(K + 1)/2 − 1 passes."""
        device = self._call.losses_K.device
        count = len(self._call.losses_K)
        leaf_KK = torch.zeros(count, count, dtype=product_dtype(device), device=device)
        features_KK = torch.zeros_like(leaf_KK)
        for position, first in enumerate(self.tasks):
            others = self.tasks[position + 1 :]
            if position and not others:
                break  # its own product came with the pairs before
            held = self._row(first)
            if not others:
                for total_KK, part in zip((leaf_KK, features_KK), held, strict=True):
                    total_KK[first, first] = gram_matrix([part], device)[0, 0]
            for second in others:
                streamed = self._row(second)
                for total_KK, part, other in zip((leaf_KK, features_KK), held, streamed, strict=True):
                    pair = gram_matrix([part, other], device)
                    total_KK[first, first], total_KK[second, second] = pair[0, 0], pair[1, 1]
                    total_KK[first, second] = total_KK[second, first] = pair[0, 1]
                del streamed, part, other
        return leaf_KK, features_KK

    def _row(self, task: int) -> tuple[Gradients, Gradients]:
        """Return one task's gradients of the leaves, averaged where they are to be, and of the representations."""
        call = self._call
        row = self._differentiate(task) if task in call.losses else [None] * len(self._shared)
        leaves = [row[column] for column in self._leaves]
        if self._averages and call.ranks is not None and call.counts_K is not None:
            tensors = [self._shared[column] for column in self._leaves]
            leaves = call.ranks.mean_gradients({0: leaves}, tensors, call.counts_K[task : task + 1])[0]
        return leaves, [row[column] for column in self._features]
