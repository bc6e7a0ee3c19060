"""Losses, metrics, model and batches, each for itself."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mtlbalance.datasets import InMemoryDataset
from mtlbalance.errors import PluginError, TrainingError
from mtlbalance.slots import TaskSpec
from mtlbalance.training.batches import EvaluationBatches, ShuffleOrder, training_batches
from mtlbalance.training.building import build_state
from mtlbalance.training.data import build_data
from mtlbalance.training.early_stopping import BestEpoch, EarlyStopping
from mtlbalance.training.losses import TaskLosses, resolve_loss
from mtlbalance.training.metrics import check_metrics, task_metrics
from mtlbalance.training.model import build_model
from mtlbalance.training.run_folder import differing_keys
from mtlbalance.training.seeding import rng_state, seed_everything, set_rng_state
from mtlbalance.training.step_losses import StepLosses

LEVEL = TaskSpec("level", "regression", "mse", metrics=("rmse", "mae", "r2"))
KIND = TaskSpec("kind", "classification", "cross_entropy", 3, metrics=("accuracy", "f1"))


@pytest.mark.parametrize(
    ("name", "expected"), [("mse", [9.0, 0.25]), ("l1", [3.0, 0.5]), ("huber", [2.5, 0.125])]
)
def test_losses_by_name(name: str, expected: list[float]) -> None:
    loss = resolve_loss(TaskSpec("level", "regression", name))
    assert loss(torch.tensor([4.0, 1.5]), torch.tensor([1.0, 1.0])).tolist() == expected
    wide = loss(torch.tensor([[4.0, 1.5]]), torch.tensor([[1.0, 1.0]]))
    assert wide.tolist() == [sum(expected) / 2]


def test_a_loss_by_import_string_and_its_errors() -> None:
    assert resolve_loss(TaskSpec("level", "regression", "mtlbalance.training.losses:l1"))(
        torch.ones(2), torch.zeros(2)
    ).tolist() == [1.0, 1.0]
    with pytest.raises(PluginError, match="did you mean 'mse'"):
        resolve_loss(TaskSpec("level", "regression", "mes"))
    with pytest.raises(PluginError, match="loss of task 'level' cannot be used"):
        resolve_loss(TaskSpec("level", "regression", "nowhere.at_all:loss"))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(
        TrainingError, match=r"'level' failed: the prediction has shape \(4,\) and the target \(4, 1\)"
    ):
        TaskLosses([LEVEL])({"level": torch.zeros(4)}, {"level": torch.zeros(4, 1)})
    mean = TaskSpec("level", "regression", lambda prediction, target: (prediction - target).square().mean())
    with pytest.raises(TrainingError, match=r"has shape \(\), but one value a sample is needed: \(4,\)"):
        TaskLosses([mean])({"level": torch.zeros(4)}, {"level": torch.zeros(4)})


def test_a_task_without_targets_is_absent() -> None:
    losses = TaskLosses([LEVEL, KIND])(
        {"level": torch.ones(2), "kind": torch.zeros(2, 3)}, {"level": torch.zeros(2)}
    )
    assert losses.keys() == {"level"}


def test_metrics_by_hand() -> None:
    predictions = {"level": torch.tensor([1.0, 2.0, 6.0]), "kind": torch.eye(3)[[0, 1, 1]]}
    targets = {"level": torch.tensor([1.0, 4.0, 7.0]), "kind": torch.tensor([0, 1, 2])}
    found = task_metrics([LEVEL, KIND], predictions, targets)
    assert found["level_rmse"] == pytest.approx((5 / 3) ** 0.5)
    assert found["level_mae"] == pytest.approx(1.0)
    assert found["level_r2"] == pytest.approx(1 - 5 / 18)
    assert found["kind_accuracy"] == pytest.approx(2 / 3)
    assert found["kind_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    with pytest.raises(PluginError, match="unknown regression metric 'accuracy'"):
        check_metrics([TaskSpec("level", "regression", "mse", metrics=("accuracy",))])


class Backbone(nn.Module):
    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Counting(nn.Linear):
    """Keeps a plain number with its weights."""

    def get_extra_state(self) -> Any:
        return {"calls": 3}


def test_default_heads_and_their_shapes() -> None:
    wide = TaskSpec("pose", "regression", "mse", 2)
    model = build_model(Backbone(trunk=nn.Linear(4, 5), feature_size=5), [LEVEL, KIND, wide])
    shapes = {task: tuple(value.shape) for task, value in model(torch.zeros(7, 4)).items()}
    assert shapes == {"level": (7,), "kind": (7, 3), "pose": (7, 2)}
    assert tuple(model(torch.zeros(1, 4))["level"].shape) == (1,)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "no module 'trunk'"),
        ({"trunk": nn.Linear(4, 5)}, "neither 'heads'"),
        (
            {"trunk": nn.Linear(4, 5), "heads": nn.ModuleDict({"level": nn.Linear(5, 1)})},
            "no head for 'kind'",
        ),
        (
            {"trunk": nn.Linear(4, 5), "feature_size": 5, "extra": nn.Linear(2, 2)},
            "outside trunk and heads.*extra",
        ),
        ({"trunk": Counting(4, 5), "feature_size": 5}, r"no tensor \(trunk\._extra_state\).*buffer"),
    ],
)
def test_a_backbone_that_lacks_something(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        build_model(Backbone(**parts), [LEVEL, KIND])


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_both_ways_of_batching_give_the_same_batches(
    drop_last: bool, sizes: list[int], num_workers: int
) -> None:
    tensors = InMemoryDataset(torch.arange(10.0), {"level": torch.arange(10.0) * 2})
    cpu = torch.device("cpu")
    streams = [
        training_batches(
            dataset, ShuffleOrder(10, 4, drop_last=drop_last, seed=5), cpu, num_workers=num_workers
        )
        for dataset in (tensors, torch.utils.data.Subset(tensors, range(10)))
    ]
    for _ in range(2):
        first, second = (
            [(b.inputs.tolist(), b.targets["level"].tolist()) for b in stream.epoch()] for stream in streams
        )
        assert first == second
        assert [len(x) for x, _ in first] == sizes
        assert all(y == [2 * value for value in x] for x, y in first)
    assert [len(stream) for stream in streams] == [len(sizes)] * 2


def test_evaluation_keeps_the_order_and_leaves_global_generators_alone() -> None:
    tensors = InMemoryDataset(torch.arange(5.0), {"level": torch.arange(5.0)}, {"row": torch.arange(5)})
    before = torch.get_rng_state()
    for dataset in (tensors, torch.utils.data.Subset(tensors, range(5))):
        batches = list(EvaluationBatches(dataset, 2, torch.device("cpu")))
        assert torch.cat([batch[0] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
        assert torch.cat([batch[2]["row"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(before, torch.get_rng_state())


def test_best_epoch_and_early_stopping() -> None:
    best = BestEpoch("max")
    gains = [
        best.update(epoch, value) for epoch, value in enumerate([float("nan"), 1.0, 1.0, 2.0, float("nan")])
    ]
    assert gains == [False, True, False, True, False]
    assert (best.epoch, best.value) == (3, 2.0)
    stopping = EarlyStopping(BestEpoch("min", min_delta=0.5), patience=2)
    verdicts = []
    for epoch, value in enumerate([10.0, 9.4, 9.3, 9.2]):  # the last two gain less than 0.5
        stopping.update(epoch, value)
        verdicts.append(stopping.exhausted(epoch))
    assert verdicts == [False, False, False, True]


def test_differing_keys_are_dotted_and_free_ones_are_left_out() -> None:
    before = {"run": {"name": "a", "seed": 1}, "balancer": {"weights": {"rul": 0.5}}}
    now = {"run": {"name": "b", "seed": 1}, "balancer": {"weights": {"rul": 0.7}}, "training": {"lr": 1.0}}
    assert differing_keys(before, now, {"run.name"}) == [
        "balancer.weights.rul: 0.5 -> 0.7", "training.lr: '(not set)' -> 1.0",
    ]  # fmt: skip


def test_every_generator_is_put_back_where_it_was() -> None:
    def draw() -> list[float]:
        """An odd number of normal draws: both Python and NumPy make two at a time and keep one."""
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.random(),
            np.random.randn(),
            float(torch.rand(())),
        ]

    before = rng_state()
    draw()
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = draw(), draw()
    seed_everything(5)
    set_rng_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert (draw(), draw()) == expected
    set_rng_state(before)


def test_what_is_saved_of_a_long_epoch_is_what_is_done_of_it() -> None:
    losses = StepLosses(["level", "kind"], device=torch.device("cpu"))
    for step in range(3):
        losses.keep(torch.tensor([1.0, 2.0, 3.0, step]), ["level"], 4, epoch=0)
    buffer = io.BytesIO()
    torch.save(losses.state_dict(), buffer)
    assert len(buffer.getvalue()) < 4000
    again = StepLosses(["level", "kind"], device=torch.device("cpu"))
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert again.means()["train_loss_level"] == losses.means()["train_loss_level"] == 1.0
    assert again.means()["train_loss"] == 3.0


def test_a_run_that_goes_on_elsewhere_takes_the_optimizer_of_that_device(configure: Any, plugin: Any) -> None:
    config = configure()
    here, elsewhere = (build_state(config, build_data(config), torch.device("cpu")) for _ in range(2))
    [(fused, foreach)] = [(group["fused"], group["foreach"]) for group in here.optimizer.param_groups]
    for group in elsewhere.optimizer.param_groups:
        group["fused"], group["foreach"] = foreach, fused  # as with another device, or other threads
    here.load_state_dict(elsewhere.weights(), elsewhere.state_dict([rng_state()]))
    assert [(g["fused"], g["foreach"]) for g in here.optimizer.param_groups] == [(fused, foreach)]
