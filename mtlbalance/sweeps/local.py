"""The engine ``local``: N runs at a time on every device of this machine, each a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from mtlbalance.errors import DeviceError
from mtlbalance.plugins.builtins import LocalOptions
from mtlbalance.sweeps.jobs import Attempt, Job, JobEnd

_LOOK_EVERY_SECONDS = 0.05

_Process: TypeAlias = tuple[int, str]  # its number, and when it started


@dataclass(frozen=True)
class Slot:
    """A place for one run: a device, and what the run's environment says of it."""

    device: str
    environment: dict[str, str]


class LocalEngine:
    """Runs jobs as processes of this machine; see ``Engine``.

    A run on a GPU sees that GPU alone; GPUs count as torch counts them, among those that
    ``CUDA_VISIBLE_DEVICES`` shows. Runs share the machine's cores: each has as many threads as its share,
    unless ``OMP_NUM_THREADS`` is set.
    """

    def __init__(self, options: LocalOptions) -> None:
        self._free = _slots(options)
        self._running: dict[str, tuple[Attempt, Slot]] = {}
        self._adopted: list[tuple[_Process, Slot]] = []  # processes that an earlier sweep left here

    def room(self) -> int:
        """Return the number of free slots."""
        for process, slot in list(self._adopted):
            if not _is_alive(*process):
                self._adopted.remove((process, slot))
                self._free.append(slot)
        return len(self._free)

    def start(self, job: Job) -> str:
        """Start a job in the slot that has been free for longest."""
        slot = self._free[0]
        attempt = Attempt(replace(job, environment={**slot.environment, **job.environment}))
        self._running[job.run_id] = attempt, self._free.pop(0)
        record = {
            "host": socket.gethostname(),
            "pid": attempt.pid,
            "started": _start_of(attempt.pid),
            "device": slot.device,
        }
        with suppress(OSError):  # only a sweep that starts after this one was killed misses it
            _record_path(job.log).write_text(json.dumps(record))
        return slot.device

    def poll(self, seconds: float) -> Sequence[JobEnd]:
        """Look at every process a few times a second."""
        deadline = time.monotonic() + seconds
        while True:
            ends = [end for attempt, _ in self._running.values() if (end := attempt.poll()) is not None]
            for end in ends:
                attempt, slot = self._running.pop(end.run_id)
                self._free.append(slot)
                with suppress(OSError):
                    _record_path(attempt.job.log).unlink(missing_ok=True)
            if ends or time.monotonic() >= deadline:
                return ends
            time.sleep(_LOOK_EVERY_SECONDS)

    def stop(self) -> None:
        """Send every process SIGTERM; what it has trained is kept."""
        for attempt, _ in self._running.values():
            attempt.stop()

    def close(self) -> None:
        """Kill what still runs."""
        for attempt, _ in self._running.values():
            attempt.kill()

    def adopt(self, log: Path) -> None:
        """A run that an earlier sweep started on this machine still takes up its slot."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(_record_path(log).read_text())
            process = (record["pid"], record["started"])
            if record["host"] != socket.gethostname() or not _is_alive(*process):
                return
            slot = next((slot for slot in self._free if slot.device == record["device"]), None)
            if slot is not None:
                self._free.remove(slot)
                self._adopted.append((process, slot))


def _slots(options: LocalOptions) -> list[Slot]:
    gpus = _visible_gpus()
    devices = options.devices
    if devices == "auto":
        devices = [f"cuda:{index}" for index in range(len(gpus or []))] or ["cpu"]
    count = len(devices) * options.per_device
    # Device by device, so that the first runs spread over all of them.
    return [
        Slot(device, _environment(device, gpus, count))
        for _ in range(options.per_device)
        for device in devices
    ]


def _environment(device: str, gpus: list[str] | None, num_slots: int) -> dict[str, str]:
    """Return what a run's environment says of its device and of its share of the cores."""
    kind, _, number = device.partition(":")
    threads = {"OMP_NUM_THREADS": str(max(1, _num_cores() // num_slots))}
    found = {} if "OMP_NUM_THREADS" in os.environ else threads
    if kind == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    elif kind == "cuda":
        index = int(number or 0)
        if gpus is not None and index >= len(gpus):
            raise DeviceError(
                f"engine 'local' is to use {device}, but of this machine's GPUs it sees {len(gpus)}, counted from 0"
            )
        found["CUDA_VISIBLE_DEVICES"] = str(index) if gpus is None else gpus[index]
    return found


def _visible_gpus() -> list[str] | None:
    """Return CUDA's name for each GPU that it would show, or None where that cannot be told.

    torch would know, but takes seconds to import.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # As CUDA itself does: what follows a name that is none, such as -1, is not seen.
        return list(
            itertools.takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names)
        )
    if smi := shutil.which("nvidia-smi"):
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30, check=True)
            count = sum(line.startswith("GPU ") for line in found.stdout.splitlines())
            return [str(index) for index in range(count)]
    return None


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _record_path(log: Path) -> Path:
    return log.with_suffix(".process.json")


def _is_alive(pid: int, started: str) -> bool:
    """Return whether a process is there, and is not a later one with the same number."""
    if not hasattr(os, "killpg"):  # elsewhere, signal 0 is no question
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_of(pid) == started


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since the machine did, where the system says so.

    One that has ended and that nobody asks for, as in containers without an init, is gone all the same.
    """
    with suppress(OSError, IndexError):
        # The name before it, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else fields[19]
    return ""
