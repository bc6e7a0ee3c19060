"""Whether an exported model gives the numbers of the model: on real inputs, in several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtlbalance.errors import ExportError
from mtlbalance.slots import Sample
from mtlbalance.training.batches import count_samples
from mtlbalance.training.samples import SeededSamples

Predictor: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]
BATCH_SIZES = (1, 7)  # the model is traced with another one, so a batch size that was fixed on the way shows

_SMALLEST_SCALE = 0.1  # outputs near zero still carry the rounding of the layers before


@dataclass(frozen=True)
class TaskParity:
    """How far the exported model is from the model on one task.

    Args:
        task: its name.
        max_difference: the largest absolute difference of a single output.
        allowed: the tolerance times the model's largest absolute output, or times 0.1 if that is more.
    """

    task: str
    max_difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within what is allowed; a NaN is not."""
        return self.max_difference <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def real_inputs(dataset: Dataset[Sample], dtype: torch.dtype) -> Tensor:
    """Return as many inputs as the largest batch needs, evenly spread over a set.

    Args:
        dataset: a set of the run's data; one that is smaller gives some inputs more than once.
        dtype: the numbers that the model takes.
    """
    count, needed = count_samples(dataset, "given"), max(BATCH_SIZES)
    indices = [index * count // needed for index in range(needed)]
    samples = SeededSamples(dataset, seed=0).__getitems__(indices)
    return torch.stack([torch.as_tensor(inputs) for inputs, _, _ in samples]).to(dtype)


def compare(
    model: Predictor, exported: Predictor, inputs: Tensor, tasks: Sequence[str], tolerance: float
) -> list[TaskParity]:
    """Return the largest difference of each task over all batch sizes.

    Args:
        model: the model.
        exported: what is to give the same.
        inputs: on the CPU.
        tasks: in their order.
        tolerance: of a difference, relative to the model's largest output (or to 0.1).

    Raises:
        ExportError: the exported model fails, or gives outputs of another shape.
    """
    found = dict.fromkeys(tasks, 0.0)
    largest = dict.fromkeys(tasks, _SMALLEST_SCALE)
    for size in BATCH_SIZES:
        batch = inputs[:size]
        expected = model(batch)
        try:
            given = exported(batch)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ExportError(
                f"the exported model fails on a batch of {size}: {type(error).__name__}: {reason}"
            ) from error
        for task in tasks:
            if task not in given or given[task].shape != expected[task].shape:
                shape = tuple(given[task].shape) if task in given else "nothing"
                raise ExportError(
                    f"for a batch of {size}, the exported model gives {shape} for task {task!r}, the model "
                    f"{tuple(expected[task].shape)}"
                )
            difference = (given[task].double() - expected[task].double()).abs().max()
            # torch.maximum keeps a NaN, which Python's max would drop or keep by the order of its arguments.
            found[task] = float(torch.maximum(difference, difference.new_tensor(found[task])))
            largest[task] = max(largest[task], float(expected[task].abs().max()))
    return [TaskParity(task, found[task], tolerance * largest[task]) for task in tasks]
