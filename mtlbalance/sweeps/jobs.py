"""One run as a process of its own: what every engine starts, here or on another machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

HowItEnded = Literal["exit", "timeout", "lost"]
_GRACE_SECONDS = 30.0
_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Job:
    """One attempt at one run.

    Args:
        run_id: the run's id in the plan.
        config: the resolved config as TOML.
        config_path: where to write it.
        folder: the run's folder.
        log: where the run's output goes; attempts follow each other.
        attempt: 1 for the first.
        timeout_seconds: after which the attempt is stopped, or None.
        environment: what to add to the environment.
    """

    run_id: str
    config: str
    config_path: Path
    folder: Path
    log: Path
    attempt: int = 1
    timeout_seconds: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``mtlbalance`` with which the run can be started by hand, too."""
        return ["run", str(self.config_path), "--out", str(self.folder)]


@dataclass(frozen=True)
class JobEnd:
    """How an attempt ended.

    Args:
        run_id: the run's id in the plan.
        exit_code: of the process; below 0, the signal that killed it.
        how: ``"exit"``: by itself; ``"timeout"``: it was stopped; ``"lost"``: with the machine it was on.
        tail: the end of its output.
        seconds: how long it took.
    """

    run_id: str
    exit_code: int
    how: HowItEnded = "exit"
    tail: str = ""
    seconds: float = 0.0

    @property
    def last_words(self) -> str:
        """The last error in its output, or its last line."""
        lines = [line.strip() for line in self.tail.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or [""])[-1].removeprefix("error: ")


class Attempt:
    """A job's process. Make one to start it, then ``poll`` until it gives the end.

    The process is the head of a session of its own: a Ctrl-C in the terminal reaches the sweep alone, which
    then stops its runs in order.

    Args:
        job: what to run.
        leashed: whether the run stops, in order, when this process is gone; else it goes on to its end.
    """

    def __init__(self, job: Job, *, leashed: bool = False) -> None:
        self.job = job
        self._started = time.monotonic()
        self._timed_out = False
        self._kill_at: float | None = None
        for path in (job.config_path, job.log):
            path.parent.mkdir(parents=True, exist_ok=True)
        _write(job.config_path, job.config)
        self._log: IO[bytes] = job.log.open("ab")
        try:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._log.write(f"--- attempt {job.attempt}, {now}\n".encode())
            self._log.flush()
            self._tail_from = self._log.tell()
            self._process = subprocess.Popen(
                [*_python(), "-m", "mtlbalance.cli.leash" if leashed else "mtlbalance", *job.arguments],
                env={**os.environ, **job.environment},
                stdin=subprocess.PIPE if leashed else subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            self._log.close()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def poll(self) -> JobEnd | None:
        """Return the end, or None while it runs; stops it once its time is up."""
        code = self._exit_code()
        now = time.monotonic()
        if code is None:
            limit = self.job.timeout_seconds
            if limit is not None and not self._timed_out and now - self._started > limit:
                self._timed_out = True
                self.stop()
            if self._kill_at is not None and now > self._kill_at:
                self.kill()
            return None
        self._log.close()
        if self._process.stdin:
            self._process.stdin.close()
        how: HowItEnded = "timeout" if self._timed_out and code != 0 else "exit"
        return JobEnd(self.job.run_id, code, how, self._tail(), now - self._started)

    def stop(self) -> None:
        """Ask it to leave its folder in order and end; it is killed if that takes longer than half a minute."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + _GRACE_SECONDS
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now, with everything that it started."""
        self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))

    def _exit_code(self) -> int | None:
        """Return the exit code, or None while it runs; what a run that failed has left behind is killed.

        Processes that load data may otherwise live on, and hold a GPU's memory. They are killed before the
        run's own process is reaped: until then, no other process can have its number.
        """
        if self._process.returncode is None and hasattr(os, "waitid"):
            end = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is None:
                return None
            if (end.si_code, end.si_status) != (os.CLD_EXITED, 0):
                self.kill()
        return self._process.poll()

    def _signal(self, signum: int) -> None:
        if self._process.returncode is not None:
            return
        with suppress(ProcessLookupError, PermissionError):  # the latter: of a process that has just ended
            if signum == signal.SIGTERM or not hasattr(os, "killpg"):
                os.kill(self._process.pid, signum)
            else:
                os.killpg(self._process.pid, signum)

    def _tail(self) -> str:
        with suppress(OSError), self.job.log.open("rb") as file:  # somebody may have tidied up
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._tail_from, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
        return ""


def run_job(job: Job) -> JobEnd:
    """Run a job to its end; for engines whose workers have nothing else to do.

    A worker that is interrupted stops its run in order first; one that is killed lets go of its leash.
    """
    attempt = Attempt(job, leashed=True)
    try:
        while (end := attempt.poll()) is None:
            time.sleep(0.1)
        return end
    except BaseException:
        attempt.stop()
        while attempt.poll() is None:
            time.sleep(0.1)
        raise


def _python() -> list[str]:
    """Return how to start Python: the current folder is on a run's path only where it is on ours.

    Else a ``random.py`` that lies there would be taken for Python's own by every run, but not by the sweep.
    """
    here = Path.cwd()
    is_on_path = any(Path(entry or ".").resolve() == here for entry in sys.path)
    return [sys.executable, *([] if is_on_path else ["-P"])]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
