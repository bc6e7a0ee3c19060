"""Prepared data kept on disk, so that many runs on the same files prepare them once.

A dataset's ``build`` calls ``cached_arrays`` around what is slow. What is kept is found by its key, which must
hold all that decides it: the files' hashes, the options, the version of the code that prepares.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zipfile import ZipFile

from filelock import FileLock, Timeout

from mtlbalance.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[np.generic]]

REFRESH_VARIABLE = "MTLBALANCE_REFRESH_CACHE"  # nanoseconds since 1970: what is older is prepared again
_WAIT_SECONDS = 600.0
_SUM_BYTES = 64


def cache_root() -> Path:
    """Return this user's cache folder of mtlbalance; it need not exist.

    Raises:
        DataError: there is no telling where it is.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mtlbalance"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "mtlbalance"
    try:
        return Path.home() / ".cache" / "mtlbalance"
    except RuntimeError as error:  # as in containers, for a user whom the system does not know
        raise DataError("this user has no home folder, and so no cache folder; set XDG_CACHE_HOME") from error


def cached_arrays(name: str, key: Mapping[str, Any], prepare: Callable[[], Arrays]) -> Arrays:
    """Return prepared arrays: from the cache, or by preparing and keeping them.

    Of several processes that ask at once, one prepares and the others wait for it. A cache that cannot be
    written, or holds something damaged, is no obstacle: the arrays are prepared.

    Args:
        name: the start of the file's name, for people.
        key: everything that decides the arrays, as JSON values.
        prepare: makes them; what it raises is raised here, and nothing is kept.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        path = cache_root() / "prepared" / f"{name}-{digest}.npz"
        if (found := _load(path)) is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire(timeout=_WAIT_SECONDS)
    except (DataError, OSError, Timeout, NotImplementedError):  # no place, or one that is read-only or locked
        return prepare()
    try:
        if (found := _load(path)) is not None:  # another process was faster
            return found
        found = prepare()
        with suppress(OSError):
            _save(path, found)
        return found
    finally:
        lock.release()


def refresh() -> dict[str, str]:
    """Return what to put in the environment so that everything kept up to now is prepared again, once."""
    return {REFRESH_VARIABLE: str(time.time_ns())}


def _load(path: Path) -> Arrays | None:
    import numpy as np

    try:
        if path.stat().st_mtime_ns < int(os.environ.get(REFRESH_VARIABLE) or 0):
            return None
        with path.open("rb") as file:
            # NumPy and ZIP believe what headers say: one that is damaged may ask for fewer numbers, or fewer arrays.
            digest = _sum_of(file)
            if file.read(_SUM_BYTES) != digest:
                return None
            file.seek(0)
            with np.load(file, allow_pickle=False) as kept:
                return {name: kept[name] for name in kept.files}
    except Exception:  # of a damaged file, the parsers may make anything
        return None


def _sum_of(file: IO[bytes]) -> bytes:
    """Return the SHA-256 of all but the place at the end where it is kept."""
    left = file.seek(0, os.SEEK_END) - _SUM_BYTES
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(left, 2**20))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest().encode()


def _save(path: Path, arrays: Arrays) -> None:
    import numpy as np

    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w+b") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
            with ZipFile(file, "a") as archive:
                archive.comment = bytes(_SUM_BYTES)  # the end of the file, and no part of any array
            digest = _sum_of(file)
            file.seek(-_SUM_BYTES, os.SEEK_END)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
