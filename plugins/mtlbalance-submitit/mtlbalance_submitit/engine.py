"""Jobs as jobs of SLURM: the supervisor retries, SLURM finds the place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from mtlbalance.sweeps import Job, JobEnd, run_job

from . import SubmititOptions

_LOOK_EVERY_SECONDS = 0.5
_PREEMPTED = 75


class SubmititEngine:
    """Submits jobs through submitit; see ``mtlbalance.sweeps.Engine``.

    Every node must see the sweep's folder, where submitit's own files go too (``logs/submitit``). A sweep
    that is killed leaves its jobs in the queue; started again, it finds what they have finished, and leaves
    what they are at alone.
    """

    def __init__(self, options: SubmititOptions) -> None:
        self._options = options
        self._executor: Any = None
        self._pending: dict[str, tuple[Any, Job]] = {}

    def room(self) -> int:
        """Return how many more jobs may be queued."""
        return self._options.at_once - len(self._pending)

    def start(self, job: Job) -> str:
        """Submit a job."""
        job = replace(
            job,
            folder=job.folder.absolute(),
            log=job.log.absolute(),
            config_path=job.config_path.absolute(),
        )
        if self._executor is None:
            root = job.folder
            for _ in Path(job.run_id).parts:
                root = root.parent
            self._executor = _executor(self._options, root / "logs" / "submitit")
        submitted = self._executor.submit(run_job, job)
        self._pending[job.run_id] = submitted, job
        return f"{self._executor.cluster} {submitted.job_id}"

    def poll(self, seconds: float) -> Sequence[JobEnd]:
        """Ask for the state of every job now and then."""
        deadline = time.monotonic() + seconds
        while True:
            done = [run_id for run_id, (submitted, _) in self._pending.items() if submitted.done()]
            if done or time.monotonic() >= deadline:
                return [self._end(*self._pending.pop(run_id)) for run_id in done]
            time.sleep(min(_LOOK_EVERY_SECONDS, max(0.0, deadline - time.monotonic())))

    def stop(self) -> None:
        """Cancel every job; a run that is at work stops in order."""
        for submitted, _ in self._pending.values():
            submitted.cancel(check=False)

    def close(self) -> None:
        """Cancel what is left."""
        self.stop()

    def adopt(self, log: Path) -> None:
        """SLURM counts its own jobs."""

    def _end(self, submitted: Any, job: Job) -> JobEnd:
        try:
            end: JobEnd = submitted.result()
        except Exception as error:  # submitit's, or whatever the job raised
            state = str(submitted.state).split()[0].upper()
            words = str(error).strip().splitlines()[-1:] or [""]
            if state.startswith("CANCELLED"):
                return JobEnd(job.run_id, _PREEMPTED, tail="cancelled")
            return JobEnd(job.run_id, -1, how="lost", tail=f"{state} {words[0]}")
        return end


def _executor(options: SubmititOptions, folder: Path) -> Any:
    executor = submitit.AutoExecutor(
        folder=folder, cluster=None if options.cluster == "auto" else options.cluster
    )
    executor.update_parameters(
        name="mtlbalance",
        timeout_min=options.minutes,
        cpus_per_task=options.cpus_per_run,
        gpus_per_node=options.gpus_per_run,
        **({"slurm_partition": options.partition} if options.partition else {}),
        **({"mem_gb": options.memory_gb} if options.memory_gb else {}),
        **options.parameters,
    )
    return executor
