"""Carrying out a plan: what is left to do goes to an engine, and what comes back is judged."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mtlbalance.errors import RunFolderError
from mtlbalance.sweeps.display import AtWork, Display
from mtlbalance.sweeps.engines import Engine
from mtlbalance.sweeps.folder_state import FolderState, changed_keys, folder_state, folder_states
from mtlbalance.sweeps.jobs import Job, JobEnd
from mtlbalance.sweeps.plan import PLAN_FILE, Plan, PlannedRun
from mtlbalance.sweeps.retries import Retries

_LOOK_AT_LOCKED_SECONDS = 1.0
_INTERRUPTED, _PREEMPTED, _PARTLY_FAILED = 130, 75, 3


@dataclass
class SweepOutcome:
    """What a sweep came to.

    Args:
        skipped: the ids of runs that were finished before.
        finished: those that finished now.
        failed: why, by id.
        stopped: the exit code if it was stopped from outside, else 0.
    """

    skipped: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: int = 0
    wall_seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, 3 if a run failed, or that of the stop."""
        return self.stopped or (_PARTLY_FAILED if self.failed else 0)

    @property
    def num_done(self) -> int:
        """Runs that need nothing more, those of earlier sweeps included."""
        return len(self.skipped) + len(self.finished) + len(self.failed)

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {
            "skipped": self.skipped,
            "finished": self.finished,
            "failed": self.failed,
            "exit_code": self.exit_code,
            "wall_seconds": round(self.wall_seconds, 3),
        }


def prepare(plan: Plan) -> None:
    """Make the sweep's folder and write the plan there, unless the folder belongs to something else.

    Raises:
        RunFolderError: it is another sweep's, or has runs of the same names from another config.
    """
    path = plan.folder / PLAN_FILE
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8")).get("sweep")
        except (OSError, ValueError, AttributeError):
            before = None
        if before not in (plan.name, None):  # None: damaged, and written again
            raise RunFolderError(
                f"{plan.folder} is the folder of the sweep {before!r}, not of {plan.name!r}; choose another --out"
            )
    others = changed_runs(plan)
    if others:
        run_id, changed = next(iter(others.items()))
        raise RunFolderError(
            f"{len(others)} of {len(plan.runs)} runs in {plan.folder} were trained with another config; of {run_id} "
            "these keys differ (there -> here):\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nchoose another --out or another name for the sweep, or remove those runs"
        )
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{PLAN_FILE}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunFolderError(f"cannot write to the sweep's folder {plan.folder}: {error}") from error


def changed_runs(plan: Plan) -> dict[str, list[str]]:
    """Return what differs in the runs that were trained with another config than the plan's, by id."""
    found = {
        run.id: changed_keys(plan.folder_of(run.id), run.config)
        for run in plan.runs
        if run.config is not None
    }
    return {run_id: keys for run_id, keys in found.items() if keys}


