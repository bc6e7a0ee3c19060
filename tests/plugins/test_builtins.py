"""The built-ins fit what they stand for: balancers' options and arguments, the toy data, the mlp."""

from __future__ import annotations

import inspect

import pytest
import torch

from mtlbalance.plugins import FromClass, InputSpec, TaskSpec, import_reference, load_plugins, resolve_build

TASKS = (TaskSpec("rul", "regression", "mse"), TaskSpec("health", "classification", "cross_entropy", 3))
REQUIRED = {"biased_task": "rul", "target_cap": 125.0}


@pytest.mark.parametrize("name", ["fixed", "amnl", "gaba", "grace"])
def test_options_are_the_arguments_of_the_class(name: str) -> None:
    registration = load_plugins(entry_points=False).get("balancer", name)
    assert isinstance(registration.build, FromClass)
    parameters = inspect.signature(import_reference(registration.build.reference)).parameters
    arguments = {
        key: parameter.default
        for key, parameter in parameters.items()
        if key not in ("tasks", "process_group")  # a process group is no text
    }
    options = {
        key: inspect.Parameter.empty if field.is_required() else field.default
        for key, field in registration.config.model_fields.items()
    }
    assert options == arguments
    assert all(field.description for field in registration.config.model_fields.values())


@pytest.mark.parametrize("name", ["fixed", "amnl", "gaba", "grace"])
def test_balancers_are_built_from_their_options(name: str) -> None:
    registration = load_plugins(entry_points=False).get("balancer", name)
    required = REQUIRED if name in ("amnl", "grace") else {}
    balancer = resolve_build(registration)(registration.config(**required), TASKS)
    assert balancer.get_weights() == {"rul": 0.5, "health": 0.5}


def test_toy_is_drawn_from_its_seed() -> None:
    registration = load_plugins(entry_points=False).get("dataset", "toy")
    build = resolve_build(registration)
    options = registration.config(samples=400, features=3)
    data, again, other = build(options), build(options), build(registration.config(samples=400, seed=1))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [280, 60, 60]
    assert data.inputs.shape == (3,)
    assert torch.equal(data.train.inputs, again.train.inputs)
    assert not torch.equal(data.train.targets["large"][:60], other.train.targets["large"][:60])
    spreads = {name: float(target.std()) for name, target in data.train.targets.items()}
    assert spreads == pytest.approx({"large": 30.0, "small": 0.1}, rel=0.15)
    assert data.tasks == tuple(registration.tasks(options))  # type: ignore[union-attr]
    perfect = data.evaluate(data.test.targets, data.test.targets, {})
    assert perfect == {"nrmse": 0.0, "large_nrmse": 0.0, "small_nrmse": 0.0}
    mean = {name: torch.zeros_like(target) for name, target in data.test.targets.items()}
    assert data.evaluate(mean, data.test.targets, {})["nrmse"] == pytest.approx(1.0, rel=0.25)


def test_mlp_takes_inputs_of_any_shape() -> None:
    registration = load_plugins(entry_points=False).get("backbone", "mlp")
    options = registration.config(hidden_sizes=(6, 5), dropout=0.5, activation="tanh")
    model = resolve_build(registration)(options, InputSpec((4, 3)), TASKS)
    assert model.feature_size == 5
    assert model.trunk(torch.zeros(7, 4, 3)).shape == (7, 5)
    assert sum(parameter.numel() for parameter in model.parameters()) == 12 * 6 + 6 + 6 * 5 + 5
    assert [type(layer).__name__ for layer in model.trunk].count("Dropout") == 2
