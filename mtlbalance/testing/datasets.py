"""What the trainer relies on of a dataset plugin."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtlbalance.datasets.in_memory import InMemoryDataset
from mtlbalance.plugins.references import build_plugin
from mtlbalance.plugins.registrations import DatasetRegistration, PluginConfig
from mtlbalance.slots import MultiTaskData, Sample, TaskSpec
from mtlbalance.testing.checks import Checks, Report
from mtlbalance.testing.expectations import expect, expect_close, expect_equal
from mtlbalance.testing.generators import expect_no_draw

MOST_SAMPLES = 256  # of a set, spread over it


class DatasetCase:
    """A registered dataset and its options.

    Args:
        registration: what the plugin registers.
        options: by name, as in a config's ``[dataset]``.
    """

    def __init__(self, registration: DatasetRegistration, options: Mapping[str, Any] | None = None) -> None:
        self.registration = registration
        self._options = dict(options or {})

    @cached_property
    def config(self) -> PluginConfig:
        """The options, validated."""
        return self.registration.config(**self._options)

    @cached_property
    def data(self) -> MultiTaskData:
        """What the plugin builds; built once."""
        return self.fresh()

    def fresh(self) -> MultiTaskData:
        """Build again."""
        built: MultiTaskData = build_plugin(self.registration, self.config)
        return built

    @property
    def sets(self) -> dict[str, Dataset[Sample]]:
        """The sets that there are."""
        sets = {"training": self.data.train, "validation": self.data.validation, "test": self.data.test}
        return {which: dataset for which, dataset in sets.items() if dataset is not None}


CHECKS: Checks[DatasetCase] = Checks()


def spread(dataset: Dataset[Sample], most: int = MOST_SAMPLES) -> Iterator[tuple[int, Sample]]:
    """Yield all samples, or ``most`` (>= 2) spread over the set, first and last among them."""
    length = len(dataset)  # type: ignore[arg-type]
    count = min(most, length)
    for k in range(count):
        index = k if count == length else round(k * (length - 1) / (count - 1))
        yield index, dataset[index]


@CHECKS.add(first=True)
def can_be_built(case: DatasetCase) -> None:
    """build(config) returns MultiTaskData whose sets are not empty and have a length."""
    expect(
        isinstance(case.data, MultiTaskData),
        f"build: expected MultiTaskData; found {type(case.data).__name__}",
    )
    for which, dataset in case.sets.items():
        length = getattr(dataset, "__len__", None)
        expect(
            length is not None, f"the {which} set: expected a map-style dataset with a length; it has none"
        )
        assert length is not None
        expect(length() > 0, f"the {which} set: expected samples; it is empty")


@CHECKS.add()
def tasks_are_as_registered(case: DatasetCase) -> None:
    """The tasks that are built are those that tasks(config) says without data: names, kinds, widths and order."""

    def outline(tasks: Any) -> list[tuple[str, str, int]]:
        return [(task.name, task.kind, task.outputs) for task in tasks]

    said, built = outline(case.registration.tasks(case.config)), outline(case.data.tasks)
    expect_equal(built, said, "the tasks of the data, against tasks(config)")
    names = [name for name, _, _ in said]
    expect(len(set(names)) == len(names) > 0, f"expected one or more tasks of different names; found {names}")
    for name, kind, outputs in said:
        expect(
            name.isidentifier(),
            f"the task {name!r}: expected a name such as 'wear_rate', for a column of files",
        )
        expect(kind in ("regression", "classification"), f"the task {name!r}: found the kind {kind!r}")
        least = 2 if kind == "classification" else 1
        expect(outputs >= least, f"the {kind} {name!r}: expected outputs >= {least}; found {outputs}")


@CHECKS.add()
def samples_are_inputs_targets_meta(case: DatasetCase) -> None:
    """A sample is (inputs, {task: target}, meta): inputs of the described shape, a fitting target for every task."""
    shape = case.data.inputs.shape
    for which, dataset in case.sets.items():
        columns: set[str] | None = None
        for index, sample in spread(dataset):
            where = f"sample {index} of the {which} set"
            expect(
                isinstance(sample, tuple) and len(sample) == 3, f"{where}: expected (inputs, targets, meta)"
            )
            inputs, targets, meta = sample
            expect(
                isinstance(inputs, Tensor),
                f"{where}: expected inputs as a tensor; found {type(inputs).__name__}",
            )
            expect(
                inputs.is_floating_point(), f"{where}: expected floating-point inputs; found {inputs.dtype}"
            )
            expect_equal(
                tuple(inputs.shape), tuple(shape), f"{where}: the shape of the inputs, as InputSpec says it"
            )
            expect_equal(
                set(targets), {task.name for task in case.data.tasks}, f"{where}: the targets' tasks"
            )
            for task in case.data.tasks:
                _expect_target(targets[task.name], task, where)
            for name, value in meta.items():
                expect(
                    torch.is_tensor(value),
                    f"{where}: meta {name!r}: expected a tensor; found {type(value).__name__}",
                )
            columns = set(meta) if columns is None else columns
            expect_equal(set(meta), columns, f"{where}: the names of meta, as in the first sample")


def _expect_target(target: Any, task: TaskSpec, where: str) -> None:
    what = f"{where}: the target of {task.name!r}"
    expect(isinstance(target, Tensor), f"{what}: expected a tensor; found {type(target).__name__}")
    if task.kind == "classification" and task.loss == "cross_entropy" and not target.is_floating_point():
        expect(
            target.dim() == 0 and target.dtype == torch.int64,
            f"{what}: expected one int64 class; found {target}",
        )
        low_to_high = f"0 to {task.outputs - 1}"
        expect(
            0 <= int(target) < task.outputs, f"{what}: expected a class of {low_to_high}; found {int(target)}"
        )
    elif task.kind == "regression":
        expected = () if task.outputs == 1 else (task.outputs,)
        expect(target.is_floating_point(), f"{what}: expected floating point; found {target.dtype}")
        expect_equal(tuple(target.shape), expected, f"{what}: its shape")


@CHECKS.add()
def values_are_finite(case: DatasetCase) -> None:
    """No input and no target is NaN or infinite; a task without labels in a sample needs a set of its own."""
    for which, dataset in case.sets.items():
        for index, (inputs, targets, _) in spread(dataset):
            for name, values in {
                "inputs": inputs,
                **{f"target {name!r}": t for name, t in targets.items()},
            }.items():
                finite = bool(torch.isfinite(values).all())
                expect(finite, f"the {name} of sample {index} of the {which} set: found NaN or infinity")


@CHECKS.add()
def samples_make_batches(case: DatasetCase) -> None:
    """Samples can be collated into batches, and a batch of an InMemoryDataset is its samples."""
    for which, dataset in case.sets.items():
        indices = [index for index, _ in spread(dataset, 5)]
        loader: Any = DataLoader(dataset, batch_sampler=[indices])
        inputs, targets, _ = next(iter(loader))
        expect_equal(
            tuple(inputs.shape), (len(indices), *case.data.inputs.shape), f"a batch of the {which} set"
        )
        for task in case.data.tasks:
            expect_equal(len(targets[task.name]), len(indices), f"the targets {task.name!r} of a batch")
        if isinstance(dataset, InMemoryDataset):
            expect_equal(dataset[torch.tensor(indices)][0], inputs, f"an indexed batch of the {which} set")


@CHECKS.add()
def one_config_one_data_set(case: DatasetCase) -> None:
    """The same config gives the same data, to the last bit, and building draws from no global random generator."""
    with expect_no_draw("build(config)"):
        again = DatasetCase(case.registration, case._options)
        torch.default_generator.manual_seed(1)
        again.data  # noqa: B018
        torch.default_generator.manual_seed(0)
    for which, dataset in again.sets.items():
        expect_equal(len(dataset), len(case.sets[which]), f"the length of the {which} set, built again")  # type: ignore[arg-type]
        if which == "training" and not isinstance(dataset, InMemoryDataset):
            continue  # it may augment
        for (index, one), (_, other) in zip(spread(dataset, 32), spread(case.sets[which], 32), strict=True):
            expect_equal(one[0], other[0], f"the inputs of sample {index} of the {which} set, built again")
            for task in one[1]:
                expect_equal(
                    one[1][task], other[1][task], f"the target {task!r} of sample {index} of the {which} set"
                )


@CHECKS.add()
def sets_do_not_overlap(case: DatasetCase) -> None:
    """No sample of the validation or test set lies in the training set, inputs and targets alike.

    Up to 256 samples of either set are looked for among 4096 of training.
    """

    def print_of(sample: Sample) -> bytes:
        inputs, targets, _ = sample
        return pickle.dumps([inputs.tolist(), *(targets[name].tolist() for name in sorted(targets))])

    trained = {print_of(sample) for _, sample in spread(case.data.train, 4096)}
    for which in case.sets.keys() - {"training"}:
        known = [index for index, sample in spread(case.sets[which]) if print_of(sample) in trained]
        expect(
            not known,
            f"the {which} set: expected no sample of training in it; found {len(known)}, such as {known[:3]} "
            "(data with few different values may repeat by chance: then skip this check)",
        )


@CHECKS.add()
def says_where_it_comes_from(case: DatasetCase) -> None:
    """The protocol and data_source say how the sets were made, facts are plain JSON values, notices are sentences."""
    for name in ("protocol", "data_source"):
        value = getattr(case.data, name)
        expect(
            isinstance(value, str) and value.strip(),
            f"{name}: expected a text for results.json; found {value!r}",
        )
    try:
        json.dumps(dict(case.data.facts), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"facts: expected JSON values; {error}") from error
    for name, value in case.data.facts.items():
        expect(
            isinstance(value, str | int | float | bool),
            f"facts[{name!r}]: expected a JSON scalar; found {value!r}",
        )
    for notice in case.data.notices:
        expect(isinstance(notice, str) and notice.strip(), f"notices: expected sentences; found {notice!r}")


@CHECKS.add()
def workers_can_load_it(case: DatasetCase) -> None:
    """Every set can be pickled, for the processes of a DataLoader, and gives the same samples there."""
    for which, dataset in case.sets.items():
        twin = pickle.loads(pickle.dumps(dataset))
        expect_equal(len(twin), len(dataset), f"the length of the {which} set, pickled")  # type: ignore[arg-type]
        if which != "training" or isinstance(dataset, InMemoryDataset):
            expect_equal(twin[0][0], dataset[0][0], f"the inputs of sample 0 of the {which} set, pickled")


def _whole(case: DatasetCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return targets and meta of the whole test set, in its order."""
    samples = [case.data.test[index] for index in range(len(case.data.test))]  # type: ignore[arg-type]
    targets = {
        task.name: torch.stack([sample[1][task.name] for sample in samples]) for task in case.data.tasks
    }
    meta = {name: torch.stack([sample[2][name] for sample in samples]) for name in samples[0][2]}
    return targets, meta


