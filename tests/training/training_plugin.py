"""A third-party plugin for the trainer's tests: data, networks, losses, a balancer and an observer that leave traces.

Loaded by path through a config's ``plugins``; the tests reach it as ``sys.modules["training_plugin"]``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mtlbalance import Balancer, FixedWeightLoss
from mtlbalance.datasets import InMemoryDataset
from mtlbalance.plugins import (
    BackboneRegistration,
    BalancerRegistration,
    DatasetRegistration,
    InputSpec,
    MultiTaskData,
    PluginConfig,
    TaskSpec,
    hookimpl,
)

trace: list[tuple[Any, ...]] = []
reads: dict[str, int] = {}
interrupt_after: int | None = None
observer_fails_in = ""
data_source = "made-up"
input_shift = 0.0
observer_draws = False
gives: Callable[[], Any] | None = None  # what the evaluator returns
unreadable_set = "train"
unreadable_after: int | None = None  # samples of that set
damage_after: tuple[Any, ...] | None = None  # epoch, files
hangs_at: int | None = None
run_folder: Path | None = None
signal_in: dict[str, int] = {}  # where -> the signal that this process then sends itself, once


def send_signal(where: str) -> None:
    if where in signal_in:
        os.kill(os.getpid(), signal_in.pop(where))


class Items(Dataset[Any]):
    """Not an ``InMemoryDataset``: read sample by sample, counted; with noise from three generators on demand."""

    def __init__(self, tensors: InMemoryDataset, which: str, noise: float = 0.0) -> None:
        self.tensors, self.which, self.noise = tensors, which, noise

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> Any:
        reads[self.which] = reads.get(self.which, 0) + 1
        trace.append(("fetch", self.which))
        send_signal(f"{self.which} sample {index}")
        if index == hangs_at and reads[self.which] > 1:  # the first is read to see that targets fit
            Path("hanging" if run_folder is None else run_folder / "hanging").touch()
            time.sleep(60)
        if (
            self.which == unreadable_set
            and unreadable_after is not None
            and reads[self.which] > unreadable_after
        ):
            raise OSError(5, "Input/output error", "shard-7")
        inputs, targets, meta = self.tensors[index]
        if self.noise:
            inputs = inputs + self.noise * (torch.randn(4) + np.random.normal() + random.gauss(0.0, 1.0))
        return inputs, targets, meta


class PairsOptions(PluginConfig):
    samples: int = 60
    storage: Literal["memory", "items"] = "memory"
    validation: bool = True
    float64: bool = False
    empty: bool = False
    nan_target_at: int | None = None
    nan_loss_in_epoch: int | None = None
    noise: float = 0.0
    nan_input_at: int | None = None
    hangs_at: int | None = None
    huge_gradient: bool = False
    huge: Literal["", "loss", "evaluation"] = ""
    key_metric: str = "level_rmse"
    constant_metric: bool = False
    spoil: str = ""


def pair_tasks(options: PairsOptions) -> tuple[TaskSpec, ...]:
    level_loss: Any = "mse" if options.nan_loss_in_epoch is None else NanInEpoch(options)
    if options.huge_gradient:
        level_loss = huge_gradient
    if options.huge == "loss":
        level_loss = needs_too_much
    return (
        TaskSpec("level", "regression", level_loss, metrics=("rmse", "mae", "r2")),
        TaskSpec("kind", "classification", "cross_entropy", 3, metrics=("accuracy", "f1")),
    )


def huge_gradient(prediction: Tensor, target: Tensor) -> Tensor:
    """A finite loss whose slope no scale brings into float16."""
    return prediction.float() * 1e30


def needs_too_much(prediction: Tensor, target: Tensor) -> Tensor:
    torch.empty(2**50)
    return prediction - target


def evaluates_too_much(*_: Any) -> dict[str, float]:
    torch.empty(2**50)
    return {}


class NanInEpoch:
    """An MSE that is NaN in the second batch (of 16) of one epoch."""

    def __init__(self, options: PairsOptions) -> None:
        batches = math.ceil(options.samples / 16)
        self.bad_call = (options.nan_loss_in_epoch or 0) * batches + 1
        self.calls = 0

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return (prediction - target).square() * (math.nan if self.calls - 1 == self.bad_call else 1.0)


def build_pairs(options: PairsOptions) -> MultiTaskData:
    global hangs_at
    send_signal("data")
    hangs_at = options.hangs_at
    dtype = torch.float64 if options.float64 else torch.float32
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(4, generator=generator, dtype=dtype)

    def one_set(which: str, samples: int) -> Any:
        inputs = torch.randn(samples, 4, generator=generator, dtype=dtype)
        level = 10 * (inputs @ direction) + torch.randn(samples, generator=generator, dtype=dtype)
        if which == "train" and options.nan_target_at is not None:
            level[options.nan_target_at] = math.nan
        inputs = inputs + input_shift
        if which == "train" and options.nan_input_at is not None:
            inputs[options.nan_input_at] = math.nan
        kind = torch.bucketize(inputs[:, 0].contiguous(), torch.tensor([-0.5, 0.5], dtype=dtype))
        targets = {"level": level, "kind": kind}
        if options.spoil == f"{which} misspelt":
            targets["levle"] = targets.pop("level")
        if options.spoil == f"{which} without kind":
            del targets["kind"]
        if options.spoil == f"{which} class":
            targets["kind"] = kind + 1
        tensors = InMemoryDataset(inputs, targets, {"row": torch.arange(samples)})
        return Items(tensors, which, options.noise) if options.storage == "items" else tensors

    train, validation, test = (
        one_set("train", options.samples),
        one_set("validation", 24),
        one_set("test", 30),
    )
    if options.spoil == "draws":
        torch.rand(3), np.random.random(), random.random()
    if options.spoil == "folder":
        os.chdir("elsewhere")
    if options.spoil == "build":
        raise KeyError("no such sensor")
    tasks = pair_tasks(options)
    if options.spoil == "order":
        tasks = tasks[::-1]
    if options.spoil == "outputs":
        tasks = (tasks[0], dataclasses.replace(tasks[1], outputs=4))
    return MultiTaskData(
        train=torch.utils.data.Subset(train, []) if options.empty else train,
        validation=validation if options.validation else None,
        test=test,
        tasks=tasks,
        inputs=InputSpec((4,), "4 features"),
        key_metric="constant" if options.constant_metric else options.key_metric,
        evaluate=evaluates_too_much if options.huge == "evaluation" else evaluate,
        protocol="honest" if options.validation else "paper",
        data_source=data_source,
        facts={"engines": 3},
        notices=("these data are made up",),
    )


def evaluate(
    predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], meta: Mapping[str, Tensor]
) -> dict[str, float]:
    trace.append(("evaluate", len(meta["row"])))
    send_signal("evaluation")
    if len(meta["row"]) == 30:
        send_signal("test set")
    if gives is not None:
        return gives()
    in_order = bool((meta["row"] == torch.arange(len(meta["row"]))).all())
    return {"samples": len(targets["level"]), "in_order": float(in_order), "constant": 1.0}


class NetOptions(PluginConfig):
    width: int = 8
    normalise: bool = True
    dropout: float = 0.2
    float64: bool = False
    frozen: bool = False
    huge: Literal["", "forward", "backward"] = ""


class Huge(nn.Module):
    """Asks for more memory than there is."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, inputs: Tensor) -> Tensor:
        if self.where == "forward":
            torch.empty(2**50)
        if inputs.requires_grad:
            inputs.register_hook(lambda _: torch.empty(2**50) and None)  # type: ignore[no-untyped-call]
        return inputs


