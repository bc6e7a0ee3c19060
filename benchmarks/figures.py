"""The figures of a results folder, looked up by what they are of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS = "mtlbalance"


class Figures:
    """What the parts of the suite have written into one folder; a part that was not run has nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, Any] = {
            path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))
        }

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    def __getitem__(self, part: str) -> Any:
        return self.parts[part]

    def machine(self) -> dict[str, Any]:
        """Return the machine that the parts were measured on; what each was of is in ``commits``."""
        found: dict[str, Any] = next(iter(self.parts.values()))["machine"] if self.parts else {}
        return {key: value for key, value in found.items() if key != "commit"}

    def commits(self) -> Iterator[str]:
        """Yield a sentence on which parts were measured at which commit."""
        parts: dict[str, list[str]] = {}
        for name, part in self.parts.items():
            if commit := part["machine"].get("commit"):
                parts.setdefault(commit, []).append(name)
        if parts:
            yield (
                "Commits: "
                + "; ".join(f"{commit} ({', '.join(names)})" for commit, names in parts.items())
                + "."
            )

    def growth(self) -> Row:
        """Return what the growth benchmark found, in however many parts it was run."""
        found: Row = {}
        for part in ("scaling", "scaling_parameters"):
            found |= {key: value for key, value in self.parts.get(part, {}).items() if key != "machine"}
        return found

    def finest(self, part: str, otherwise: str = "steps_mlp") -> Iterator[Row]:
        """Yield the results of a part that measured little in many rounds, else those of one that measured all."""
        return self.workloads(part if part in self.parts else otherwise)

    def workloads(self, *parts: str) -> Iterator[Row]:
        """Yield the results of the step benchmarks, a workload at a time."""
        for part in parts:
            if part in self.parts:
                yield from self.parts[part]["results"]


def pick(result: Row, source: str, method: str, form: str = "") -> Row | None:
    """Return one variant of a workload, or None where it was not measured or failed."""
    for row in result["variants"]:
        if (row["source"], row["method"], row["form"]) == (source, method, form) and "failure" not in row:
            found: Row = row
            return found
    return None


def best(result: Row, source: str, method: str, key: str = "ratio") -> Row | None:
    """Return a source's cheapest form of a method that reads gradients at the trunk, or None."""
    rows = [
        row
        for row in result["variants"]
        if row["source"] == source
        and row["method"] == method
        and row["form"] != "features"
        and "failure" not in row
    ]
    return min(rows, key=lambda row: value_of(row, key)) if rows else None


def value_of(row: Row, key: str = "ratio") -> float:
    """Return a row's number: the median of a ratio, or what it is."""
    value = row[key]
    return float(value["median"] if isinstance(value, dict) else value)


def own_methods(result: Row) -> list[str]:
    """Return the methods of ours that were measured, in their plain form."""
    return [row["method"] for row in result["variants"] if row["source"] == OURS and not row["form"]]


def with_interval(ratio: Row, digits: int = 2) -> str:
    """Return a ratio as text."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f}-{ratio['high']:.{digits}f})"


def by_process(row: Row) -> list[list[float]]:
    """Return a variant's seconds of a step in every round, a list for each process that measured it."""
    seconds: list[Any] = row["seconds_per_step"]
    return seconds if seconds and isinstance(seconds[0], list) else [seconds]
