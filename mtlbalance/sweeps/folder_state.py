"""What a run's folder says of the run. This is all the state that a sweep has."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mtlbalance.config import RunConfig
from mtlbalance.sweeps.plan import Plan


class FolderState(StrEnum):
    """What is left to do for a run."""

    NEW = "new"  # nothing of it is there
    BROKEN = "broken"  # it was started and has not finished, or its results are damaged: to be resumed
    LOCKED = "locked"  # another process is at it: to be left alone
    FINISHED = "finished"  # its results are there: to be skipped


def folder_state(folder: Path) -> FolderState:
    """Read a run's state off its folder.

    Whether it is locked can only be told by trying, which takes microseconds; a run that starts within them
    is refused, and is then tried again by the sweep that started it.
    """
    lock = folder / ".lock"
    if lock.exists() and _is_held(lock):
        return FolderState.LOCKED
    if (folder / "results.json").exists():
        return FolderState.BROKEN if results_are_damaged(folder) else FolderState.FINISHED
    if (folder / "config.resolved.toml").exists() or (folder / "checkpoints").exists():
        return FolderState.BROKEN
    return FolderState.NEW


def folder_states(plan: Plan) -> dict[str, FolderState]:
    """Return the state of every run, by its id."""
    return {run.id: folder_state(plan.folder_of(run.id)) for run in plan.runs}


def results_are_damaged(folder: Path) -> bool:
    """Return whether ``results.json`` is not what ``sums.json`` says; the run, started again, makes it anew.

    What else the run has written is only looked at by whoever reads it.
    """
    try:
        content = (folder / "results.json").read_bytes()
        sums = json.loads((folder / "sums.json").read_bytes())
        return bool(sums["results.json"] != hashlib.sha256(content).hexdigest())
    except FileNotFoundError:  # of an earlier version, which kept no sums
        return False
    except (OSError, ValueError, LookupError, TypeError):
        return True


def _is_held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written to: whoever runs there will say so
        return False
    lock.release()
    return False


def changed_keys(folder: Path, config: RunConfig) -> list[str]:
    """Return ``key: there -> here`` for what decides the result and is not as it was when a run was trained.

    A folder without a finished epoch has nothing to lose, and gives none.
    """
    if not (folder / "results.json").exists() and not any((folder / "checkpoints").glob("epoch_*.json")):
        return []
    path = folder / "config.resolved.toml"
    try:
        before = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path} cannot be read: {error}"]
    free, here = config.free_keys(), config.result_dict()
    old = {key: value for key, value in _options(before).items() if key not in free}
    new = _options(here)
    return [
        f"{key}: {old.get(key, '(not set)')!r} -> {new.get(key, '(not set)')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, section in config.items()
        if isinstance(section, Mapping)
        for key, value in section.items()
    }
