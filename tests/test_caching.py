"""Prepared data: made once for equal keys, by one of many processes, and again when asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mtlbalance.caching import REFRESH_VARIABLE, _load, cache_root, cached_arrays, refresh
from mtlbalance.errors import DataError

ROOT = Path(__file__).parents[1]
PROGRAM = """\
import sys, time
from pathlib import Path
import numpy as np
from mtlbalance.caching import cached_arrays

def prepare():
    with Path("prepared").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    return {"a": np.arange(3)}

print(cached_arrays("data", {"k": 1}, prepare)["a"].tolist())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mtlbalance" / "prepared"


class Preparing:
    """Makes arrays, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.count += 1
        return {"numbers": np.arange(4.0), "flags": np.array([True, False])}


def test_equal_keys_prepare_once(cache: Path) -> None:
    preparing = Preparing()
    first = cached_arrays("data", {"files": ["a", "b"], "window": 30}, preparing)
    again = cached_arrays("data", {"window": 30, "files": ["a", "b"]}, preparing)
    assert preparing.count == 1
    assert first.keys() == again.keys()
    for name in first:
        assert first[name].dtype == again[name].dtype
        np.testing.assert_array_equal(first[name], again[name])
    cached_arrays("data", {"files": ["a", "b"], "window": 31}, preparing)
    cached_arrays("data", {"files": ["b", "a"], "window": 30}, preparing)
    assert preparing.count == 3
    assert len(list(cache.glob("data-*.npz"))) == 3


def test_refreshing_prepares_what_is_older_and_that_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparing = Preparing()
    cached_arrays("data", {}, preparing)
    time.sleep(0.02)
    monkeypatch.setenv(REFRESH_VARIABLE, refresh()[REFRESH_VARIABLE])
    time.sleep(0.02)
    for _ in range(3):
        cached_arrays("data", {}, preparing)
    assert preparing.count == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"no archive at all"])
def test_a_damaged_file_is_no_obstacle(cache: Path, content: bytes) -> None:
    preparing = Preparing()
    cached_arrays("data", {}, preparing)
    [path] = cache.glob("*.npz")
    path.write_bytes(content)
    np.testing.assert_array_equal(cached_arrays("data", {}, preparing)["numbers"], np.arange(4.0))
    cached_arrays("data", {}, preparing)
    assert preparing.count == 2  # and mended


def test_no_flipped_bit_goes_unnoticed(cache: Path) -> None:
    """In the headers, too: one that asks for fewer numbers than there are must not be believed."""
    preparing = Preparing()
    cached_arrays("data", {}, preparing)
    [path] = cache.glob("*.npz")
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 2, 4, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            if (found := _load(path)) is not None:  # a flip that means nothing, in a date for example
                assert {name: array.tolist() for name, array in found.items()} == {
                    "numbers": [0.0, 1.0, 2.0, 3.0], "flags": [True, False],
                }  # fmt: skip


def test_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    preparing = Preparing()
    assert cached_arrays("data", {}, preparing).keys() == {"numbers", "flags"}
    with pytest.raises(DataError, match="this user has no home folder"):
        cache_root()


def test_a_full_disk_is_no_obstacle(cache: Path) -> None:
    program = (
        "import resource, signal, numpy as np\n"
        "from mtlbalance.caching import cached_arrays\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "print(cached_arrays('data', {}, lambda: {'a': np.zeros(10), 'b': np.arange(100_000)})['b'].sum())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "4999950000\n"), done.stderr
    assert done.stderr == ""
    assert [path.suffix for path in cache.iterdir()] in ([".lock"], [])


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    preparing = Preparing()
    assert cached_arrays("data", {}, preparing).keys() == {"numbers", "flags"}
    assert preparing.count == 1


def test_what_fails_is_not_kept(cache: Path) -> None:
    called = []

    def fail() -> dict[str, np.ndarray]:
        called.append(1)
        raise OSError("line 7")

    with pytest.raises(OSError, match="line 7"):
        cached_arrays("data", {}, fail)
    assert len(called) == 1  # it is not taken for a cache that cannot be written
    assert list(cache.glob("*.npz")) == []


def test_several_processes_at_once_prepare_once(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["[0, 1, 2]\n"] * 4
    assert (tmp_path / "prepared").read_text() == "x"
