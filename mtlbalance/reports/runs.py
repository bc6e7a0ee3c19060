"""Finished runs, read from their folders."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtlbalance.errors import RunFolderError
from mtlbalance.sweeps.folder_state import results_are_damaged

_PASSED_OVER = re.compile(r"^\.|\.old-\d+$")


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, the content of its ``results.json``, and its resolved config by dotted key."""

    folder: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics at the best epoch that are finite numbers; those of a validation set as ``validation_...``."""
        return {
            name: float(value)
            for name, value in self.recorded.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }

    @property
    def recorded(self) -> dict[str, Any]:
        """The same as they were written, with those that are none: a NaN is recorded as null."""
        validation = self.results.get("validation_metrics") or {}
        return {
            **self.results["metrics"],
            **{f"validation_{name}": value for name, value in validation.items()},
        }


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        RunFolderError: it is not finished, or a file of it cannot be read.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        path = folder / "config.resolved.toml"
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{folder} is not a finished run: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    if results_are_damaged(folder):
        raise RunFolderError(
            f"{folder / 'results.json'} is not what sums.json says it was; the run, started again, makes it anew"
        )
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        raise RunFolderError(f"{path.with_name('results.json')} holds no metrics")
    flat = {
        f"{name}.{key}": value
        for name, section in config.items()
        if isinstance(section, dict)
        for key, value in section.items()
    }
    return FinishedRun(folder, results, flat)


def find_runs(paths: Iterable[Path]) -> tuple[list[FinishedRun], list[Path]]:
    """Return the finished runs in or below these folders, each once, and the folders of unfinished ones.

    Runs that were set aside (``seed_42.old-1``) and hidden folders are not looked into, unless they are named.

    Raises:
        RunFolderError: one of the paths has no run in it at all.
    """
    finished: dict[Path, FinishedRun] = {}
    unfinished: list[Path] = []
    for path in paths:
        markers = sorted(
            marker
            for marker in path.rglob("config.resolved.toml")
            if not any(_PASSED_OVER.search(part) for part in marker.parent.relative_to(path).parts)
        )
        if not markers:
            what = "there is no such folder" if not path.exists() else "it is no run, and has none below it"
            raise RunFolderError(f"{path}: {what}")
        for folder in (marker.parent for marker in markers):
            key = folder.resolve()
            if (folder / "results.json").exists():
                finished.setdefault(key, read_run(folder))
            elif folder not in unfinished:
                unfinished.append(folder)
    return list(finished.values()), unfinished
