"""What a method prescribes, worked out beside the balancer under test: plain autograd in float64, summed by hand.

The method itself is asked through a twin whose graph is nothing but K dot products, so that no situation (a compiled
trunk, ranks, float16) can disturb it: the twin is given numbers, K losses and their gradients on what is shared, and
says how they combine. Everything else is done here: heads, parameters that some tasks share, the way down from
representations into the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Row = Sequence[Tensor | None]


class Twin:
    """A balancer of the same method that only ever sees L_k + g_k·(θ − θ₀), at θ = θ₀.

    A representation stays one, with its values: some methods look at the sign of an activation, and at its batch.
    """

    def __init__(self, balancer: nn.Module) -> None:
        self.balancer = balancer

    def combine(
        self, values: Sequence[Tensor], rows: Sequence[Row], shape_of: Sequence[Tensor], factor: float = 1.0
    ) -> tuple[list[Tensor], list[float], list[Tensor]]:
        """Return the combined gradient of tasks with these losses and gradients, their weights, and heads' factors.

        Gradient and factors of heads are multiplied by ``factor``.
        """
        leaves = [tensor.detach().clone().requires_grad_() for tensor in shape_of]
        theta = [leaf if t.is_leaf else leaf * 1.0 for leaf, t in zip(leaves, shape_of, strict=True)]
        tasks = self.balancer.tasks
        heads = [torch.zeros((), dtype=values[0].dtype, requires_grad=True) for _ in tasks]
        losses = {}
        for task, value, row, head in zip(tasks, values, rows, heads, strict=True):
            terms = [(g * (x - x.detach())).sum() for g, x in zip(row, theta, strict=True) if g is not None]
            losses[task] = torch.stack([value.detach() + head, *terms]).sum().reshape(1)
        targets = {task: torch.zeros(1, dtype=theta[0].dtype) for task in tasks}
        (self.balancer(losses, shared_params=theta, targets=targets) * factor).backward()
        combined = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return combined, list(self.balancer.get_weights().values()), [head.grad for head in heads]


@dataclass(frozen=True)
class Prescribed:
    """Adds to ``.grad`` of plain parameters what the method prescribes, task by task.

    Args:
        twin: asked how the shared gradients combine.
        parameters: all parameters of the plain model, frozen and unused ones too.
    """

    twin: Twin
    parameters: Sequence[nn.Parameter]

    def accumulate(self, losses: Sequence[Tensor], shared: Iterable[Tensor], factor: float = 1.0) -> None:
        """Add the gradients of one batch, times ``factor``; ``shared`` is what the balancer under test reads."""
        shared = [tensor for tensor in shared if tensor.requires_grad]
        known = {id(tensor) for tensor in shared}
        trunk = self._below(shared)
        others = [p for p in self.parameters if p.requires_grad and id(p) not in known | set(trunk)]
        rows = [
            torch.autograd.grad(loss, [*shared, *others], retain_graph=True, allow_unused=True)
            for loss in losses
        ]
        values = [loss.detach() for loss in losses]
        reads = [row[: len(shared)] for row in rows]
        combined, weights, heads = self.twin.combine(values, reads, shared, factor)
        for tensor, total in zip(shared, combined, strict=True):
            if tensor.is_leaf and any(row[_index(shared, tensor)] is not None for row in rows):
                _add(tensor, total)
        if trunk:
            downward = torch.autograd.grad(
                shared, list(trunk.values()), combined, retain_graph=True, allow_unused=True
            )
            for parameter, gradient in zip(trunk.values(), downward, strict=True):
                _add(parameter, gradient)
        for position, parameter in enumerate(others, start=len(shared)):
            found = [(w, h, row[position]) for w, h, row in zip(weights, heads, rows, strict=True)]
            found = [(w, h, gradient) for w, h, gradient in found if gradient is not None]
            alone = len(found) == 1
            for weight, head, gradient in found:
                if not alone and math.isnan(weight):
                    raise NotImplementedError("a method without task weights has no say over this parameter")
                _add(parameter, (head if alone else weight * factor) * gradient)

    def _below(self, shared: Sequence[Tensor]) -> dict[int, nn.Parameter]:
        """Return the parameters that representations in ``shared`` are computed from."""
        features = [tensor for tensor in shared if not tensor.is_leaf]
        if not features:
            return {}
        candidates = [p for p in self.parameters if p.requires_grad]
        total = sum(tensor.sum() for tensor in features)
        found = torch.autograd.grad(total, candidates, retain_graph=True, allow_unused=True)
        return {id(p): p for p, gradient in zip(candidates, found, strict=True) if gradient is not None}


def _index(tensors: Sequence[Tensor], wanted: Tensor) -> int:
    return next(position for position, tensor in enumerate(tensors) if tensor is wanted)


def _add(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
