"""Several ranks, one balancer: what is averaged so that N ranks weigh as one rank on the whole batch would.

The reference is the mean over ranks of the ranks' losses; a task that some ranks lack is averaged over
those that have it. Every rank makes the same collectives in the same order: one small sum of losses and
presence a call, and one sum of gradients (or of norms) a measured call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtlbalance.balancers.signals import Gradients


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
        averaged: dict[int, Gradients] = {task: [None] * len(tensors) for task in range(len(counts_K))}
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            sizes = [tensors[i].numel() for i in chosen]
            flat = torch.zeros(len(counts_K), sum(sizes), dtype=dtype, device=tensors[chosen[0]].device)
            for task, row in gradients.items():
                for part, i in zip(torch.split(flat[task], sizes), chosen, strict=True):
                    gradient = row[i]
                    if gradient is not None:
                        part.copy_(
                            gradient.to_dense().reshape(-1) if gradient.is_sparse else gradient.reshape(-1)
                        )
            self.sum(flat)
            flat /= counts_K.clamp(min=1.0).to(flat)[:, None]
            for task in averaged:
                for part, i in zip(torch.split(flat[task], sizes), chosen, strict=True):
                    averaged[task][i] = part.view(tensors[i].shape)
        return averaged

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


def active_ranks(process_group: Any) -> Ranks | None:
    """Return the ranks of ``process_group`` (None: the default group), or None for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    size = dist.get_world_size(process_group)
    return Ranks(process_group, size) if size > 1 else None
