"""Files to predict on: finished inputs (.npy, .npz, .pt, .csv), or a file of the dataset's own form."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mtlbalance.errors import DataError, MtlBalanceError
from mtlbalance.inference.chunks import Array, Chunk, array_chunks, dataset_chunks
from mtlbalance.plugins.importing import describe_failure
from mtlbalance.slots import InputSpec

if TYPE_CHECKING:
    from mtlbalance.inference.loaded_run import LoadedRun

SUFFIXES = (".npy", ".npz", ".pt", ".csv")
_NAME = "inputs"  # in a file of several arrays


def read_chunks(path: Path, run: LoadedRun, batch_size: int, *, raw: bool = False) -> Iterator[Chunk]:
    """Return the inputs in a file, a chunk at a time.

    ``.npy``, ``.npz``, ``.pt`` and ``.csv`` hold finished inputs, scaled as the run's dataset gives them: an array
    (N, *shape), in a file of several the one named ``inputs``; in CSV a row an input, flattened, with or without a
    header. Any other file is read by the dataset's ``read_inputs``, which needs the run's data.

    Args:
        path: the file.
        run: whose model is to predict.
        batch_size: inputs a chunk.
        raw: let the dataset read this file, whatever its name.

    Raises:
        DataError: the file is missing or malformed, or of another shape, or nobody can read it.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'this is a folder' if path.is_dir() else 'no such file'}")
    suffix = path.suffix.lower()
    if raw or suffix not in SUFFIXES:
        return _raw_chunks(path, run, batch_size)
    if suffix == ".csv":
        return _csv_chunks(path, run.inputs, batch_size)
    array = _read_tensors(path) if suffix == ".pt" else _read_numpy(path)
    return array_chunks(array, run.inputs, batch_size, source=str(path))


def _raw_chunks(path: Path, run: LoadedRun, batch_size: int) -> Iterator[Chunk]:
    name, read_inputs = run.config.dataset.name, run.data.read_inputs
    if read_inputs is None:
        raise DataError(
            f"{path}: dataset {name!r} reads no files of its own; give finished inputs in {', '.join(SUFFIXES)}"
        )
    try:
        dataset = read_inputs(path)
    except MtlBalanceError:
        raise
    except Exception as error:
        reason, place = describe_failure(error, getattr(read_inputs, "__module__", ""))
        raise DataError(
            f"{path}: dataset {name!r} cannot read it: {reason}{f' (at {place})' if place else ''}"
        ) from error
    return dataset_chunks(dataset, batch_size, name=name)


def _read_numpy(path: Path) -> Array:
    try:
        if path.suffix.lower() == ".npy":
            return np.lib.format.open_memmap(path, mode="r")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return np.asarray(found[_only_or_named(path, found.files)])
    except DataError:
        raise
    except Exception as error:  # a torn file can end in any error of the parser
        raise DataError(f"{path}: cannot be read as a NumPy file of numbers: {error}") from error


def _read_tensors(path: Path) -> Array:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as above; nothing in the file is executed
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read as a file of tensors: {reason}") from error
    if isinstance(found, dict):
        found = found[_only_or_named(path, list(found))]
    if not isinstance(found, Tensor):
        raise DataError(f"{path}: holds {type(found).__name__}, not a tensor")
    return found


def _only_or_named(path: Path, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if _NAME in names:
        return _NAME
    raise DataError(
        f"{path}: holds {', '.join(map(str, names)) or 'nothing'}; call the array to predict on {_NAME!r}"
    )


def _csv_chunks(path: Path, spec: InputSpec, batch_size: int) -> Iterator[Chunk]:
    rows: list[list[float]] = []
    empty = True
    for row in _csv_rows(path, spec):
        empty = False
        rows.append(row)
        if len(rows) == batch_size:
            yield _rows_chunk(rows, spec)
            rows = []
    if empty:
        raise DataError(f"{path}: there is nothing to predict on: the file has no rows of numbers")
    if rows:
        yield _rows_chunk(rows, spec)


def _csv_rows(path: Path, spec: InputSpec) -> Iterator[list[float]]:
    width = math.prod(spec.shape)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            first = True
            for fields in lines:
                if not any(field.strip() for field in fields):
                    continue
                place = f"{path}:{lines.line_num}"
                if len(fields) != width:
                    raise DataError(
                        f"{place}: expected {width} columns, one flattened input of shape {spec.shape} a row, "
                        f"found {len(fields)}"
                    )
                numbers = [_number(field) for field in fields]
                if first and _counts_columns(fields):
                    warnings.warn(
                        f"{place}: this row, which counts columns, is taken for a header; if it is an input, put a row "
                        "of names above it",
                        stacklevel=2,
                    )
                elif None not in numbers:
                    yield [number for number in numbers if number is not None]
                elif first and all(number is None for number in numbers):
                    _check_header([field.strip() for field in fields], spec, place)
                else:
                    column = numbers.index(None)
                    raise DataError(f"{place}: column {column + 1} holds {fields[column]!r}, not a number")
                first = False
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error


def _counts_columns(fields: list[str]) -> bool:
    """Return whether this is 0, 1, 2, …: the header that pandas gives an array, not an input."""
    return len(fields) > 2 and fields == [str(number) for number in range(len(fields))]


def _check_header(names: list[str], spec: InputSpec, place: str) -> None:
    """Columns in another order would be taken for one another without a word."""
    expected = list(spec.feature_names)
    if len(spec.shape) == 1 and len(expected) == len(names) and names != expected:
        column = next(
            index for index, pair in enumerate(zip(names, expected, strict=True)) if pair[0] != pair[1]
        )
        raise DataError(
            f"{place}: column {column + 1} is {names[column]!r}, but the model's feature there is "
            f"{expected[column]!r}; the order is {', '.join(expected)}"
        )


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _rows_chunk(rows: list[list[float]], spec: InputSpec) -> Chunk:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), *spec.shape), {}, {}