def _predictions(tasks: Collection[TaskSpec], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a perfect model predicts."""
    perfect = {}
    for task in tasks:
        target = targets[task.name]
        is_class = task.kind == "classification" and not target.is_floating_point()
        if is_class:
            perfect[task.name] = 20.0 * torch.eye(task.outputs)[target]
        else:
            perfect[task.name] = target.float().reshape(len(target), task.outputs).squeeze(-1)
    return perfect


@CHECKS.add()
def losses_are_per_sample(case: DatasetCase) -> None:
    """Every task's loss gives one finite value a sample, differentiable in the prediction."""
    from mtlbalance.training.losses import TaskLosses

    targets, _ = _whole(case)
    targets = {name: values[:8] for name, values in targets.items()}
    predictions = {
        name: p.clone().requires_grad_() for name, p in _predictions(case.data.tasks, targets).items()
    }
    for name, values in TaskLosses(case.data.tasks)(predictions, targets).items():
        expect_equal(tuple(values.shape), (len(targets[name]),), f"the shape of the loss of {name!r}")
        expect(
            bool(values.isfinite().all()),
            f"the loss of {name!r} for perfect predictions: found {values.tolist()}",
        )
        values.sum().backward()  # type: ignore[no-untyped-call]
        expect(
            predictions[name].grad is not None,
            f"the loss of {name!r}: expected a gradient for the prediction",
        )


@CHECKS.add()
def key_metric_prefers_better_predictions(case: DatasetCase) -> None:
    """The evaluator gives finite numbers, the key metric among them, and it prefers perfect to bad predictions."""
    from mtlbalance.training.evaluation import Predictions, score
    from mtlbalance.training.metrics import check_metrics

    check_metrics(case.data.tasks)
    targets, meta = _whole(case)
    perfect = _predictions(case.data.tasks, targets)
    bad = {name: -values + 3.0 * values.float().std(correction=0) for name, values in perfect.items()}
    found = {}
    for label, predictions in {"perfect": perfect, "bad": bad}.items():
        before = {name: values.clone() for name, values in predictions.items()}
        metrics = score(case.data, Predictions(predictions, targets, meta))
        for name, values in predictions.items():
            expect_equal(
                values,
                before[name],
                f"the predictions of {name!r} after evaluate, which must not change them",
            )
        found[label] = metrics[case.data.key_metric]
        expect(math.isfinite(found[label]), f"the key metric for {label} predictions: found {found[label]}")
        again = score(case.data, Predictions(predictions, targets, meta))
        expect_close(again, metrics, f"the metrics of {label} predictions, computed again")
    better = (
        found["perfect"] < found["bad"]
        if case.data.key_metric_mode == "min"
        else found["perfect"] > found["bad"]
    )
    expect(
        better,
        f"the key metric {case.data.key_metric!r} (mode {case.data.key_metric_mode!r}): expected it to prefer "
        f"perfect predictions; found {found['perfect']:.4g} for them and {found['bad']:.4g} for bad ones",
    )


DATASET_CHECKS = CHECKS


def check_dataset(
    registration: DatasetRegistration,
    options: Mapping[str, Any] | None = None,
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> Report:
    """Hold a dataset plugin to what the trainer relies on.

    Args:
        registration: one of those that your ``register_datasets`` returns.
        options: by name, as in a config's ``[dataset]``; small data make a fast test.
        only: the names of the checks to run; default: all.
        skip: the names of checks to leave out.

    Returns:
        The report: the outcome of each check.

    Raises:
        ConformanceError: promises are broken; the text lists what was expected and what was found.

    Example:
        >>> from mtlbalance.plugins import load_plugins
        >>> toy = load_plugins(entry_points=False).get("dataset", "toy")
        >>> check_dataset(toy, {"samples": 60}).broken
        ()
    """
    outcomes = tuple(DATASET_CHECKS.examine(DatasetCase(registration, options), only=only, skip=skip))
    return Report(registration.name, outcomes).raise_if_broken()
