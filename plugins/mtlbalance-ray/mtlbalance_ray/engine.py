"""Jobs as tasks of Ray: the supervisor retries, Ray finds the place."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError

from mtlbalance.errors import PluginError
from mtlbalance.sweeps import Job, JobEnd, run_job

from . import RayOptions
from .artefacts import pack, unpack

_PREEMPTED = 75


class RayEngine:
    """Hands jobs to a Ray cluster; see ``mtlbalance.sweeps.Engine``.

    Ray itself tries nothing again: a task that is lost with its node comes back as lost, and the sweep starts
    it again from what is in the run's folder.
    """

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        try:
            _check_reachable(options.address)
            ray.init(address=options.address, log_to_driver=False, logging_level="warning")
        except (OSError, RuntimeError, ValueError) as error:
            raise PluginError(
                f"engine 'ray': cannot use the cluster at {options.address!r}: {error}"
            ) from error
        self._gpus = options.gpus_per_run
        if self._gpus is None:
            self._gpus = 1 / options.per_device if ray.cluster_resources().get("GPU") else 0.0
        carry_out = ray.remote(max_retries=0, num_cpus=options.cpus_per_run, num_gpus=self._gpus)
        self._task = carry_out(_in_shared_folder if options.shared_folder else _with_artefacts)
        self._pending: dict[Any, Job] = {}

    def room(self) -> int:
        """Return how many more runs the cluster's resources take; they may grow and shrink."""
        resources = ray.cluster_resources()
        most = int(resources.get("CPU", 0) / self._options.cpus_per_run + 1e-9)
        if self._gpus:
            most = min(most, int(resources.get("GPU", 0) / self._gpus + 1e-9))
        return max(most, 1) - len(self._pending)

    def start(self, job: Job) -> str:
        """Queue a job."""
        job = replace(
            job,
            folder=job.folder.absolute(),
            log=job.log.absolute(),
            config_path=job.config_path.absolute(),
        )
        files = None if self._options.shared_folder else pack(job.folder)
        self._pending[self._task.remote(job, files)] = job
        return "ray"

    def poll(self, seconds: float) -> Sequence[JobEnd]:
        """Wait for a task to end."""
        if not self._pending:
            return []
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        if ready:
            ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        return [self._end(reference, self._pending.pop(reference)) for reference in ready]

    def stop(self) -> None:
        """Interrupt every task, which stops its run in order."""
        for reference in self._pending:
            ray.cancel(reference, force=False)

    def close(self) -> None:
        """Leave the cluster, which goes on; a Ray that this process started ends with it."""
        ray.shutdown()

    def adopt(self, log: Path) -> None:
        """Ray counts its own tasks; what runs elsewhere takes up none of them."""

    def _end(self, reference: Any, job: Job) -> JobEnd:
        end: JobEnd
        try:
            end, files, output = ray.get(reference)
        except TaskCancelledError:
            return JobEnd(job.run_id, _PREEMPTED, tail="cancelled")
        except RayError as error:
            return JobEnd(job.run_id, -1, how="lost", tail=type(error).__name__)
        if files is not None:
            unpack(files, job.folder)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab") as log:
                log.write(output)
        return end


def _check_reachable(address: str | None) -> None:
    """Ray itself tries for minutes before it gives up."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _in_shared_folder(job: Job, _files: bytes | None) -> tuple[JobEnd, bytes | None, bytes]:
    """Run on a node that sees the sweep's folder."""
    return run_job(job), None, b""


def _with_artefacts(job: Job, files: bytes | None) -> tuple[JobEnd, bytes | None, bytes]:
    """Run in a temporary folder of the node, from the files that are sent, and return what is there then."""
    with tempfile.TemporaryDirectory(prefix="mtlbalance-ray-") as temporary:
        place = Path(temporary)
        here = replace(job, folder=place / "run", log=place / "log", config_path=place / "config.toml")
        if files is not None:
            unpack(files, here.folder)
        try:
            end = run_job(here)
        except (
            KeyboardInterrupt
        ):  # the sweep is being stopped, and the run was, in order: what it has goes back, too
            end = JobEnd(job.run_id, _PREEMPTED, tail="cancelled")
        return end, pack(here.folder), here.log.read_bytes()
