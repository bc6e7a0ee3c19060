"""The data of a run: built by the dataset's plugin, then held to what its registration said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from mtlbalance.datasets.in_memory import InMemoryDataset
from mtlbalance.errors import DataError, PluginError, did_you_mean
from mtlbalance.plugins.references import build_plugin
from mtlbalance.slots import MultiTaskData, Sample, TaskSpec
from mtlbalance.training.batches import count_samples
from mtlbalance.training.metrics import check_metrics
from mtlbalance.training.samples import first_input, reading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtlbalance.config import RunConfig


def build_data(config: RunConfig) -> MultiTaskData:
    """Build the data and find now what would otherwise spoil a run silently, or late.

    Raises:
        PluginError: the build fails, or gives other tasks than the registration says.
        DataError: a set is empty or too small, or its targets do not fit the tasks.
    """
    data: MultiTaskData = build_plugin(config.dataset.registration, config.dataset.options)
    _check_tasks(config, data)
    check_metrics(data.tasks)
    sets = named_sets(data)
    counts = {which: count_samples(dataset, which) for which, dataset in sets.items()}
    if config.training.drop_last and counts["training"] < config.training.batch_size:
        raise DataError(
            f"the training set has {counts['training']} samples, less than one batch of "
            f"{config.training.batch_size}, and training.drop_last would drop it; lower training.batch_size"
        )
    for which, dataset in sets.items():
        if isinstance(dataset, InMemoryDataset):
            _check_targets(dataset.targets, data.tasks, which)
            _check_classes(dataset.targets, data.tasks, which)
        elif which != "test" or data.validation is None:  # a test set kept apart is read once, at the end
            first = next(reading(map(dataset.__getitem__, [0]), config.dataset.name, which))
            _check_targets(first[1], data.tasks, which)
    return data


def named_sets(data: MultiTaskData) -> dict[str, Dataset[Sample]]:
    """Return the sets that there are: ``training``, ``validation``, ``test``."""
    sets = {"training": data.train, "validation": data.validation, "test": data.test}
    return {which: dataset for which, dataset in sets.items() if dataset is not None}


def describe_inputs(data: MultiTaskData) -> dict[str, Any]:
    """Return what one input is, as JSON values: with it, a run's model can be built where its data is not."""
    watched = data.test if data.validation is None else data.validation
    return {
        "shape": list(data.inputs.shape),
        "dtype": str(first_input(watched).dtype).removeprefix("torch."),
        "description": data.inputs.description,
        "feature_names": list(data.inputs.feature_names),
    }


def _check_tasks(config: RunConfig, data: MultiTaskData) -> None:
    said, built = _outlines(config.tasks), _outlines(data.tasks)
    if said != built:
        raise PluginError(
            f"dataset {config.dataset.name!r} is registered with the tasks {', '.join(said)}, but its build "
            f"gives {', '.join(built) or 'none'}; both must be the same, in the same order"
        )


def _outlines(tasks: Sequence[TaskSpec]) -> list[str]:
    return [f"{task.name!r} ({task.kind}, {task.outputs} outputs)" for task in tasks]


def _check_targets(targets: Mapping[str, Tensor], tasks: Sequence[TaskSpec], which: str) -> None:
    """A task without targets would never be trained, and nothing else would say so."""
    names = [task.name for task in tasks]
    unknown = [key for key in targets if key not in names]
    missing = [name for name in names if name not in targets]
    if unknown:
        close = did_you_mean(unknown[0], missing or names)
        raise DataError(
            f"the {which} set has targets for {unknown[0]!r}, which is no task{close} "
            f"(tasks: {', '.join(names)}; what an evaluator needs belongs in meta)"
        )
    if missing:
        raise DataError(
            f"the {which} set has no targets for task {missing[0]!r}, which would never be trained or scored "
            f"(it has targets for {', '.join(targets) or 'nothing'})"
        )


def _check_classes(targets: Mapping[str, Tensor], tasks: Sequence[TaskSpec], which: str) -> None:
    for task in tasks:
        classes = targets[task.name]
        if task.loss != "cross_entropy" or classes.is_floating_point():
            continue
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= task.outputs:
            raise DataError(
                f"the {which} set's targets of task {task.name!r} go from {low} to {high}, but with "
                f"{task.outputs} outputs its classes are 0 to {task.outputs - 1}"
            )
