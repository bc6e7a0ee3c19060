"""What the benchmarks share: paired ratios with an interval, the machine in words, a table, a JSON file."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LISTS_OF_NUMBERS = re.compile(r"\[\s+([-+\d.eE,\s]+?)\s+\]")


@dataclass(frozen=True)
class Ratio:
    """A median ratio and its 95 % bootstrap interval over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"

    @property
    def half_width(self) -> float:
        """How far the interval reaches to the farther side of the median."""
        return max(self.high - self.median, self.median - self.low)


def paired_ratio(seconds: Sequence[float], baseline_seconds: Sequence[float]) -> Ratio:
    """Return the median over rounds of one cost over the baseline's cost in the same round.

    Pairing within a round cancels what slows the whole machine for a while. Both start at the first round; where
    one was measured for longer, the rounds that only one has are left out.
    """
    return _bootstrapped(_in_pairs(seconds, baseline_seconds))


def pooled_ratio(seconds: Sequence[Sequence[float]], baseline_seconds: Sequence[Sequence[float]]) -> Ratio:
    """Return the same of several processes: the median of their medians, and its interval over processes.

    Where a process puts its tensors makes a step up to some per cent faster or slower, and all rounds of the
    process alike, so that an interval over the rounds of one is too narrow.
    """
    ratios = [_in_pairs(*pair) for pair in zip(seconds, baseline_seconds, strict=True)]
    return _bootstrapped(ratios[0] if len(ratios) == 1 else np.array([np.median(one) for one in ratios]))


def _in_pairs(seconds: Sequence[float], baseline_seconds: Sequence[float]) -> NDArray[np.float64]:
    count = min(len(seconds), len(baseline_seconds))
    ratios: NDArray[np.float64] = np.asarray(seconds[:count]) / np.asarray(baseline_seconds[:count])
    return ratios


def _bootstrapped(ratios: NDArray[np.float64]) -> Ratio:
    """Return the median with its interval."""
    drawn = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def begin(threads: int = 1, device: str = "cpu") -> dict[str, str | int]:
    """Take so many threads and a fixed seed, print what is measured on, and return it."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = machine(threads, device)
    print(in_words(where))
    return where


def machine(threads: int, device: str = "cpu") -> dict[str, str | int]:
    """Describe what the figures were measured on, by its parts and never by its name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, str | int] = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cpus": len(models),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": threads,
    }
    if commit := _commit():
        found["commit"] = commit
    if device.startswith("cuda"):
        import torch

        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or ""}
    return found


def _commit() -> str:
    """Return the last commit of what is measured, where this is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "../mtlbalance"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def in_words(where: Mapping[str, str | int]) -> str:
    """Return a machine on one line."""
    return ", ".join(f"{key} {value}" for key, value in where.items())


def markdown_row(cells: Sequence[object]) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def markdown_header(names: Sequence[str]) -> str:
    """Return the first two lines of a Markdown table."""
    return markdown_row(names) + "\n" + markdown_row(["---"] * len(names))


def rounded(seconds: Sequence[float]) -> list[float]:
    """Return times with four digits, which is more than they bear."""
    return [float(f"{value:.4g}") for value in seconds]


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write the figures with what they were measured on, if a path was given; a list of numbers takes one line."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, default=asdict)
    text = _LISTS_OF_NUMBERS.sub(lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
    path.write_text(text + "\n", encoding="utf-8")
