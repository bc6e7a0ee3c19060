"""Getting NASA's files out of their archive: from a ZIP on disk or at an address, checked, all or nothing."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from mtlbalance.errors import DataError

from .checksums import KNOWN_SHA256

# The largest of the files has 10 MB and the archive 13; anything far beyond is not what it says it is.
MAX_ARCHIVE_BYTES = 200 * 2**20
MAX_FILE_BYTES = 50 * 2**20
_CHUNK_BYTES = 2**16
_TIMEOUT_SECONDS = 30

# ``advance(done_bytes, total_bytes or None)``
Advance = Callable[[int, int | None], None]


def fetch(
    source: str, target: Path, known: Mapping[str, str] = KNOWN_SHA256, advance: Advance | None = None
) -> None:
    """Put the twelve files of an archive into a new folder; until all of them are right, nothing is there.

    The archive may hold another one, as NASA's does. Only members named as the files are taken, and under
    that name alone; an archive with a path that leads out of its folder is refused as a whole.

    Args:
        source: a ZIP file, or an http(s) address of one.
        target: a folder that does not exist, or is empty.
        known: SHA-256 by file name, with Unix line ends.
        advance: told of the download.

    Raises:
        DataError: it cannot be read or downloaded, is unsafe, or its files are missing or differ.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists already; remove it, or name another folder with --to")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target}: cannot be made: {error.strerror or error}") from error
    try:
        with _opened(source, building, advance or (lambda _done, _total: None)) as archive:
            _unpack(archive, source, building, known)
        (building / "archive.zip").unlink(missing_ok=True)
        building.chmod(0o755)
        building.replace(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _opened(source: str, folder: Path, advance: Advance) -> Iterator[IO[bytes]]:
    if source.lower().startswith(("http:", "https:")):
        path = folder / "archive.zip"
        _download(source, path, advance)
    elif "://" in source:
        raise DataError(f"{source}: only http and https addresses, and files, can be fetched")
    else:
        path = Path(source).expanduser()
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from error
    with file:
        yield file


def _download(address: str, path: Path, advance: Advance) -> None:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "mtlbalance-cmapss"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply, path.open("wb") as file:
            length = reply.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
            done = 0
            while chunk := reply.read(_CHUNK_BYTES):
                done += len(chunk)
                if done > MAX_ARCHIVE_BYTES:
                    raise DataError(
                        f"{address}: is larger than {MAX_ARCHIVE_BYTES:,} bytes: not NASA's archive"
                    )
                file.write(chunk)
                advance(done, total)
    except urllib.error.HTTPError as error:
        raise DataError(f"{address}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, urllib.error.URLError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error).strip() or type(error).__name__
        raise DataError(f"{address}: cannot be downloaded: {reason}") from error
    if total is not None and done != total:
        raise DataError(f"{address}: the download ended after {done:,} of {total:,} bytes; try again")


def _unpack(file: IO[bytes], source: str, folder: Path, known: Mapping[str, str]) -> None:
    found: set[str] = set()
    differing: list[str] = []
    for name, content in _members(file, source, set(known)):
        digest = hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()
        if digest != known[name]:
            differing.append(name)
        with (folder / name).open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        found.add(name)
    missing = sorted(known.keys() - found)
    if missing:
        raise DataError(f"{source}: the archive lacks {', '.join(missing)}; nothing was written")
    if differing:
        raise DataError(
            f"{source}: {', '.join(sorted(differing))} differ from NASA's files (SHA-256), truncated perhaps; "
            "nothing was written"
        )


def _members(file: IO[bytes], source: str, wanted: set[str], depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted files by name, from the archive or from one inside it."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            for info in infos:
                _check_path(info.filename, source)
            for info in infos:
                name = PurePosixPath(info.filename).name
                if name in wanted:
                    yield name, _read(archive, info, MAX_FILE_BYTES, source)
                elif name.lower().endswith(".zip") and depth == 0:
                    inner = io.BytesIO(_read(archive, info, MAX_ARCHIVE_BYTES, source))
                    yield from _members(inner, f"{source} ({name})", wanted, depth + 1)
    except DataError:
        raise
    except (
        Exception
    ) as error:  # encrypted, unknown, or damaged, of which zlib, bz2 and lzma each have errors of their own
        reason = str(error) or type(error).__name__
        raise DataError(f"{source}: is not a ZIP archive that can be read: {reason}") from error


def _check_path(name: str, source: str) -> None:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts:
        raise DataError(
            f"{source}: the archive has the path {name!r}, which leads out of its folder; it is refused"
        )


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int, source: str) -> bytes:
    with archive.open(info) as member:  # what the header says of the size may be wrong
        content = member.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{source}: {info.filename!r} is larger than {limit:,} bytes: not NASA's archive")
    return content
