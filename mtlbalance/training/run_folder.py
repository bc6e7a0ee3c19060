"""The folder of a run: who may use it, and whether it belongs to this config and this data."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtlbalance.errors import RunFolderError
from mtlbalance.training import atomic
from mtlbalance.training.lock import LOCK_FILES, FolderLock
from mtlbalance.training.sums import damaged_files


@dataclass
class RunFolder:
    """A locked run folder."""

    path: Path
    _locks: list[FolderLock] = field(default_factory=list)

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.resolved.toml"

    @property
    def results_path(self) -> Path:
        """The results; that this file exists means that the run has finished."""
        return self.path / "results.json"

    @property
    def data_path(self) -> Path:
        """The fingerprint of the data that the run started on."""
        return self.path / "data.json"

    @property
    def has_progress(self) -> bool:
        """Whether something was trained: there is a checkpoint, or results."""
        return self.results_path.exists() or any((self.path / "checkpoints").glob("epoch_*.json"))

    def read_results(self) -> dict[str, Any] | None:
        """Return the results of a finished run, or None if there are none, or if they are to be made again.

        Results whose files are not what was written are removed with a warning: the checkpoints make them again.

        Raises:
            RunFolderError: they are damaged, and there is no checkpoint.
        """
        if not self.results_path.exists():
            return None
        damaged = damaged_files(self.path)
        if not damaged:
            return self._read_json(self.results_path)
        named = f"in {self.path}, these files are not what sums.json says they were: {', '.join(damaged)}"
        if not any((self.path / "checkpoints").glob("epoch_*.json")):
            raise RunFolderError(
                f"{named}; and there is no checkpoint to make them again from. Put them back from a backup, or use "
                "--fresh to set this folder aside"
            )
        warnings.warn(
            f"{named}; the results are made again from the last checkpoint",
            RuntimeWarning,
            stacklevel=2,
        )
        with atomic.writing(self.results_path):
            self.results_path.unlink()
        return None

    def check_config(self, resolved_toml: str, *, free_keys: AbstractSet[str]) -> None:
        """Raise RunFolderError if the folder was made from another config, or is not a run's at all.

        A run that failed before its first checkpoint has nothing to lose: any config may take its place.

        Args:
            resolved_toml: the config to run now.
            free_keys: dotted keys that may differ.
        """
        if not self.has_progress:
            if self._entries() and not self.config_path.exists():
                raise self._not_a_run()
            return
        try:
            before = tomllib.loads(self.config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"cannot read {self.config_path}: {error}; use --fresh") from error
        self._refuse(differing_keys(before, tomllib.loads(resolved_toml), free_keys), "of another config")

    def check_data(self, described: Mapping[str, Any]) -> None:
        """Raise RunFolderError if what was trained here was trained on other data.

        Args:
            described: the ``fingerprint`` of the data to run on now.
        """
        if self.has_progress:
            before = self._read_json(self.data_path)
            self._refuse(differing_keys(before, described, frozenset()), "on other data")

    def check_replaceable(self) -> None:
        """Raise RunFolderError if the folder must not be set aside: it is no run's, or is stood in."""
        if not self._entries():
            return
        if not any(
            (self.path / name).exists() for name in ("config.resolved.toml", "results.json", "checkpoints")
        ):
            raise self._not_a_run()
        folder = self.path.resolve()
        for what, place in (("current folder", Path.cwd()), ("home folder", Path.home())):
            if folder in (place.resolve(), *place.resolve().parents):
                raise RunFolderError(
                    f"{folder} is, or holds, the {what}, so it cannot be set aside; choose another --out"
                )

    def set_aside(self) -> Path | None:
        """Rename the folder to ``<folder>.old-N`` and make an empty one; return the new name of the old one."""
        if not self._entries():
            return None
        number = 1
        while (old := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self._locks[-1].forget()
        try:
            self.path.rename(old)
        except OSError as error:
            raise RunFolderError(f"cannot set {self.path} aside as {old}: {error}") from error
        self._locks[-1].moved(old)
        self._locks.append(FolderLock(self.path))
        return old

    def _entries(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir() if entry.name not in LOCK_FILES)

    def _not_a_run(self) -> RunFolderError:
        return RunFolderError(
            f"{self.path} is not empty and not a run folder (it has {', '.join(self._entries()[:3])}); "
            "choose another folder with --out"
        )

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise RunFolderError(
                f"cannot read {path}: {error}; use --fresh to set this folder aside"
            ) from error

    def _refuse(self, changed: list[str], what: str) -> None:
        if changed:
            raise RunFolderError(
                f"{self.path} holds a run {what}; these keys differ (there -> here):\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nchoose another run.name or --out, or use --fresh to set the old run aside"
            )

    def _release(self) -> None:
        last = self._locks[-1]
        if last.folder == self.path and not self.config_path.exists():
            last.remove()  # nothing came of this run: leave no trace of it
        for lock in self._locks:
            lock.release()


@contextmanager
def open_run_folder(path: Path) -> Iterator[RunFolder]:
    """Make and lock the folder at ``path`` for the body.

    Raises:
        RunFolderError: it cannot be written, or another process is using it.
    """
    folder = RunFolder(path, [FolderLock(path)])
    try:
        yield folder
    finally:
        folder._release()


def differing_keys(
    before: Mapping[str, Any], now: Mapping[str, Any], free_keys: AbstractSet[str]
) -> list[str]:
    """Return ``key: before -> now`` for every dotted key that differs, except those that may."""
    old, new = _flatten(before), _flatten(now)
    return [
        f"{key}: {old.get(key, '(not set)')!r} -> {new.get(key, '(not set)')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free_keys
    ]


def _flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
