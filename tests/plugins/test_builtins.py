"""The built-ins fit what they stand for: balancers' options and arguments, the toy data, the mlp."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtlbalance import FixedWeightLoss, GABALoss
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny layers on many threads are slower, far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_toy(balancer: torch.nn.Module) -> dict[str, float]:
    """Train an mlp on toy and return the test errors of its averaged weights."""
    registry = load_plugins(entry_points=False)
    dataset, backbone = registry.get("dataset", "toy"), registry.get("backbone", "mlp")
    data = resolve_build(dataset)(dataset.config(seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = resolve_build(backbone)(backbone.config(), data.inputs, data.tasks)
        heads = {task.name: torch.nn.Linear(body.feature_size, 1) for task in data.tasks}
        model = torch.nn.ModuleDict({"body": body, **heads})
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(20):
            for index in torch.randperm(len(data.train)).split(64):
                inputs, targets, _ = data.train[index]
                features = body.trunk(inputs)
                losses = {name: (heads[name](features)[:, 0] - targets[name]) ** 2 for name in targets}
                loss = balancer(losses, shared_params=body.trunk)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average.update_parameters(model)
    with torch.no_grad():
        features = average.module["body"].trunk(data.test.inputs)
        predictions = {name: average.module[name](features)[:, 0] for name in heads}
    errors: dict[str, float] = data.evaluate(predictions, data.test.targets, {})
    return errors


@pytest.mark.usefixtures("one_thread")
def test_a_plain_sum_holds_the_small_task_of_toy_back() -> None:
    plain, balanced = train_toy(FixedWeightLoss(("large", "small"))), train_toy(GABALoss(("large", "small")))
    assert plain["large_nrmse"] < 0.2  # learnable
    assert balanced["large_nrmse"] < 1.1 * plain["large_nrmse"]
    assert balanced["small_nrmse"] < 0.8 * plain["small_nrmse"]
