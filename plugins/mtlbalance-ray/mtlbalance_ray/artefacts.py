"""A run's folder as bytes, for nodes that share no disk: put in place as a whole, or not at all."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from pathlib import Path

_LEFT_OUT = {".lock", ".holder.json"}


def pack(folder: Path) -> bytes | None:
    """Return a folder's files as a tar archive, or None if there is no folder."""
    old = _aside(folder)
    if old.is_dir() and not folder.exists():  # whoever replaced it was killed between two renames
        old.rename(folder)
    if not folder.is_dir():
        return None
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in _LEFT_OUT:
                archive.add(path, arcname=str(path.relative_to(folder)))
    return buffer.getvalue()


def unpack(files: bytes, folder: Path) -> None:
    """Replace a folder by the files of an archive: written beside it and renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(files)) as archive:
            archive.extractall(building, filter="data")
        building.chmod(0o755)
        old = _aside(folder)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        building.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
