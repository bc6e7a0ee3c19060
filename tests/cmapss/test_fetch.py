"""Fetching: the right files or nothing, from a file or a real server, whatever the archive holds."""

from __future__ import annotations

import hashlib
import http.server
import io
import random
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from mtlbalance_cmapss.checksums import KNOWN_SHA256
from mtlbalance_cmapss.cli import app
from mtlbalance_cmapss.config import SUBSETS, CmapssConfig
from mtlbalance_cmapss.fetch import fetch
from mtlbalance_cmapss.files import file_names
from mtlbalance_cmapss.locate import find_nasa_files
from typer.testing import CliRunner

from mtlbalance.errors import DataError

FILES = {name: f"{name}\n1 2 3\n".encode() for subset in SUBSETS for name in file_names(subset)}
KNOWN = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def archive(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def zipped(tmp_path: Path) -> Callable[[Mapping[str, bytes]], str]:
    def write(members: Mapping[str, bytes]) -> str:
        path = tmp_path / "archive.zip"
        path.write_bytes(archive(members))
        return str(path)

    return write


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[bytes, int], str]]:
    """Serve some bytes, with the length that is said of them."""
    served = {"content": b"", "length": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/data.zip":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(served["length"]))
            self.end_headers()
            self.wfile.write(served["content"])  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()

        def serve(content: bytes, length: int) -> str:
            served.update(content=content, length=length)
            return f"http://127.0.0.1:{running.server_port}/data.zip"

        yield serve
        running.shutdown()
        thread.join()


def test_the_files_are_unpacked_all_at_once(tmp_path: Path, zipped: Callable[..., str]) -> None:
    target = tmp_path / "new" / "CMAPSSData"
    fetch(
        zipped({"readme.txt": b"hello"} | {f"CMAPSSData/{name}": FILES[name] for name in FILES}),
        target,
        KNOWN,
    )
    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES
    assert [path.name for path in target.parent.iterdir()] == ["CMAPSSData"]


def test_an_archive_in_an_archive_and_windows_line_ends(tmp_path: Path, zipped: Callable[..., str]) -> None:
    inner = archive({name: content.replace(b"\n", b"\r\n") for name, content in FILES.items()})
    fetch(zipped({"6. Turbofan Engine Degradation/CMAPSSData.zip": inner}), tmp_path / "here", KNOWN)
    assert len(list((tmp_path / "here").iterdir())) == 12


def test_from_a_server(tmp_path: Path, server: Callable[..., str]) -> None:
    content = archive(FILES)
    seen: list[tuple[int, int | None]] = []
    address = server(content, len(content))
    fetch(address, tmp_path / "here", KNOWN, advance=lambda *progress: seen.append(progress))
    assert {path.name for path in (tmp_path / "here").iterdir()} == set(FILES)  # and not the archive
    assert seen[-1] == (len(content), len(content))
    with pytest.raises(DataError, match="the server answers 404"):
        fetch(address.replace("data", "other"), tmp_path / "there", KNOWN)


def test_a_download_that_breaks_off(tmp_path: Path, server: Callable[..., str]) -> None:
    content = archive(FILES)
    address = server(content[:-100], len(content))
    with pytest.raises(DataError, match=r"the download ended after|cannot be downloaded"):
        fetch(address, tmp_path / "here", KNOWN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**FILES, "train_FD004.txt": b"1 2"}, r"train_FD004\.txt differ from NASA's files \(SHA-256\)"),
        ({name: FILES[name] for name in list(FILES)[1:]}, r"the archive lacks train_FD001\.txt"),
        ({**FILES, "../evil.txt": b"x"}, r"has the path '\.\./evil\.txt', which leads out of its folder"),
        ({**FILES, "/etc/evil": b"x"}, "leads out of its folder"),
        ({**FILES, "C:\\evil": b"x"}, "leads out of its folder"),
        ({**FILES, "a\\..\\..\\evil": b"x"}, "leads out of its folder"),
        ({"big.zip": b"not a zip"}, r"big\.zip\): is not a ZIP archive"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path, zipped: Callable[..., str], members: dict[str, bytes], message: str
) -> None:
    source = zipped(members)
    with pytest.raises(DataError, match=message):
        fetch(source, tmp_path / "here", KNOWN)
    assert [path.name for path in tmp_path.iterdir()] == ["archive.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_in_any_place_is_an_error_or_harmless(tmp_path: Path, method: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in FILES.items():
            file.writestr(name, 20 * content)
    known = {name: hashlib.sha256(20 * content).hexdigest() for name, content in FILES.items()}
    whole, path, rng = buffer.getvalue(), tmp_path / "archive.zip", random.Random(method)
    for attempt in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        target = tmp_path / str(attempt)
        try:
            fetch(str(path), target, known)
        except DataError:
            assert not target.exists()
        else:
            assert {file.name: file.read_bytes() for file in target.iterdir()} == {
                name: 20 * content for name, content in FILES.items()
            }


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nPK",
        b"HTTP/1.1 200 OK\r\nA: " + 70_000 * b"x" + b"\r\n\r\n",
    ],
)
def test_a_server_that_talks_nonsense(tmp_path: Path, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(DataError, match="cannot be downloaded: "):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/x.zip", tmp_path / "here", KNOWN)
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_a_bomb_is_not_unpacked(
    tmp_path: Path, zipped: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlbalance_cmapss.fetch.MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match=r"'RUL_FD001\.txt' is larger than 1,000 bytes"):
        fetch(zipped({**FILES, "RUL_FD001.txt": bytes(100_000)}), tmp_path / "here", KNOWN)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, zipped: Callable[..., str]) -> None:
    source = zipped(FILES)
    (tmp_path / "here").mkdir()
    fetch(source, tmp_path / "here", KNOWN)  # an empty one is fine
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "here").iterdir())
    with pytest.raises(DataError, match="exists already"):
        fetch(source, tmp_path / "here", KNOWN)
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "here").iterdir()) == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.zip", "gone.zip: No such file"),
        ("ftp://example.org/x.zip", "only http and https addresses"),
        ("http://127.0.0.1:1/x.zip", "cannot be downloaded"),
        ("http://127.0.0.1/a b.zip", "cannot be downloaded: URL can't contain control characters"),
        ("http://[::1/x.zip", "cannot be downloaded: Invalid IPv6 URL"),
        (__file__, "is not a ZIP archive"),
    ],
)
def test_no_such_archive(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch(source, tmp_path / "here", KNOWN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_data
def test_nasas_files_are_fetched_into_the_cache_and_found(
    tmp_path: Path, nasa_folder: Path, no_files: Path, zipped: Callable[..., str]
) -> None:
    source = zipped({name: (nasa_folder / name).read_bytes() for name in KNOWN_SHA256})
    done = CliRunner().invoke(app, ["fetch", "--from", source])
    assert done.exit_code == 0, done.output
    assert "all files are there and are NASA's own" in done.output
    assert find_nasa_files(CmapssConfig(subset="FD003")) == no_files / "CMAPSSData"
