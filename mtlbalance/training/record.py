"""What a run writes about itself: CSV rows, events, results."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from mtlbalance.training import atomic

Row: TypeAlias = dict[str, float | int | None]

_TRAINING_COLUMNS = {"epoch", "step", "lr", "weight_decay", "train_loss", "seconds"}


class CsvTable:
    """A CSV file that grows by a row an epoch; None and NaN are empty fields, floats keep all their digits.

    A row need not have every column, and may bring new ones: a metric that is not defined in every epoch.

    Args:
        path: the file.
        rows: those that are known already; the file is cut back to them, and not there without any.
    """

    def __init__(self, path: Path, rows: Sequence[Row]) -> None:
        self._path = path
        self._rows: list[Row] = []
        self._columns: list[str] = []
        if rows:
            self._rewrite(rows)
        else:
            with atomic.writing(path):
                path.unlink(missing_ok=True)

    def append(self, row: Row) -> None:
        """Add a row at the end."""
        if not row.keys() <= set(self._columns):
            self._rewrite([*self._rows, row])
            return
        self._rows.append(row)
        with atomic.writing(self._path), self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines([self._fields(row)]))

    def _rewrite(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self._columns = list(dict.fromkeys(column for row in rows for column in row))
        atomic.write_text(self._path, _lines([self._columns, *map(self._fields, rows)]))

    def _fields(self, row: Row) -> list[float | int | None]:
        return [row.get(column) for column in self._columns]


class EventLog:
    """``log.jsonl``: one JSON object a line, with its UTC time."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, event: str, **details: Any) -> None:
        """Add an event; without a path, on all ranks but the first, nothing."""
        if self._path is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event} | details
        text = json.dumps(strict_json(line), default=str) + "\n"
        with atomic.writing(self._path), self._path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn by a kill or a full disk
                    text = "\n" + text
            file.write(text.encode())


def is_training_column(name: str) -> bool:
    """Return whether a column of ``metrics.csv`` is about training, not a metric of the watched set."""
    return name in _TRAINING_COLUMNS or name.startswith("train_loss_")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file."""
    atomic.write_bytes(path, json_bytes(content))


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return a JSON file's content."""
    return (json.dumps(strict_json(content), indent=2, allow_nan=False) + "\n").encode()


def strict_json(value: Any) -> Any:
    """Return ``value`` as strict JSON readers need it: NaN and infinities as null, NumPy's numbers as Python's.

    What JSON has no form for becomes text: nothing that a plugin put among its facts may cost a result.
    """
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _lines(rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    shown = [
        [None if isinstance(field, float) and math.isnan(field) else field for field in row] for row in rows
    ]
    csv.writer(buffer, lineterminator="\n").writerows(shown)
    return buffer.getvalue()
