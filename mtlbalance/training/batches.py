"""Batches on the device: by indexing tensors that lie there, or through a DataLoader.

Both ways draw one permutation an epoch from the same seeded generator, so they give the same batches.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from mtlbalance.datasets.in_memory import InMemoryDataset
from mtlbalance.errors import DataError
from mtlbalance.slots import Sample
from mtlbalance.training.samples import SeededSamples
from mtlbalance.training.team import Team


class Batch(NamedTuple):
    """One training batch on the device."""

    inputs: Tensor
    targets: dict[str, Tensor]
    num_samples: int  # over all ranks
    weight: Tensor | None = None  # (B,), where ranks have shares of different sizes


EvaluationBatch: TypeAlias = tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]


class TrainingBatches(Protocol):
    """The training set, an epoch at a time, as ``(inputs, targets)`` on the device."""

    def __len__(self) -> int: ...
    def epoch(self, first_batch: int = 0) -> Iterator[Batch]:
        """Draw the next epoch's order and yield its batches from ``first_batch`` on."""


class ShuffleOrder:
    """The order of the training samples: a new permutation an epoch, in batches.

    Its two generators are all the randomness that belongs to batching: ``order`` permutes, ``seeds`` gives each
    epoch the seed from which its samples are drawn.
    """

    def __init__(self, num_samples: int, batch_size: int, *, drop_last: bool, seed: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.order = Generator().manual_seed(seed)
        self.seeds = Generator().manual_seed(seed)
        self._before = self._generators()

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + int(rest > 0 and not self.drop_last)

    def draw(self, first_batch: int = 0) -> tuple[Tensor, int]:
        """Draw the next epoch: the sample numbers from ``first_batch`` on, to be split, and the epoch's seed."""
        self._before = self._generators()
        permutation = torch.randperm(self.num_samples, generator=self.order)[: len(self) * self.batch_size]
        seed = int(torch.randint(2**62, (), generator=self.seeds))
        return permutation[first_batch * self.batch_size :], seed

    def shares(self, numbers: Tensor, team: Team) -> Iterator[tuple[Tensor, int, Tensor | None]]:
        """Yield of each batch this rank's sample numbers, the size of the whole batch, and the samples' weights.

        Ranks have shares of the same size, filled up with samples of weight 0 where the batch cannot be divided: the
        mean over ranks of their weighted means is then the mean over the batch.
        """
        for batch in _split(numbers, self.batch_size):
            size = len(batch)
            if team.size == 1:
                yield batch, size, None
                continue
            share = -(-size // team.size)
            places = torch.arange(team.rank * share, (team.rank + 1) * share, device=batch.device)
            weight = None
            if share * team.size != size:
                weight = (places < size).double() * (share * team.size / size)
            yield batch[places.clamp(max=size - 1)], size, weight

    def state_dict(self, *, within_epoch: bool = False) -> dict[str, Tensor]:
        """Return the generators' states; ``within_epoch``: those from which the last epoch was drawn."""
        return self._before if within_epoch else self._generators()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved generators."""
        self.order.set_state(state["order"])
        self.seeds.set_state(state["seeds"])

    def _generators(self) -> dict[str, Tensor]:
        return {"order": self.order.get_state(), "seeds": self.seeds.get_state()}


class _IndexedBatches:
    """Batches of a dataset whose tensors lie on the device."""

    def __init__(
        self, dataset: InMemoryDataset, order: ShuffleOrder, device: torch.device, team: Team
    ) -> None:
        self._inputs = dataset.inputs.to(device)
        self._targets = {name: column.to(device) for name, column in dataset.targets.items()}
        self._order = order
        self._team = team

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, first_batch: int = 0) -> Iterator[Batch]:
        numbers, _ = self._order.draw(first_batch)
        for index, size, weight in self._order.shares(numbers.to(self._inputs.device), self._team):
            yield Batch(
                self._inputs.index_select(0, index),
                {name: column.index_select(0, index) for name, column in self._targets.items()},
                size,
                weight,
            )


class _LoadedBatches:
    """Batches of any map-style dataset."""

    def __init__(
        self,
        dataset: Dataset[Sample],
        order: ShuffleOrder,
        device: torch.device,
        num_workers: int,
        team: Team,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._team = team
        self._device = device
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, first_batch: int = 0) -> Iterator[Batch]:
        numbers, seed = self._order.draw(first_batch)
        shares = self._order.shares(numbers, self._team)
        batches = (index.tolist() for index, _, _ in self._order.shares(numbers, self._team))
        pin = self._device.type == "cuda"
        loaded = _loaded(SeededSamples(self._dataset, seed), batches, self._num_workers, pin_memory=pin)
        for (inputs, targets, _), (_, size, weight) in zip(loaded, shares, strict=True):
            yield Batch(
                inputs.to(self._device, non_blocking=True),
                {name: column.to(self._device, non_blocking=True) for name, column in targets.items()},
                size,
                None if weight is None else weight.to(self._device),
            )


def training_batches(
    dataset: Dataset[Sample],
    order: ShuffleOrder,
    device: torch.device,
    *,
    num_workers: int = 0,
    team: Team | None = None,
) -> TrainingBatches:
    """Return the batches of one set in the given order.

    Args:
        dataset: an ``InMemoryDataset`` is moved to the device once; any other goes through a DataLoader.
        order: what is drawn.
        device: where the batches are needed.
        num_workers: processes that load, for a dataset that is not in memory.
        team: the ranks that share each batch; None: this process alone.
    """
    team = team or Team()
    if isinstance(dataset, InMemoryDataset):
        return _IndexedBatches(dataset, order, device, team)
    return _LoadedBatches(dataset, order, device, num_workers, team)


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
        samples = SeededSamples(self._dataset, seed=0)
        batches = (index.tolist() for index in _split(torch.arange(len(samples)), self._batch_size))
        for inputs, targets, meta in _loaded(samples, batches, self._num_workers):
            yield inputs.to(self._device), targets, meta


def _split(numbers: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(numbers), size):  # one at a time: an epoch may have millions
        yield numbers[start : start + size]


def _loaded(
    samples: SeededSamples, batches: Iterable[list[int]], num_workers: int, *, pin_memory: bool = False
) -> Iterator[Any]:
    # Its own generator: a loader without one draws from torch's global one, which belongs to training.
    loader: DataLoader[Any] = DataLoader(
        samples, batch_sampler=batches, num_workers=num_workers, worker_init_fn=_leave_ctrl_c_to_the_run,
        generator=Generator().manual_seed(0), pin_memory=pin_memory,
    )  # fmt: skip
    loaded = iter(loader)
    _notice_deaths_when_reading()
    yield from loaded


def _notice_deaths_when_reading() -> None:
    """Undo torch's handler for a loading process that dies, which raises wherever the run is at that moment.

    In the middle of a step or of a write nothing can be saved. Without it the death is noticed where the batch is
    missed, within seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    if getattr(signal.getsignal(signal.SIGCHLD), "__module__", "") == signal_handling.__name__:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _leave_ctrl_c_to_the_run(_: int) -> None:
    """Ctrl-C in a terminal goes to every process there; a worker that dies of it would spoil the last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
