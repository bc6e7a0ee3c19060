"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtlbalance.errors import WriteError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let what the system refuses, a full disk for example, name the file that was being written."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; what was written before is intact"
        ) from error


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace ``path`` by ``content``.

    Args:
        path: the file.
        content: what it is to hold.
        sync: whether the folder is synced as well; the last of several files in it is enough.

    Raises:
        WriteError: the system refuses; ``path`` is as it was.
    """
    with replacing(path, sync=sync) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary file's path in the same folder for the body to write; then fsync, rename, fsync of the folder.

    Args:
        path: the file that it becomes; as it was if the body raises.
        sync: whether the folder is synced as well.

    Raises:
        WriteError: the system refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """Replace ``path`` by UTF-8 text, its line ends as they are."""
    write_bytes(path, content.encode())


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote; only the folder's holder may."""
    with writing(folder):
        for path in folder.glob(".*.tmp-*"):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut; a no-op where folders cannot be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
