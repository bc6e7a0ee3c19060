"""Backbones that train but cannot be exported, or not rightly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mtlbalance.plugins import BackboneRegistration, InputSpec, PluginConfig, TaskSpec, hookimpl


class OddOptions(PluginConfig):
    how: Literal["branches", "fixes the batch", "two-faced", "nan"]


class Trunk(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.linear(inputs)
        if self.how == "branches" and features.sum() > 0:
            return features * 2
        if self.how == "fixes the batch" and torch.compiler.is_compiling():
            return features.reshape(2, 3)
        if self.how == "two-faced" and torch.compiler.is_compiling():
            return features * 1.001
        if self.how == "nan" and torch.compiler.is_compiling():
            return features * float("nan")
        return features


class Odd(nn.Module):
    def __init__(self, options: OddOptions, inputs: InputSpec, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.trunk = Trunk(options.how)
        self.feature_size = 3


@hookimpl
def register_backbones() -> list[BackboneRegistration]:
    return [BackboneRegistration("odd", "cannot be exported", OddOptions, Odd)]
