"""A sound dataset by a third party, and one for every way to break a promise."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from mtlbalance.datasets import InMemoryDataset
from mtlbalance.plugins import DatasetRegistration, InputSpec, MultiTaskData, PluginConfig, TaskSpec

TASKS = (
    TaskSpec("level", "regression", "mse", metrics=("rmse",)),
    TaskSpec("kind", "classification", "cross_entropy", outputs=3, metrics=("accuracy",)),
)


class Options(PluginConfig):
    samples: int = 40


def one_set(samples: int, seed: int) -> InMemoryDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 4, generator=generator)
    targets = {"level": inputs.sum(dim=1), "kind": (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()}
    return InMemoryDataset(inputs, targets, {"row": torch.arange(samples)})


def sound(options: Options) -> MultiTaskData:
    return MultiTaskData(
        train=one_set(options.samples, 0),
        validation=one_set(20, 1),
        test=one_set(20, 2),
        tasks=TASKS,
        inputs=InputSpec((4,), "4 numbers"),
        key_metric="level_rmse",
        protocol="three draws",
        data_source="generated",
        facts={"noise": 0.0},
        notices=("made up",),
    )


def register(build: Any) -> DatasetRegistration:
    return DatasetRegistration("acme", "a dataset of a test", Options, build, lambda options: TASKS)


SOUND = register(sound)
BROKEN: dict[str, tuple[DatasetRegistration, set[str]]] = {}


def breaks(*checks: str):
    """Note a change to the sound data, and which checks must fail, and no other."""

    def note(change: Callable[[MultiTaskData], Any]) -> Any:
        BROKEN[change.__name__] = (register(lambda options: change(sound(options))), set(checks))
        return change

    return note


class Items(Dataset[Any]):
    """Sample by sample, changed by a function."""

    def __init__(
        self, tensors: InMemoryDataset, change: Callable[[Any], Any] = lambda sample: sample
    ) -> None:
        self.tensors, self.change = tensors, change

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> Any:
        return self.change(self.tensors[index])


@breaks("can_be_built")
def another_type(data):
    return {"train": data.train}


@breaks("can_be_built")
def an_empty_set(data):
    return dataclasses.replace(data, validation=torch.utils.data.Subset(data.train, []))


@breaks("can_be_built")
def a_missing_file(data):
    raise FileNotFoundError("no such file")


@breaks("tasks_are_as_registered")
def tasks_in_another_order(data):
    return dataclasses.replace(data, tasks=data.tasks[::-1])


@breaks("samples_are_inputs_targets_meta", "losses_are_per_sample")
def columns_for_a_narrow_head(data):
    targets = data.test.targets | {"level": data.test.targets["level"][:, None]}
    return dataclasses.replace(data, test=InMemoryDataset(data.test.inputs, targets, data.test.meta))


@breaks("samples_are_inputs_targets_meta")
def a_class_too_many(data):
    data.train.targets["kind"][7] = 3
    return data


@breaks("samples_are_inputs_targets_meta", "samples_make_batches")
def inputs_of_another_shape(data):
    return dataclasses.replace(data, inputs=InputSpec((4, 1)))


@breaks("values_are_finite")
def a_hole(data):
    data.train.inputs[3, 0] = torch.nan
    return data


class Ragged:
    def __call__(self, sample):
        inputs, targets, meta = sample
        return inputs, targets, meta if int(meta["row"]) % 2 else {"row": meta["row"][None]}


@breaks("samples_make_batches")
def samples_that_do_not_collate(data):
    return dataclasses.replace(data, validation=Items(data.validation, Ragged()))


@breaks("one_config_one_data_set")
def noise_from_the_global_generator(data):
    data.train.inputs += 0.1 * torch.randn_like(data.train.inputs)
    return data


@breaks("one_config_one_data_set")
def a_shuffle_by_python(data):
    order = random.sample(range(len(data.train)), len(data.train))
    return dataclasses.replace(data, train=InMemoryDataset(*data.train[torch.tensor(order)]))


@breaks("sets_do_not_overlap")
def validation_from_training(data):
    return dataclasses.replace(data, validation=InMemoryDataset(*data.train[torch.arange(5, 15)]))


@breaks("says_where_it_comes_from")
def no_protocol(data):
    return dataclasses.replace(data, protocol="")


@breaks("says_where_it_comes_from")
def facts_that_are_no_json(data):
    return dataclasses.replace(data, facts={"noise": torch.zeros(())})


@breaks("workers_can_load_it")
def a_closure(data):
    return dataclasses.replace(data, train=Items(data.train, lambda sample: sample))


def mean_loss(prediction, target):
    return (prediction - target).square().mean()


@breaks("losses_are_per_sample")
def a_mean_for_a_loss(data):
    return dataclasses.replace(
        data, tasks=(dataclasses.replace(data.tasks[0], loss=mean_loss), data.tasks[1])
    )


@breaks("key_metric_prefers_better_predictions")
def the_wrong_mode(data):
    return dataclasses.replace(data, key_metric_mode="max")


@breaks("key_metric_prefers_better_predictions")
def a_key_metric_that_is_not_computed(data):
    return dataclasses.replace(data, key_metric="level_mae")


@breaks("key_metric_prefers_better_predictions")
def an_evaluator_that_changes_its_arguments(data):
    def evaluate(predictions, targets, meta):
        predictions["level"].mul_(2.0)
        return {}

    return dataclasses.replace(data, evaluate=evaluate)
