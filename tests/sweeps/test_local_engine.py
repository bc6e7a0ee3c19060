"""The engine ``local``: which GPU a run sees, what a run leaves behind, and what cannot be started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtlbalance.errors import DeviceError
from mtlbalance.plugins.builtins import LocalOptions
from mtlbalance.sweeps import Attempt, Job, JobEnd
from mtlbalance.sweeps import jobs as jobs_module
from mtlbalance.sweeps.folder_state import FolderState
from mtlbalance.sweeps.local import LocalEngine, Slot, _slots
from mtlbalance.sweeps.retries import Retries

Write = Callable[[str], Path]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """A process that has ended, whether or not anybody has asked for its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def seen(slots: list[Slot]) -> list[tuple[str, str]]:
    return [(slot.device, slot.environment["CUDA_VISIBLE_DEVICES"]) for slot in slots]


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [
        ("3,5", "auto", [("cuda:0", "3"), ("cuda:1", "5")]),
        ("3,5", ["cuda:1"], [("cuda:1", "5")]),  # as torch counts, and never a GPU that was not ours
        ("GPU-8f3a, MIG-12", ["cuda", "cuda:1"], [("cuda", "GPU-8f3a"), ("cuda:1", "MIG-12")]),
        ("0,-1,2", "auto", [("cuda:0", "0")]),  # CUDA stops at what is no GPU
        ("-1", "auto", [("cpu", "")]),
        ("NoDevFiles", "auto", [("cpu", "")]),
        ("", "auto", [("cpu", "")]),
        ("3,5", ["cpu"], [("cpu", "")]),
    ],
)
def test_a_run_sees_the_gpu_of_its_slot(
    monkeypatch: pytest.MonkeyPatch, visible: str, devices: list[str], expected: list[tuple[str, str]]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert seen(_slots(LocalOptions(devices=devices))) == expected
    twice = _slots(LocalOptions(devices=devices, per_device=2))
    assert seen(twice) == expected * 2


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi names two GPUs, one of them in two parts."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: H (UUID: GPU-1)'\necho '  MIG 1g (UUID: x)'\necho 'GPU 1: H (UUID: GPU-2)'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_every_gpu_is_used_and_none_that_is_not_there() -> None:
    assert seen(_slots(LocalOptions())) == [("cuda:0", "0"), ("cuda:1", "1")]
    with pytest.raises(
        DeviceError, match="is to use cuda:2, but of this machine's GPUs it sees 2, counted from 0"
    ):
        LocalEngine(LocalOptions(devices=["cuda:2"]))  # its run would train on the CPU without a word


@pytest.mark.parametrize("devices", [[], ["gpu"], ["cuda:x"], "all"])
def test_devices_that_are_none(devices: object) -> None:
    with pytest.raises(ValueError, match="devices"):
        LocalOptions(devices=devices)  # type: ignore[arg-type]


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtlbalance.sweeps.local._num_cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert {slot.environment["OMP_NUM_THREADS"] for slot in _slots(LocalOptions(per_device=2))} == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert all("OMP_NUM_THREADS" not in slot.environment for slot in _slots(LocalOptions()))


PROGRAM = """\
import os, signal, subprocess, sys, time
from pathlib import Path

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path("child.tmp").write_text(str(child.pid))
Path("child.tmp").rename("child")
{how}
"""
ENDS = {
    "crashes": "os._exit(7)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "takes too long": "time.sleep(600)",
    "ends well": "os._exit(0)",
}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let jobs run a program with a child instead of ``mtlbalance``."""
    monkeypatch.chdir(tmp_path)

    def write(how: str) -> None:
        Path("program.py").write_text(PROGRAM.format(how=how))
        monkeypatch.setattr(jobs_module, "_python", lambda: [sys.executable, str(tmp_path / "program.py")])

    yield write
    with_child = Path("child")
    if with_child.exists() and not is_gone(int(with_child.read_text())):
        os.kill(int(with_child.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("how", ENDS)
def test_what_a_run_has_started_ends_with_it(program: Callable[[str], None], how: str) -> None:
    program(ENDS[how])
    job = Job("a", "", Path("a.toml"), Path("a"), Path("a.log"), timeout_seconds=None)
    attempt = Attempt(job)
    wait_for(Path("child").exists)
    if how == "takes too long":
        attempt.stop()
    wait_for(lambda: attempt.poll() is not None)
    child = int(Path("child").read_text())
    if how == "ends well":  # what it leaves on purpose, to upload something perhaps, is its own business
        assert not is_gone(child)
    else:
        wait_for(lambda: is_gone(child), seconds=5)


def test_a_log_that_is_gone_harms_nothing(program: Callable[[str], None]) -> None:
    program("os._exit(7)")
    attempt = Attempt(Job("a", "", Path("a.toml"), Path("a"), Path("a.log")))
    Path("a.log").unlink()
    ends: list[JobEnd] = []
    wait_for(lambda: (end := attempt.poll()) is not None and (ends.append(end) or True))
    assert (ends[0].exit_code, ends[0].tail) == (7, "")


def test_a_module_in_the_current_folder_is_not_taken_for_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tomllib.py").write_text("raise SystemExit('the wrong one')")
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != tmp_path]
    monkeypatch.setattr(sys, "path", elsewhere)
    program = [*jobs_module._python(), "-c", "import tomllib"]
    assert subprocess.run(program, check=False).returncode == 0
    monkeypatch.setattr(
        sys, "path", ["", *elsewhere]
    )  # as `python -m mtlbalance` has it: then it is ours, too
    assert jobs_module._python() == [sys.executable]


def engine_with_record(log: Path, **record: object) -> LocalEngine:
    engine = LocalEngine(LocalOptions(devices=["cpu"]))
    log.with_suffix(".process.json").write_text(json.dumps(record))
    engine.adopt(log)
    return engine


def test_a_run_that_was_left_behind_takes_up_its_slot(tmp_path: Path) -> None:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = Path(f"/proc/{left.pid}/stat").read_text().rpartition(")")[2].split()[19]
    record = {"host": socket.gethostname(), "pid": left.pid, "started": started, "device": "cpu"}
    try:
        engine = engine_with_record(tmp_path / "a.log", **record)
        assert engine.room() == 0
        other = engine_with_record(tmp_path / "b.log", **record | {"started": "12"})
        assert other.room() == 1, "a later process that got the same number is not the run"
        left.kill()
        wait_for(
            lambda: is_gone(left.pid)
        )  # though nobody has asked for its end, as in a container without an init
        assert engine.room() == 1
    finally:
        left.kill()
        left.wait()


def end(code: int, tail: str = "", run_id: str = "FD001/seed_1") -> JobEnd:
    return JobEnd(run_id, code, tail=tail)


def test_whose_folder_it_is_that_is_in_use() -> None:
    retries = Retries(2)
    in_use = "error: runs/FD001/seed_1 is in use by another process (pid 7); wait for it"
    assert retries.judge(end(2, in_use), FolderState.BROKEN).outcome == "locked"
    # Said by a plugin of something else, it would be tried again for ever.
    port = "error: port 8080 is in use by another process"
    assert retries.judge(end(2, port), FolderState.BROKEN).outcome == "failed"


def test_a_finished_run_that_somebody_looks_at_has_not_failed() -> None:
    """To see whether a folder is locked, ``sweep status`` takes the lock for an instant."""
    assert Retries(2).judge(end(0), FolderState.LOCKED).outcome == "locked"
    assert Retries(2).judge(end(0), FolderState.FINISHED).outcome == "finished"
    assert Retries(2).judge(end(0), FolderState.BROKEN).outcome == "failed"
