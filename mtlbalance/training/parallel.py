"""The model as ranks train it: DistributedDataParallel, told in advance which parameters get no gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mtlbalance.training.model import MultiTaskModel


def average_over_ranks(model: MultiTaskModel, inputs: Tensor) -> DistributedDataParallel:
    """Return what to call instead of ``model``, so that backward passes average gradients over ranks.

    Args:
        model: on its device.
        inputs: a small batch, by which it is seen which parameters reach an output: looking for the others in every
            step costs, not looking where there are some stops training.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.enable_grad():
        reached = _leaves(model(inputs.to(device)).values())
    model.train(was_training)
    idle = any(parameter.requires_grad and parameter not in reached for parameter in model.parameters())
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=idle
    )


def _leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Return the leaves that a backward pass from ``outputs`` would reach."""
    leaves: set[Tensor] = set()
    seen = set()
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.add(leaf)
        waiting.extend(after for after, _ in node.next_functions if after is not None)
    return leaves