class Net(nn.Module):
    """A trunk with BatchNorm and dropout; the trunk's forward and backward leave traces."""

    def __init__(self, options: NetOptions) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(4, options.width)]
        if options.normalise:
            layers.append(nn.BatchNorm1d(options.width))
        layers.append(nn.Tanh())
        if options.dropout:
            layers.append(nn.Dropout(options.dropout))
        if options.huge:
            layers.append(Huge(options.huge))
        self.trunk = nn.Sequential(*layers)
        self.feature_size = options.width
        if options.float64:
            heads = {"level": nn.Linear(options.width, 1), "kind": nn.Linear(options.width, 3)}
            self.heads = nn.ModuleDict(heads)
            self.double()
        if options.frozen:
            self.heads = nn.ModuleDict(
                {"level": nn.Linear(options.width, 1), "kind": nn.Linear(options.width, 3)}
            )
            self.requires_grad_(False)
        self.trunk.register_forward_hook(leave_trace)


def leave_trace(module: nn.Module, _: Any, output: Tensor) -> None:
    trace.append(("forward" if module.training else "forward-eval",))
    if module.training and output.requires_grad:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: trace.append(("backward",))
        )


class TracedOptions(PluginConfig):
    pass


class Traced(FixedWeightLoss):
    """Fixed weights that leave traces."""

    def forward(self, *losses: Any, **context: Any) -> Tensor:
        trace.append(
            ("balancer", {task: tuple(loss.shape) for task, loss in losses[0].items()}, sorted(context))
        )
        return super().forward(*losses, **context)

    def end_epoch(self) -> None:
        trace.append(("end_epoch",))


