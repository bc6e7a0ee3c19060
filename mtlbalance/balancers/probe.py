"""What one call differentiates, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlbalance.balancers.ghost import Layer
from mtlbalance.balancers.signals import Gradients

_NO_LAYERS: Mapping[int, Layer] = {}


class Plan(NamedTuple):
    """What is differentiated in one call.

    Args:
        shared: the tensors that are read.
        several: further leaves that several tasks reach; delivered with the shared ones, but not read.
        own: for each present task, the leaves that it alone reaches (its head); only for direct delivery.
        waiting: what tasks without labels on this rank reach, and other ranks will wait for.
        direct: whether the measured gradients are handed over as they are.
        layers: by column of ``shared``, the linear layers whose weight gradients DᵀX are kept as their factors.
    """

    shared: list[Tensor]
    several: list[Tensor]
    own: dict[int, list[Tensor]]
    waiting: list[Tensor]
    direct: bool
    layers: Mapping[int, Layer] = _NO_LAYERS

    def all(self) -> list[Tensor]:
        """Return every tensor that some task is differentiated by."""
        return [*self.shared, *self.several, *(leaf for leaves in self.own.values() for leaf in leaves)]

    def ends_of(self, task: int) -> Sequence[Tensor | GradientEdge]:
        """Return where one task's pass ends: at tensors, or at the outputs of the layers in place of their weights."""
        ends: list[Tensor | GradientEdge] = [*self.shared, *self.several, *self.own[task]]
        for column, layer in self.layers.items():
            ends[column] = layer.output
        return ends


class Probe(NamedTuple):
    """The gradients measured in one call.

    Args:
        plan: what was differentiated.
        scales_K: what each loss was multiplied by, and its gradients still are; None: nothing (all 1).
        rows: task index -> gradients of ``plan.shared``, then of ``plan.several``; after averaging over ranks,
            for every task. For the weights of ``plan.layers`` it is the factor D.
        averaged: for each column of the rows, whether it is averaged over ranks already.
        of_own: for each present task, the gradients of ``plan.own``.
    """

    plan: Plan
    scales_K: Tensor | None
    rows: dict[int, Gradients]
    averaged: list[bool]
    of_own: dict[int, Gradients]

    def read(self, count: int, *, averaged: bool | None = None) -> list[Gradients]:
        """Return a row for each of ``count`` tasks over the shared columns, all or only those (not) averaged.

        In place of the gradients of ``plan.layers`` there are smaller matrices of the same norms and inner products.
        """
        width = len(self.plan.shared)
        if averaged is None:
            chosen: Sequence[int] = range(width)
            rows = [self.rows[task][:width] if task in self.rows else [] for task in range(count)]
        else:
            chosen = [column for column in range(width) if self.averaged[column] is averaged]
            rows = [
                [self.rows[task][column] for column in chosen] if task in self.rows else []
                for task in range(count)
            ]
        for column, layer in self.plan.layers.items():
            if column in chosen:
                layer.shrink(rows, chosen.index(column))
        return rows

    def unread(self) -> dict[int, Gradients]:
        """Return what was differentiated for delivery alone, by task: other shared leaves, and heads."""
        width = len(self.plan.shared)
        return {task: [*self.rows[task][width:], *own] for task, own in self.of_own.items()}

    def unscaled(self, values_K: Tensor) -> Tensor:
        """Take the scales out of norms, or of the weights that the gradients will be multiplied by."""
        return values_K if self.scales_K is None else values_K / self.scales_K.to(values_K.dtype)
