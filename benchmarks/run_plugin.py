"""A plugin for end_to_end.py: a dataset of random numbers of any size, and an observer that notes when epochs end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from mtlbalance.datasets.in_memory import InMemoryDataset
from mtlbalance.plugins import (
    DatasetRegistration,
    InputSpec,
    MultiTaskData,
    PluginConfig,
    TaskSpec,
    hookimpl,
)
from mtlbalance.slots import Sample


class Stamp(NamedTuple):
    """When an epoch ended."""

    cpu_seconds: float
    wall_seconds: float


STAMPS: list[Stamp] = []


def note_epoch() -> None:
    """Note that an epoch has ended; the bare loop calls it, too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    STAMPS.append(Stamp(time.process_time(), time.perf_counter()))


class RandomOptions(PluginConfig):
    """Options of the dataset ``random``."""

    shape: Literal["rows", "windows"] = Field("rows", description="rows of 32 numbers, or windows of 30 x 17")
    samples: int = Field(1000, ge=1, description="in the training set")
    watched: int = Field(100, ge=1, description="in the test set, which is evaluated in every epoch")
    in_memory: bool = Field(True, description="false: samples are fetched one by one through a DataLoader")


class OneByOne(Dataset[Sample]):
    """A set that gives samples and nothing else, as most do."""

    def __init__(self, held: InMemoryDataset) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> Sample:
        """Return one sample."""
        return self.held[index]


def tasks_of(options: RandomOptions) -> tuple[TaskSpec, ...]:
    """Return two regressions of a row, or the study's two tasks of a window."""
    if options.shape == "rows":
        return tuple(TaskSpec(name, "regression", "mse", metrics=("rmse",)) for name in ("first", "second"))
    health = TaskSpec("health", "classification", "cross_entropy", outputs=3, metrics=("accuracy",))
    return TaskSpec("rul", "regression", "mse", metrics=("rmse",)), health


def draw(options: RandomOptions, count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return random inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (32,) if options.shape == "rows" else (30, 17)
    inputs = torch.randn(count, *shape, generator=generator)
    if options.shape == "rows":
        names = [task.name for task in tasks_of(options)]
        return inputs, {name: torch.randn(count, generator=generator) for name in names}
    rul, health = (
        125 * torch.rand(count, generator=generator),
        torch.randint(3, (count,), generator=generator),
    )
    return inputs, {"rul": rul, "health": health}


def build(options: RandomOptions) -> MultiTaskData:
    """Build the dataset."""
    train, test = (
        InMemoryDataset(*draw(options, count, seed))
        for seed, count in enumerate((options.samples, options.watched))
    )
    tasks = tasks_of(options)
    return MultiTaskData(
        train=train if options.in_memory else OneByOne(train),
        validation=None,
        test=test if options.in_memory else OneByOne(test),
        tasks=tasks,
        inputs=InputSpec(tuple(train.inputs.shape[1:]), "random numbers"),
        key_metric=f"{tasks[0].name}_rmse",
        protocol="random",
        data_source="generated",
    )


@hookimpl
def register_datasets() -> list[DatasetRegistration]:
    """Bring the dataset."""
    summary = "random numbers of any size, for benchmarks"
    return [DatasetRegistration("random", summary, RandomOptions, build, tasks_of)]


@hookimpl
def on_epoch_end(run_dir: Path, epoch: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG001
    """Note when the epoch ended."""
    note_epoch()
