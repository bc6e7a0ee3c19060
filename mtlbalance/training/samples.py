"""Reading samples one by one, so that what a sample is depends on the epoch and its number alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtlbalance.errors import DataError, TrainingError

T = TypeVar("T")

_MIX_64 = 2**64 - 1


class SeededSamples(Dataset[Any]):
    """A dataset each of whose samples is drawn from a seed of its own.

    An augmentation that uses the generators of Python, NumPy or torch (CPU) then gives the same sample whichever
    process loads it, in whichever batch, and after a resume; and it leaves the generators of training alone.
    A dataset with ``__getitems__`` loads whole batches: they are drawn from the seed of their first sample.

    Args:
        dataset: any map-style dataset.
        seed: of the epoch.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._get_batch = getattr(dataset, "__getitems__", None)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples of one batch."""
        with _own_generators():
            if self._get_batch is not None:
                _seed_cpu(sample_seed(self.seed, indices[0]))
                return list(self._get_batch(indices))
            samples = []
            for index in indices:
                _seed_cpu(sample_seed(self.seed, index))
                samples.append(self.dataset[index])
            return samples


def first_input(dataset: Dataset[Any]) -> Tensor:
    """Return the input of sample 0, whatever it draws at random leaving the generators alone."""
    [sample] = SeededSamples(dataset, seed=0).__getitems__([0])
    inputs: Tensor = sample[0]
    return inputs


def sample_seed(epoch_seed: int, index: int) -> int:
    """Return a 32-bit seed from both numbers, well mixed (splitmix64): neighbours have unrelated seeds."""
    mixed = (epoch_seed + (index + 1) * 0x9E3779B97F4A7C15) & _MIX_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MIX_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MIX_64
    return (mixed ^ (mixed >> 31)) & 0xFFFFFFFF


def reading(batches: Iterator[T], dataset: str, which: str) -> Iterator[T]:
    """Yield what ``batches`` yields; what the system refuses while a sample is read names the dataset.

    Raises:
        DataError: an OSError came out of the dataset.
        TrainingError: a process that loads samples has died.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except OSError as error:
            raise DataError(
                f"dataset {dataset!r} could not read its {which} set: {type(error).__name__}: {error}; once it can be "
                "read again, start the run again and it goes on"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a process that loads samples of dataset {dataset!r} has died, perhaps out of memory ({error}); "
                "lower training.num_workers"
            ) from error
        yield batch


def _seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # of the CPU alone: an accelerator's belong to the model


@contextmanager
def _own_generators() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)
