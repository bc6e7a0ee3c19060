"""What the parts of on_gpu.py are given, and what they give back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "cmapss"

Lines = list[tuple[str, str]]
State = Literal["done", "going on", "skipped", "failed"]


@dataclass(frozen=True)
class Setting:
    """Where and how everything is measured."""

    device: str
    quick: bool
    out: Path

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Turn:
    """What came of the seconds that a part was given; ``lines`` are for the table."""

    state: State
    lines: Lines
    note: str = ""


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Args:
        name: of its files and in ``--only``.
        take: what it does in so many seconds.
        seconds: at most in its first turn; what is going on then gets what is left at the end.
        least: with fewer seconds it does not begin.
        needs_cuda: whether a CPU has nothing to tell.
    """

    name: str
    take: Callable[[Setting, float], Turn]
    seconds: float
    least: float
    needs_cuda: bool = False


def environment() -> dict[str, str]:
    """Return the environment of a process that imports the package and the example from this repository."""
    before = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(EXAMPLE), *([before] if before else [])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
