"""Several ranks, one balancer: what is averaged so that N ranks weigh as one rank on the whole batch would.

The reference is the mean over ranks of the ranks' losses; a task that some ranks lack is averaged over
those that have it. Every rank makes the same collectives in the same order: one small sum of losses and
presence a call, and sums of gradients (or one of norms) in a measured call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtlbalance.balancers.signals import Gradients

SENT_TOGETHER_BYTES = 2**22  # gradients of so many bytes are summed while further ones are computed


@dataclass(frozen=True)
class Ranks:
    """A process group of more than one rank.

    Numbers are summed in float64: one dtype on all ranks, whichever tasks, and so dtypes, each has.
    """

    group: Any
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean_losses(self, losses_K: Tensor, present_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses averaged over the ranks that have the task, and the number of those ranks."""
        packed = self.sum(torch.stack([losses_K, present_K]).double())
        mean_K = (packed[0] / packed[1].clamp(min=1.0)).to(losses_K.dtype)
        return mean_K, packed[1].to(losses_K.dtype)

    def mean_gradients(
        self, gradients: Mapping[int, Gradients], tensors: Sequence[Tensor], counts_K: Tensor
    ) -> dict[int, Gradients]:
        """Average each task's gradients of ``tensors`` over the ranks that have the task.

        Every rank gets a row for every task, those it lacks included; no gradient counts as zero.
        """
        means = GradientMeans(self, tensors, counts_K)
        for task in range(len(counts_K)):
            means.add(gradients.get(task))
        return means.finish()

    def mean_gradient(self, gradient_P: Tensor, count: Tensor) -> None:
        """Average one task's flat gradient, in place, over the ``count`` ranks that have it; zeros on the others."""
        if gradient_P.numel() > 0:
            self.sum(gradient_P)
            gradient_P /= count.clamp(min=1.0).to(gradient_P)

    def combine_feature_norms(self, norms_K: Tensor, counts_K: Tensor) -> Tensor:
        """Norms on representations, whose rows differ by rank: n² = Σ_r n_r² / (ranks that have the task)²."""
        return self.sum(norms_K.double().square()).sqrt() / counts_K.clamp(min=1.0)

    def mean_norms(self, norms_K: Tensor, counts_K: Tensor) -> Tensor:
        """The cheap approximation of norms on parameters: the mean of the ranks' own norms."""
        return self.sum(norms_K.double()) / counts_K.clamp(min=1.0)

    def combine_feature_gramian(self, gramian_KK: Tensor, counts_K: Tensor) -> Tensor:
        """Inner products on representations: G_ij = Σ_r G_ij,r / (ranks that have task i · those with j)."""
        counts = counts_K.clamp(min=1.0).to(gramian_KK)
        return self.sum(gramian_KK.clone()) / torch.outer(counts, counts)

    def mean_gramian(self, gramian_KK: Tensor, counts_K: Tensor) -> Tensor:
        """The cheap approximation of a Gramian on parameters: ranks' inner products as if of one direction.

        Exact where the ranks' gradients agree; each pair is averaged over the ranks that could have both.
        """
        counts = counts_K.clamp(min=1.0).to(gramian_KK)
        return self.sum(gramian_KK.clone()) / torch.minimum(counts[:, None], counts[None, :])


class GradientMeans:
    """Each task's gradients averaged over the ranks that have it, summed while those of the next are still computed.

    Every rank adds a row for each task, in task order, whether it has the task or not. Rows are copied into one place,
    so a rank holds K copies and not the gradients beside them, and are sent when enough of them have gathered: sums of
    less cost more in latency than they hide.

    Args:
        ranks: the ranks.
        tensors: what the gradients are of.
        counts_K: how many ranks have each task.
    """

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor], counts_K: Tensor) -> None:
        self._ranks = ranks
        self._tensors = tensors
        self._counts_K = counts_K
        self._added = 0
        self._parts = [
            _Part(dtype, tensors, len(counts_K))
            for dtype in sorted({tensor.dtype for tensor in tensors}, key=str)
        ]

    def add(self, gradients: Gradients | None) -> None:
        """Take the next task's gradients, None for a task that this rank lacks; no gradient counts as zero."""
        for part in self._parts:
            part.fill(self._added, gradients)
        self._added += 1
        for part in self._parts:
            part.send(self._ranks, self._added)

    def finish(self) -> dict[int, Gradients]:
        """Return the mean gradients of every task, once all of them have arrived."""
        averaged: dict[int, Gradients] = {task: [None] * len(self._tensors) for task in range(self._added)}
        for part in self._parts:
            part.wait()
            part.rows /= self._counts_K.clamp(min=1.0).to(part.rows)[:, None]
            for task, row in averaged.items():
                for column, values in zip(
                    part.columns, torch.split(part.rows[task], part.sizes), strict=True
                ):
                    row[column] = values.view(self._tensors[column].shape)
        return averaged


class _Part:
    """The rows of all tasks over the tensors of one dtype."""

    def __init__(self, dtype: torch.dtype, tensors: Sequence[Tensor], count: int) -> None:
        self.columns = [column for column, tensor in enumerate(tensors) if tensor.dtype == dtype]
        self.sizes = [tensors[column].numel() for column in self.columns]
        self.rows = torch.empty(count, sum(self.sizes), dtype=dtype, device=tensors[self.columns[0]].device)
        self._sent = 0
        self._sums: list[Any] = []

    def fill(self, task: int, gradients: Gradients | None) -> None:
        for column, values in zip(self.columns, torch.split(self.rows[task], self.sizes), strict=True):
            gradient = None if gradients is None else gradients[column]
            if gradient is None:
                values.zero_()
            else:
                values.copy_(gradient.to_dense().reshape(-1) if gradient.is_sparse else gradient.reshape(-1))

    def send(self, ranks: Ranks, filled: int) -> None:
        """Begin to sum the rows that are filled and not sent yet, if they are the last or large enough."""
        waiting = self.rows[self._sent : filled]
        if filled == len(self.rows) or waiting.nbytes >= SENT_TOGETHER_BYTES:
            self._sums.append(dist.all_reduce(waiting, group=ranks.group, async_op=True))
            self._sent = filled

    def wait(self) -> None:
        for each in self._sums:
            each.wait()


def active_ranks(process_group: Any) -> Ranks | None:
    """Return the ranks of ``process_group`` (None: the default group), or None for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    size = dist.get_world_size(process_group)
    return Ranks(process_group, size) if size > 1 else None
