"""Predictions as a CSV file: a row a sample, written as they come."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtlbalance.errors import DataError, WriteError
from mtlbalance.inference.predicting import PredictedChunk, probabilities
from mtlbalance.slots import TaskSpec
from mtlbalance.training import atomic


@dataclass(frozen=True)
class WrittenTable:
    """What was written.

    Args:
        samples: rows.
        columns: their names, in order.
        non_finite: samples with a prediction that is NaN or infinite, by task; those without are left out.
    """

    samples: int
    columns: tuple[str, ...]
    non_finite: dict[str, int]


def write_predictions(
    path: Path, chunks: Iterable[PredictedChunk], tasks: Sequence[TaskSpec], *, logits: bool = False
) -> WrittenTable:
    """Write predictions to ``path``, which is either whole or as it was.

    The columns are those of meta by their names; ``predicted_<task>`` (``predicted_<task>_<n>`` for each of several
    outputs); for a classification the likeliest class as ``predicted_<task>``, then ``probability_<task>_<class>``, or
    ``logit_<task>_<class>``; and ``target_<task>`` where targets are known. Numbers keep all their digits.

    Args:
        path: the file; its folder is made if need be.
        chunks: what the model gave, logits for classifications.
        tasks: their order is that of the columns.
        logits: a classification's logits instead of its probabilities.

    Raises:
        DataError: two columns would have the same name.
        WriteError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
    columns: list[str] = []
    samples = 0
    non_finite = {task.name: 0 for task in tasks}
    with atomic.replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for chunk in chunks:
            table = _columns(chunk, tasks, logits=logits)
            if not columns:
                columns = [name for name, _ in table]
                _check_names(columns)
                writer.writerow(columns)
            writer.writerows(zip(*(values for _, values in table), strict=True))
            for task in tasks:
                output = chunk.outputs[task.name]
                samples_of_task = output.reshape(len(output), -1)
                non_finite[task.name] += int((~torch.isfinite(samples_of_task).all(dim=1)).sum())
            samples += len(chunk.outputs[tasks[0].name])
    return WrittenTable(samples, tuple(columns), {name: count for name, count in non_finite.items() if count})


def _columns(
    chunk: PredictedChunk, tasks: Sequence[TaskSpec], *, logits: bool
) -> list[tuple[str, list[Any]]]:
    table = [column for name, values in chunk.meta.items() for column in _flat(name, values)]
    for task in tasks:
        output = chunk.outputs[task.name]
        if task.kind == "classification":
            shown = output if logits else probabilities(output)
            table.append((f"predicted_{task.name}", _classes(output)))
            table += _flat(f"{'logit' if logits else 'probability'}_{task.name}", shown, numbered=True)
        else:
            table += _flat(f"predicted_{task.name}", output)
    for task in tasks:
        if task.name in chunk.targets:
            table += _flat(f"target_{task.name}", chunk.targets[task.name])
    return table


def _flat(name: str, values: Tensor, *, numbered: bool = False) -> list[tuple[str, list[Any]]]:
    """Return one column, or one for each number a sample."""
    if values.dim() == 1 and not numbered:
        return [(name, values.tolist())]
    return [
        (f"{name}_{index}", column.tolist()) for index, column in enumerate(values.flatten(1).unbind(dim=1))
    ]


def _classes(logits: Tensor) -> list[int]:
    """Return the likeliest class of each sample; a single logit is that of class 1 against class 0."""
    classes: list[int] = (
        logits.argmax(dim=-1) if logits.shape[-1] > 1 else (logits.squeeze(-1) > 0).long()
    ).tolist()
    return classes


def _check_names(columns: Sequence[str]) -> None:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice:
        raise DataError(
            f"two columns would be called {twice!r}: the dataset's meta needs another name for it"
        )
