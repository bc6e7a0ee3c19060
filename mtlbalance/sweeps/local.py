"""The engine ``local``: N runs at a time on every device of this machine, each a process of its own."""

from __future__ import annotations

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

from mtlbalance.plugins.builtins import LocalOptions
from mtlbalance.sweeps.jobs import Attempt, Job, JobEnd

_LOOK_EVERY_SECONDS = 0.05


@dataclass(frozen=True)
class Slot:
    """A place for one run: a device, and what the run's environment says of it."""

    device: str
    environment: dict[str, str]


class LocalEngine:
    """Runs jobs as processes of this machine; see ``Engine``.

    A run on a GPU sees that GPU alone. Runs on the CPU share its cores: each has as many threads as its
    share, unless ``OMP_NUM_THREADS`` is set.
    """

    def __init__(self, options: LocalOptions) -> None:
        self._free = _slots(options)
        self._running: dict[str, tuple[Attempt, Slot]] = {}
        self._adopted: list[tuple[int, Slot]] = []  # processes that an earlier sweep left here

    def room(self) -> int:
        """Return the number of free slots."""
        for pid, slot in list(self._adopted):
            if not _is_alive(pid):
                self._adopted.remove((pid, slot))
                self._free.append(slot)
        return len(self._free)

    def start(self, job: Job) -> str:
        """Start a job in the slot that has been free for longest."""
        slot = self._free.pop(0)
        attempt = Attempt(replace(job, environment={**slot.environment, **job.environment}))
        self._running[job.run_id] = attempt, slot
        _record_path(job.log).write_text(
            json.dumps({"host": socket.gethostname(), "pid": attempt.pid, "device": slot.device})
        )
        return slot.device

    def poll(self, seconds: float) -> Sequence[JobEnd]:
        """Look at every process a few times a second."""
        deadline = time.monotonic() + seconds
        while True:
            ends = [end for attempt, _ in self._running.values() if (end := attempt.poll()) is not None]
            for end in ends:
                attempt, slot = self._running.pop(end.run_id)
                self._free.append(slot)
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
            if record["host"] != socket.gethostname() or not _is_alive(record["pid"]):
                return
            slot = next(slot for slot in self._free if slot.device == record["device"])
            self._free.remove(slot)
            self._adopted.append((record["pid"], slot))


def _slots(options: LocalOptions) -> list[Slot]:
    devices = _visible_devices() if options.devices == "auto" else options.devices
    count = len(devices) * options.per_device
    # Device by device, so that the first runs spread over all of them.
    return [
        Slot(device, _environment(device, count)) for _ in range(options.per_device) for device in devices
    ]


def _environment(device: str, num_slots: int) -> dict[str, str]:
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return {"CUDA_VISIBLE_DEVICES": index or "0"}
    if kind == "cpu":
        threads = {"OMP_NUM_THREADS": str(max(1, _num_cores() // num_slots))}
        return {"CUDA_VISIBLE_DEVICES": ""} | ({} if "OMP_NUM_THREADS" in os.environ else threads)
    return {}


def _visible_devices() -> list[str]:
    """Return every GPU that CUDA would show, or the CPU; torch, which takes seconds to import, is not asked."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and (smi := shutil.which("nvidia-smi")):
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30, check=True)
            gpus = [line for line in found.stdout.splitlines() if line.startswith("GPU ")]
            visible = ",".join(str(index) for index in range(len(gpus)))
    return [f"cuda:{index.strip()}" for index in (visible or "").split(",") if index.strip()] or ["cpu"]


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _record_path(log: Path) -> Path:
    return log.with_suffix(".process.json")


def _is_alive(pid: int) -> bool:
    if not hasattr(os, "killpg"):  # elsewhere, signal 0 is no question
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
