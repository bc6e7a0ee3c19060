"""A dataset held in tensors, which the trainer batches by indexing on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtlbalance.errors import DataError
from mtlbalance.slots import Sample


class InMemoryDataset(Dataset[Sample]):
    """Inputs, targets by task and meta by name as tensors with one shared first dimension.

    Args:
        inputs: (N, ...).
        targets: task name -> (N,) or (N, outputs).
        meta: name -> (N,), what an evaluator needs; empty by default.

    Raises:
        DataError: the first dimensions differ, or there is no sample.
    """

    def __init__(
        self, inputs: Tensor, targets: Mapping[str, Tensor], meta: Mapping[str, Tensor] | None = None
    ) -> None:
        self.inputs = inputs
        self.targets = dict(targets)
        self.meta = dict(meta or {})
        for name, column in (self.targets | self.meta).items():
            if len(column) != len(inputs):
                raise DataError(f"{name!r} has {len(column)} rows, but there are {len(inputs)} inputs")
        if len(inputs) == 0:
            raise DataError("a dataset needs at least one sample")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int | Tensor) -> Sample:
        """Return one sample, or the batch that an index tensor picks."""
        return (
            self.inputs[index],
            {name: column[index] for name, column in self.targets.items()},
            {name: column[index] for name, column in self.meta.items()},
        )

    def to(self, device: torch.device | str) -> InMemoryDataset:
        """Return the dataset with every tensor on ``device``."""
        return InMemoryDataset(
            self.inputs.to(device),
            {name: column.to(device) for name, column in self.targets.items()},
            {name: column.to(device) for name, column in self.meta.items()},
        )
