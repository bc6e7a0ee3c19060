"""Telling data apart: what a run remembers of its data, so that no other data is mixed into its results."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from mtlbalance.datasets.in_memory import InMemoryDataset
from mtlbalance.slots import MultiTaskData
from mtlbalance.training.batches import count_samples
from mtlbalance.training.data import named_sets
from mtlbalance.training.record import strict_json


def fingerprint(data: MultiTaskData) -> dict[str, Any]:
    """Return source, protocol, facts, sizes and, of sets in memory, SHA-256 sums, as JSON values.

    A set that is not in memory is told by its size alone: reading it whole could take as long as training.
    """
    sets = named_sets(data)
    described: dict[str, Any] = strict_json(
        {
            "data_source": data.data_source,
            "protocol": data.protocol,
            "facts": dict(data.facts),
            "samples": {which: count_samples(dataset, which) for which, dataset in sets.items()},
            "sha256": {
                which: _sha256(dataset)
                for which, dataset in sets.items()
                if isinstance(dataset, InMemoryDataset)
            },
        }
    )
    return described


def _sha256(dataset: InMemoryDataset) -> str:
    found = hashlib.sha256()
    columns = {"inputs": {"": dataset.inputs}, "targets": dataset.targets, "meta": dataset.meta}
    for kind, tensors in columns.items():
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            found.update(f"{kind} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
