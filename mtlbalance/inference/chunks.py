"""Inputs a chunk at a time, whatever they come from, so that memory holds one chunk of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtlbalance.errors import DataError, PredictionError
from mtlbalance.slots import InputSpec, Sample
from mtlbalance.training.batches import EvaluationBatch, EvaluationBatches, count_samples

Chunk: TypeAlias = EvaluationBatch  # inputs, targets by task, meta by name
Array: TypeAlias = "Tensor | npt.NDArray[Any]"


def dataset_chunks(
    dataset: Dataset[Sample], batch_size: int, *, name: str, num_workers: int = 0
) -> Iterator[Chunk]:
    """Yield a map-style dataset in its own order.

    Args:
        dataset: what is read.
        batch_size: samples a chunk.
        name: of the dataset, for messages.
        num_workers: processes that load a dataset that is not in memory.

    Raises:
        DataError: it is empty, or cannot be read.
        PredictionError: a process that loads samples has died.
    """
    count_samples(dataset, "given")
    try:
        yield from EvaluationBatches(dataset, batch_size, torch.device("cpu"), num_workers=num_workers)
    except OSError as error:
        raise DataError(f"dataset {name!r} could not be read: {type(error).__name__}: {error}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise PredictionError(
            f"a process that loads samples of dataset {name!r} has died, perhaps for want of memory ({error}); lower "
            "the batch size or training.num_workers"
        ) from error


def array_chunks(array: Array, spec: InputSpec, batch_size: int, *, source: str) -> Iterator[Chunk]:
    """Yield an array (N, *shape) in chunks; one that is mapped from a file is read a chunk at a time.

    Args:
        array: numbers.
        spec: the shape of one input.
        batch_size: inputs a chunk.
        source: what to call it in messages.

    Raises:
        DataError: it has another shape, no rows, or no numbers.
    """
    if isinstance(array, np.ndarray) and array.dtype.kind not in "fiub":
        raise DataError(f"{source}: numbers are needed, but they are of type {array.dtype}")
    if isinstance(array, Tensor) and (kind := _cannot_be_read(array)):
        raise DataError(f"{source}: real numbers, each of them there, are needed, but the tensor is {kind}")
    check_shape(tuple(array.shape), spec, source=source)
    if len(array) == 0:
        raise DataError(f"{source}: there is nothing to predict on: the shape is {tuple(array.shape)}")
    for start in range(0, len(array), batch_size):
        rows = array[start : start + batch_size]
        yield (rows if isinstance(rows, Tensor) else _tensor(rows, source)), {}, {}


def _cannot_be_read(tensor: Tensor) -> str:
    """Return what a tensor is that has no rows of real numbers, or an empty text."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    kinds = {"complex": tensor.is_complex(), "quantised": tensor.is_quantized, "on 'meta'": tensor.is_meta}
    return next((name for name, found in kinds.items() if found), "")


def check_shape(shape: tuple[int, ...], spec: InputSpec, *, source: str) -> None:
    """Raise DataError unless ``shape`` is (N, *shape of one input)."""
    if shape[1:] == spec.shape and shape:
        return
    expected = f"(N, {', '.join(map(str, spec.shape))})"
    hint = "; for a single input, add a first dimension of 1" if shape == spec.shape else ""
    named = f" ({spec.description})" if spec.description else ""
    raise DataError(f"{source}: expected the shape {expected}{named}, found {shape}{hint}")


def read_array(inputs: Any) -> Array:
    """Return tensors and arrays as they are, and anything else as an array.

    Raises:
        DataError: it cannot be one.
    """
    if isinstance(inputs, Tensor | np.ndarray):
        return inputs
    try:
        return np.asarray(inputs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"the inputs cannot be made an array: {error}") from error


def _tensor(rows: npt.NDArray[Any], source: str) -> Tensor:
    # A copy: a mapped file cannot be written to, big-endian numbers and negative strides are not torch's.
    own = np.array(rows, dtype=rows.dtype.newbyteorder("="), order="C", copy=True)
    try:
        return torch.from_numpy(own)
    except TypeError as error:
        raise DataError(f"{source}: torch has no numbers of type {rows.dtype}") from error