class Learned(Balancer):
    """exp(-s)·L + s/2 a task, and a parameter that no gradient ever moves."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.log_variances = nn.Parameter(torch.full((len(self.tasks),), 2.0))
        self.idle = nn.Parameter(torch.ones(()))

    def current_weights(self, present_K: Tensor) -> Tensor:
        return torch.exp(-self.log_variances.detach()) * present_K

    def forward(self, *losses: Any, **_: Any) -> Tensor:
        terms = [
            torch.exp(-scale) * losses[0][task].mean() + scale / 2
            for task, scale in zip(self.tasks, self.log_variances, strict=True)
        ]
        return torch.stack(terms).sum() + 0.0 * self.idle


@hookimpl
def register_datasets() -> list[DatasetRegistration]:
    return [
        DatasetRegistration(
            "pairs", "a regression and a classification", PairsOptions, build_pairs, pair_tasks
        )
    ]


@hookimpl
def register_backbones() -> list[BackboneRegistration]:
    return [BackboneRegistration("net", "a small trunk", NetOptions, lambda options, *_: Net(options))]


@hookimpl
def register_balancers() -> list[BalancerRegistration]:
    return [
        BalancerRegistration(
            "traced", "fixed", TracedOptions, lambda _, tasks: Traced([t.name for t in tasks])
        ),
        BalancerRegistration(
            "learned", "learned", TracedOptions, lambda _, tasks: Learned([t.name for t in tasks])
        ),
    ]


@hookimpl
def on_run_start(run_dir: Path, config: Mapping[str, Any]) -> None:
    global run_folder
    run_folder = run_dir
    trace.append(("on_run_start", config["run"]["name"]))
    if observer_fails_in == "on_run_start":
        raise ValueError("the tracker is away")


@hookimpl
def on_epoch_end(run_dir: Path, epoch: int, metrics: Mapping[str, float]) -> None:
    trace.append(("on_epoch_end", epoch, sorted(path.name for path in (run_dir / "checkpoints").iterdir())))
    if damage_after is not None and epoch == damage_after[0]:
        for name in damage_after[1:]:
            target = run_dir / "checkpoints" / name
            target.write_bytes(bytes(byte ^ 1 for byte in target.read_bytes()))
    if observer_draws:
        torch.rand(3), np.random.random(), random.random()
    if observer_fails_in == "on_epoch_end":
        raise ValueError("the tracker is away")
    if interrupt_after is not None and epoch >= interrupt_after:
        raise KeyboardInterrupt


@hookimpl
def on_run_end(run_dir: Path, results: Mapping[str, Any]) -> None:
    trace.append(("on_run_end", results["best_epoch"], (run_dir / "results.json").exists()))
    if observer_fails_in == "on_run_end":
        raise ValueError("the tracker is away")