def supervise(
    plan: Plan,
    engine: Engine,
    display: Display,
    *,
    retries: int = 2,
    timeout_seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> SweepOutcome:
    """Carry out what is left of a plan. Nothing is remembered but in the runs' folders.

    Args:
        plan: with the runs' configs.
        engine: where.
        display: what a person sees.
        retries: how often a run that was lost or killed is tried again.
        timeout_seconds: after which an attempt is stopped, or None.
        environment: what every run's environment has besides.
    """
    with _signals_noted() as received:
        supervisor = _Supervisor(plan, engine, display, Retries(retries), received)
        supervisor.timeout_seconds = timeout_seconds
        supervisor.environment = environment or {}
        return supervisor.run()


class _Supervisor:
    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        display: Display,
        retries: Retries,
        received: list[int],
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.display = display
        self.retries = retries
        self.timeout_seconds: float | None = None
        self.environment: Mapping[str, str] = {}
        self.received = received
        self.outcome = SweepOutcome()
        self.runs = {run.id: run for run in plan.runs}
        self.waiting: deque[PlannedRun] = deque()
        self.running: dict[str, AtWork] = {}
        self.locked: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.looked_at_locked = 0.0

    def run(self) -> SweepOutcome:
        started = time.monotonic()
        states = folder_states(self.plan)
        self.outcome.skipped = [run_id for run_id, state in states.items() if state is FolderState.FINISHED]
        self.display.start(self.plan, self.outcome)
        for run in self.plan.runs:
            if states[run.id] is FolderState.LOCKED:
                self.leave(run)
            elif states[run.id] is not FolderState.FINISHED:
                self.waiting.append(run)
        try:
            while self.waiting or self.running or self.locked:
                if self.received:
                    self.wind_down()
                    break
                self.look_at_locked()
                self.start_some()
                for end in self.engine.poll(0.2):
                    self.take(end)
                self.display.tick(self.running, len(self.waiting), self.locked)
        finally:
            self.engine.close()
            self.outcome.wall_seconds = time.monotonic() - started
            self.display.stop()
        return self.outcome

    def leave(self, run: PlannedRun) -> None:
        self.locked.add(run.id)
        self.engine.adopt(self.plan.log_of(run.id))
        self.display.locked(run.id)

    def look_at_locked(self) -> None:
        """A run that another process was at is finished now, or is ours to resume."""
        now = time.monotonic()
        if now - self.looked_at_locked < _LOOK_AT_LOCKED_SECONDS:
            return
        self.looked_at_locked = now
        for run_id in sorted(self.locked):
            state = folder_state(self.plan.folder_of(run_id))
            if state is FolderState.LOCKED:
                continue
            self.locked.discard(run_id)
            if state is FolderState.FINISHED:
                self.finished_elsewhere(self.runs[run_id])
            else:
                self.waiting.append(self.runs[run_id])

    def finished_elsewhere(self, run: PlannedRun) -> None:
        """Another process has finished a run: perhaps one that was started before its config changed."""
        assert run.config is not None
        if changed := changed_keys(self.plan.folder_of(run.id), run.config):
            self.fail(run, f"another process has finished it with another config: {'; '.join(changed)}")
        else:
            self.outcome.finished.append(run.id)
            self.display.ended(run.id, "finished", "by another process", 0.0)

    def fail(self, run: PlannedRun, reason: str) -> None:
        self.outcome.failed[run.id] = reason
        self.display.ended(run.id, "failed", reason, 0.0)

    def start_some(self) -> None:
        while self.waiting and self.engine.room() > 0 and not self.received:
            run = self.waiting.popleft()
            state = folder_state(self.plan.folder_of(run.id))
            if state is FolderState.LOCKED:
                self.leave(run)
                continue
            if state is FolderState.FINISHED:  # by another sweep, or by a run whose worker was lost
                self.finished_elsewhere(run)
                continue
            attempt = self.attempts[run.id] = self.attempts.get(run.id, 0) + 1
            try:
                where = self.engine.start(self.job(run, attempt))
            except OSError as error:  # no log, no process: the others go on
                self.fail(run, f"it cannot be started: {error}")
                continue
            at_work = AtWork(where, time.monotonic(), attempt, resumed=state is FolderState.BROKEN)
            self.running[run.id] = at_work
            self.display.started(run.id, at_work)

    def job(self, run: PlannedRun, attempt: int) -> Job:
        assert run.config is not None  # a plan to carry out was made, not read back
        return Job(
            run_id=run.id,
            config=run.config.to_toml(),
            config_path=self.plan.config_of(run.id),
            folder=self.plan.folder_of(run.id),
            log=self.plan.log_of(run.id),
            attempt=attempt,
            timeout_seconds=self.timeout_seconds,
            environment=self.environment,
        )

    def take(self, end: JobEnd) -> None:
        self.running.pop(end.run_id)
        run = self.runs[end.run_id]
        verdict = self.retries.judge(end, folder_state(self.plan.folder_of(run.id)))
        if verdict.outcome == "finished":
            self.outcome.finished.append(run.id)
        elif verdict.outcome == "failed":
            self.outcome.failed[run.id] = verdict.reason
        elif verdict.outcome == "retry":
            self.waiting.appendleft(run)
        else:
            self.attempts[run.id] -= 1
            self.leave(run)
            return
        self.display.ended(run.id, verdict.outcome, verdict.reason, end.seconds)

    def wind_down(self) -> None:
        """Ask the runs to end and wait for them; a second signal kills them."""
        self.display.stopping(len(self.running))
        self.engine.stop()
        while self.running and len(self.received) < 2:
            for end in self.engine.poll(0.2):
                self.running.pop(end.run_id)
                if end.exit_code == 0:
                    self.outcome.finished.append(end.run_id)
            self.display.tick(self.running, len(self.waiting), self.locked)
        self.outcome.stopped = _INTERRUPTED if self.received[0] == signal.SIGINT else _PREEMPTED


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Give a list to which Ctrl-C and SIGTERM are added, in place of what they do otherwise."""
    received: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.getsignal(signum) for signum in numbers}
    for signum, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)
