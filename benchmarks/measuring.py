"""What the benchmarks share: paired ratios with an interval, the machine in words, a table, a JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A median ratio and its 95 % bootstrap interval over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def paired_ratio(seconds: Sequence[float], baseline_seconds: Sequence[float]) -> Ratio:
    """Return the median over rounds of one cost over the baseline's cost in the same round.

    Pairing within a round cancels what slows the whole machine for a while.
    """
    ratios = np.asarray(seconds) / np.asarray(baseline_seconds)
    drawn = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def machine(threads: int) -> dict[str, str | int]:
    """Describe what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cpus": len(models),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": threads,
    }


def markdown_row(cells: Sequence[object]) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def markdown_header(names: Sequence[str]) -> str:
    """Return the first two lines of a Markdown table."""
    return markdown_row(names) + "\n" + markdown_row(["---"] * len(names))


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write the figures with what they were measured on, if a path was given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=asdict) + "\n", encoding="utf-8")
