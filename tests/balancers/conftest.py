"""One small multi-task problem and a way to build every registered balancer, for all tests here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtlbalance.plugins.manager import load_plugins
from mtlbalance.plugins.references import resolve_build
from mtlbalance.slots import TaskSpec

REGISTRY = load_plugins(entry_points=False)
BALANCERS = REGISTRY.names("balancer")
BATCH = 12


@dataclass(frozen=True)
class Facts:
    """What one method promises otherwise than most do, as its docstring says.

    Args:
        objective: the value that it shows for losses at its start, where that is not Σ applied·loss.
        scales_freely: the weight of a single present task follows its loss or a learned scale.
        signed: a weight may be negative.
        draws: weights are drawn at every call, whatever the losses.
        needs_positive_losses: a loss of 0 has no place in its objective.
        needs_parameters: it cannot read representations.
    """

    objective: Callable[[np.ndarray], float] | None = None
    scales_freely: bool = False
    signed: bool = False
    draws: bool = False
    needs_positive_losses: bool = False
    needs_parameters: bool = False


def _pbi(losses: np.ndarray) -> float:
    along = losses.sum() / np.sqrt(len(losses))
    return along + 5.0 * np.linalg.norm(losses - along / np.sqrt(len(losses)))


def _cosmos(losses: np.ndarray) -> float:
    return losses.mean() - losses.sum() / (np.linalg.norm(losses) * np.sqrt(len(losses)))


FACTS = {
    "uncertainty": Facts(objective=lambda losses: 0.5 * losses.sum(), scales_freely=True),
    "imtl-l": Facts(objective=lambda losses: losses.sum(), scales_freely=True),
    "gls": Facts(objective=lambda losses: np.exp(np.log(losses).mean()), needs_positive_losses=True),
    "stch": Facts(
        objective=lambda losses: np.log(losses).mean(), scales_freely=True, needs_positive_losses=True
    ),
    "pbi": Facts(objective=_pbi, signed=True),
    "cosmos": Facts(objective=_cosmos, signed=True),
    "rlw": Facts(draws=True),
    "rgw": Facts(draws=True),
    "excess-mtl": Facts(needs_parameters=True),
}


def facts_of(method: str) -> Facts:
    return FACTS.get(method, Facts())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``method`` runs for every registered balancer."""
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", BALANCERS)


def make_balancer(method: str, tasks: Sequence[str] = ("a", "b"), **options: Any) -> nn.Module:
    """Build a balancer through its registration; options that the method does not have are left out."""
    registration = REGISTRY.get("balancer", method)
    fields = registration.config.model_fields
    required = {"biased_task": tasks[0], "target_cap": 10.0}
    values = {key: value for key, value in {**required, **options}.items() if key in fields}
    specs = [TaskSpec(task, "regression", "mse") for task in tasks]
    return resolve_build(registration)(registration.config(**values), specs)


@dataclass
class Problem:
    """A trunk, a head a task, and one batch; task k's loss is scaled by 100**-k."""

    tasks: tuple[str, ...]
    trunk: nn.Module
    heads: nn.ModuleDict
    inputs: Tensor
    targets: dict[str, Tensor]

    def per_sample(self, features: Tensor) -> dict[str, Tensor]:
        return {
            task: 100.0**-k * (self.heads[task](features).squeeze(-1) - self.targets[task]).square()
            for k, task in enumerate(self.tasks)
        }

    def losses(self) -> dict[str, Tensor]:
        return self.per_sample(self.trunk(self.inputs))

    def parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def call(self, balancer: nn.Module, **arguments: Any) -> Tensor:
        """One training call with everything that any method may want."""
        shared = {"shared_params": self.trunk.parameters()} | arguments
        return balancer(self.losses(), targets=self.targets, **shared)

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """The gradients that ``loss.backward()`` leaves, taken out of ``.grad``."""
        for parameter in self.parameters():
            parameter.grad = None
        loss.backward()
        found = [parameter.grad for parameter in self.parameters()]
        for parameter in self.parameters():
            parameter.grad = None
        return found


@pytest.fixture
def facts(method: str) -> Facts:
    return facts_of(method)


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    return make_balancer


@pytest.fixture
def problem() -> Callable[..., Problem]:
    def build(
        tasks: Sequence[str] = ("a", "b"),
        trunk: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Problem:
        torch.manual_seed(seed)
        trunk = trunk or nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in tasks})
        inputs = torch.randn(BATCH, 5)
        targets = {task: 10.0 * torch.rand(BATCH) for task in tasks}
        return Problem(
            tuple(tasks),
            trunk.to(dtype),
            heads.to(dtype),
            inputs.to(dtype),
            {task: target.to(dtype) for task, target in targets.items()},
        )

    return build
