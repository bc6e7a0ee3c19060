"""One run folder, one process: a lock that dies with its holder, and a note of who that is."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mtlbalance.errors import RunFolderError
from mtlbalance.training import atomic

_HOLDER = ".holder.json"
LOCK_FILES = frozenset({".lock", _HOLDER})
_ATTEMPTS = 5  # a process that leaves may remove a folder that it made, between our making and our locking it


class FolderLock:
    """The lock of one folder, held until it is released or this process dies, however it dies.

    Args:
        folder: the folder; made with its parents where it is missing.

    Raises:
        RunFolderError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._lock = FileLock(folder / ".lock")
        for attempt in range(_ATTEMPTS):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
                break
            except Timeout as error:
                raise RunFolderError(
                    f"{folder} is in use by another process{self._who()}; wait for it, or choose another folder with "
                    "--out"
                ) from error
            except FileNotFoundError as error:
                if attempt == _ATTEMPTS - 1:
                    raise RunFolderError(f"cannot write to the run folder {folder}: {error}") from error
            except (OSError, NotImplementedError) as error:
                raise RunFolderError(f"cannot write to the run folder {folder}: {error}") from error
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = {"pid": os.getpid(), "host": platform.node(), "since": now}
        with contextlib.suppress(OSError):  # a full disk: the lock itself holds
            (folder / _HOLDER).write_text(json.dumps(note) + "\n", encoding="utf-8")
        atomic.remove_leftovers(folder)

    def forget(self) -> None:
        """Remove the note, before the folder is renamed or the lock released."""
        with contextlib.suppress(OSError):
            (self.folder / _HOLDER).unlink(missing_ok=True)

    def moved(self, folder: Path) -> None:
        """Follow the folder, which was renamed; what lies at its old place from now on is another's."""
        self.folder, self.made = folder, []

    def remove(self) -> None:
        """Remove the lock file and the folders that were made for it, where nothing else lies in them."""
        self.forget()
        with contextlib.suppress(OSError):
            (self.folder / ".lock").unlink(missing_ok=True)
            for folder in self.made:
                folder.rmdir()

    def release(self) -> None:
        """Let others have it."""
        self.forget()
        self._lock.release()

    def _who(self) -> str:
        try:
            note = json.loads((self.folder / _HOLDER).read_bytes())
            return f" (pid {note['pid']} on {note['host']}, since {note['since']})"
        except (OSError, ValueError, LookupError, TypeError):  # just being written, or by an older version
            return ""
