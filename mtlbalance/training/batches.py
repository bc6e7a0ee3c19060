"""Batches on the device: by indexing tensors that lie there, or through a DataLoader.

Both ways draw one permutation an epoch from the same seeded generator, so they give the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from mtlbalance.datasets.in_memory import InMemoryDataset
from mtlbalance.errors import DataError
from mtlbalance.slots import Sample
from mtlbalance.training.seeding import seed_worker

Batch: TypeAlias = tuple[Tensor, dict[str, Tensor]]
EvaluationBatch: TypeAlias = tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]


class TrainingBatches(Protocol):
    """Iterating gives one epoch of shuffled ``(inputs, targets)`` on the device."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


class ShuffleOrder:
    """The order of the training samples: a new permutation each time it is iterated, in batches.

    Its two generators are all the randomness that belongs to batching: ``order`` permutes, ``workers``
    seeds the DataLoader's processes.
    """

    def __init__(self, num_samples: int, batch_size: int, *, drop_last: bool, seed: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.order = Generator().manual_seed(seed)
        self.workers = Generator().manual_seed(seed)

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + int(rest > 0 and not self.drop_last)

    def permutation(self) -> Tensor:
        """Draw the next epoch's order, cut to whole batches where the last one is dropped."""
        drawn = torch.randperm(self.num_samples, generator=self.order)
        return drawn[: len(self) * self.batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        for chunk in torch.split(self.permutation(), self.batch_size):
            yield chunk.tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generators' states."""
        return {"order": self.order.get_state(), "workers": self.workers.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved generators."""
        self.order.set_state(state["order"])
        self.workers.set_state(state["workers"])


class _IndexedBatches:
    """Batches of a dataset whose tensors lie on the device."""

    def __init__(self, dataset: InMemoryDataset, order: ShuffleOrder, device: torch.device) -> None:
        self._inputs = dataset.inputs.to(device)
        self._targets = {name: column.to(device) for name, column in dataset.targets.items()}
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        permutation = self._order.permutation().to(self._inputs.device)
        for index in torch.split(permutation, self._order.batch_size):
            yield (
                self._inputs.index_select(0, index),
                {name: column.index_select(0, index) for name, column in self._targets.items()},
            )


class _LoadedBatches:
    """Batches of any map-style dataset."""

    def __init__(
        self, dataset: Dataset[Sample], order: ShuffleOrder, device: torch.device, num_workers: int
    ) -> None:
        self._device = device
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            worker_init_fn=seed_worker,
            generator=order.workers,
            pin_memory=device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets, _ in self._loader:
            yield (
                inputs.to(self._device, non_blocking=True),
                {name: column.to(self._device, non_blocking=True) for name, column in targets.items()},
            )


def training_batches(
    dataset: Dataset[Sample], order: ShuffleOrder, device: torch.device, *, num_workers: int = 0
) -> TrainingBatches:
    """Return the batches of one set in the given order.

    Args:
        dataset: an ``InMemoryDataset`` is moved to the device once; any other goes through a DataLoader.
        order: what is drawn.
        device: where the batches are needed.
        num_workers: processes that load, for a dataset that is not in memory.
    """
    if isinstance(dataset, InMemoryDataset):
        return _IndexedBatches(dataset, order, device)
    return _LoadedBatches(dataset, order, device, num_workers)


class EvaluationBatches:
    """A set in its own order: inputs on the device, targets and meta on the CPU."""

    def __init__(
        self, dataset: Dataset[Sample], batch_size: int, device: torch.device, *, num_workers: int = 0
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._device = device
        self._num_workers = num_workers
        self._inputs = dataset.inputs.to(device) if isinstance(dataset, InMemoryDataset) else None

    def __iter__(self) -> Iterator[EvaluationBatch]:
        if self._inputs is not None:
            dataset = cast(InMemoryDataset, self._dataset)
            for start in range(0, len(dataset), self._batch_size):
                rows = slice(start, start + self._batch_size)
                yield (
                    self._inputs[rows],
                    {name: column[rows].cpu() for name, column in dataset.targets.items()},
                    {name: column[rows].cpu() for name, column in dataset.meta.items()},
                )
            return
        # Its own generator: a loader without one draws from torch's global one, which belongs to training.
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            worker_init_fn=seed_worker,
            generator=Generator().manual_seed(0),
        )
        for inputs, targets, meta in loader:
            yield inputs.to(self._device), targets, meta


def count_samples(dataset: Dataset[Sample], which: str) -> int:
    """Return a set's length.

    Raises:
        DataError: it is empty, or has no length.
    """
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(f"the {which} set has no length; a map-style dataset is needed") from error
    if count == 0:
        raise DataError(f"the {which} set is empty")
    return count
