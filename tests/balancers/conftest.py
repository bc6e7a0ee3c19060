"""One small multi-task problem and a way to build every registered balancer, for all tests here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from mtlbalance.plugins.manager import load_plugins
from mtlbalance.plugins.references import resolve_build
from mtlbalance.slots import TaskSpec
from mtlbalance.testing.problem import BATCH, Problem

REGISTRY = load_plugins(entry_points=False)
BALANCERS = REGISTRY.names("balancer")


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


@pytest.fixture
def weightless(method: str) -> bool:
    """Whether the method has no task weights: NaN in every read-out, and the plain sum of the losses for a value."""
    return make_balancer(method).weight_sum == "none"


@pytest.fixture(scope="session")
def prescriptions() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "prescriptions", Path(__file__).with_name("prescriptions.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
