"""The models that are trained in the benchmarks, each with a batch and a loss for every task."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Losses = dict[str, Tensor]
Criterion = Callable[..., Tensor]  # (prediction, target, reduction=) as torch's are


@dataclass(frozen=True)
class Workload:
    """A model with ``trunk`` and ``heads``, a batch for it, and each task's targets and criterion.

    Args:
        family: ``mlp``, ``mlp-heads``, ``wide``, ``conv``, ``resnet`` or ``study``.
        name: family, sizes and number of tasks.
        model: never trained itself: everything measured trains a copy.
        inputs, targets: the batch.
        criteria: task -> criterion.
        contexts: what forward passes and losses run in, such as autocast.
        compiled: which of a fresh model's modules are compiled by ``torch.compile``: ``trunk``, or ``trunk and heads``.
    """

    family: str
    name: str
    model: nn.Module
    inputs: Tensor
    targets: dict[str, Tensor]
    criteria: dict[str, Criterion]
    contexts: tuple[Callable[[], AbstractContextManager[Any]], ...] = ()
    compiled: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(self.targets)

    @property
    def trunk_numbers(self) -> int:
        """How many numbers the trunk's parameters hold."""
        return sum(parameter.numel() for parameter in self.model.get_submodule("trunk").parameters())

    def described(self) -> dict[str, Any]:
        """Return what figures say of the workload that they are of."""
        return {
            "workload": self.name,
            "family": self.family,
            "tasks": len(self.tasks),
            "batch_size": len(self.inputs),
            "trunk_numbers": self.trunk_numbers,
        }

    def losses(self, predictions: dict[str, Tensor], per_sample: Collection[str] = ()) -> Losses:
        """Return each task's mean loss; for those named, one value a sample."""
        found = {}
        for task, criterion in self.criteria.items():
            reduction = "none" if task in per_sample else "mean"
            loss = criterion(predictions[task], self.targets[task], reduction=reduction)
            found[task] = loss.flatten(1).mean(1) if loss.dim() > 1 else loss
        return found

    def fresh_model(self) -> tuple[nn.Module, nn.ModuleDict, nn.Module]:
        """Return a copy's trunk and heads, and the copy, in training mode."""
        model = copy.deepcopy(self.model).train()
        heads = model.get_submodule("heads")
        trunk = model.get_submodule("trunk")
        assert isinstance(heads, nn.ModuleDict)
        if "trunk" in self.compiled:
            trunk = _compile(trunk)
        if "heads" in self.compiled:
            heads = nn.ModuleDict({task: _compile(head) for task, head in heads.items()})
        return trunk, heads, model

    def to(self, device: torch.device) -> Workload:
        """Return the workload on a device."""
        targets = {task: target.to(device) for task, target in self.targets.items()}
        model = copy.deepcopy(self.model).to(device)
        return replace(self, model=model, inputs=self.inputs.to(device), targets=targets)


def _compile(module: nn.Module) -> nn.Module:
    """Return a module compiled so that K backward passes may go through it, or raise instead of giving up quietly."""
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(module)
    assert isinstance(compiled, nn.Module)
    return compiled


class SharedTrunk(nn.Module):
    """A trunk and a head for each task: linear, or with one hidden layer."""

    def __init__(self, trunk: nn.Module, width: int, tasks: tuple[str, ...], head_width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: _head(width, head_width) for task in tasks})


def _head(width: int, head_width: int) -> nn.Module:
    if head_width == 0:
        return nn.Linear(width, 1)
    return nn.Sequential(nn.Linear(width, head_width), nn.ReLU(), nn.Linear(head_width, 1))


def _regressions(
    family: str,
    name: str,
    trunk: nn.Module,
    width: int,
    inputs: Tensor,
    tasks_count: int,
    head_width: int = 0,
) -> Workload:
    tasks = tuple(f"task_{index}" for index in range(tasks_count))
    targets = {task: torch.randn(len(inputs), 1) for task in tasks}
    model = SharedTrunk(trunk, width, tasks, head_width)
    return Workload(family, name, model, inputs, targets, dict.fromkeys(tasks, functional.mse_loss))


def mlp(tasks_count: int, *, width: int = 256, batch_size: int = 256, head_width: int = 0) -> Workload:
    """K regressions on three hidden layers of one width.

    With linear heads nearly all that is computed is the trunk, the hardest case; with a hidden layer in each head
    (``mlp-heads``) the plain sum pays for its tasks, too.
    """
    sizes = [(32, width), (width, width), (width, width)]
    trunk = nn.Sequential(*(part for size in sizes for part in (nn.Linear(*size), nn.ReLU())))
    family, heads = ("mlp-heads", f", heads {head_width}") if head_width else ("mlp", "")
    name = f"mlp 3 x {width}{heads}, batch {batch_size}, K = {tasks_count}"
    return _regressions(family, name, trunk, width, torch.randn(batch_size, 32), tasks_count, head_width)


def wide(tasks_count: int, *, width: int = 1024, batch_size: int = 64) -> Workload:
    """The same with wide layers and a small batch: weights are most of what is moved."""
    found = mlp(tasks_count, width=width, batch_size=batch_size)
    return replace(found, family="wide", name=found.name.replace("mlp", "wide mlp"))


def wide_conv(tasks_count: int, *, width: int = 1024, batch_size: int = 4) -> Workload:
    """The wide mlp as 1 x 1 convolutions: as many numbers, whose gradients are kept as they are."""
    sizes = [(32, width), (width, width), (width, width)]
    layers = [part for size in sizes for part in (nn.Conv1d(*size, 1), nn.ReLU())]
    name = f"1 x 1 convolutions 3 x {width}, batch {batch_size}, K = {tasks_count}"
    trunk = nn.Sequential(*layers, nn.Flatten())
    return _regressions("conv", name, trunk, width, torch.randn(batch_size, 32, 1), tasks_count)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation around a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's output."""
        return functional.relu(self.body(inputs) + self.shortcut(inputs))


def resnet(tasks_count: int = 3, *, channels: int = 32, batch_size: int = 32) -> Workload:
    """K regressions on 32 x 32 images: a stem and four residual blocks, each half as large and twice as wide."""
    widths = [channels * factor for factor in (1, 1, 2, 4, 8)]
    blocks = [ResidualBlock(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    trunk = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    name = f"resnet of 4 blocks, batch {batch_size}, K = {tasks_count}"
    return _regressions("resnet", name, trunk, widths[-1], torch.randn(batch_size, 3, 32, 32), tasks_count)


def study(*, hidden_size: int = 256, batch_size: int = 256) -> Workload:
    """The study's CNN-BiLSTM-attention with its two tasks on random windows; 256 is its size, 3.5 M parameters."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cmapss"))
    from mtlbalance_cmapss.backbone import CnnBiLstmAttention
    from mtlbalance_cmapss.config import CmapssConfig, CnnBiLstmAttentionConfig, tasks_of

    config = CnnBiLstmAttentionConfig(hidden_size=hidden_size)
    model = CnnBiLstmAttention(config, num_features=17, tasks=tasks_of(CmapssConfig()))
    targets = {"rul": 125 * torch.rand(batch_size), "health": torch.randint(3, (batch_size,))}
    criteria: dict[str, Criterion] = {"rul": functional.mse_loss, "health": functional.cross_entropy}
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    name = f"cnn-bilstm-attention {millions:.1f} M, batch {batch_size}, K = 2"
    return Workload("study", name, model, torch.randn(batch_size, 30, 17), targets, criteria)
