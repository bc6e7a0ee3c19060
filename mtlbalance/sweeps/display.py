"""What a person sees of a sweep, on stderr: a live table in a terminal, a line an event elsewhere, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mtlbalance.sweeps.plan import Plan

if TYPE_CHECKING:
    from mtlbalance.sweeps.supervisor import SweepOutcome

_REDRAW_SECONDS = 0.5
_NUM_EVENTS = 5
_LEAST_WIDTH = 12  # of a run's name
_SPARE = 4  # columns, so that the terminal's own ^C fits in the line and moves nothing
_STYLES = {"finished": "green", "failed": "bold red", "retry": "yellow"}


@dataclass(frozen=True)
class AtWork:
    """A run that is at work: where, since when (monotonic seconds), and which attempt it is."""

    where: str
    since: float
    attempt: int
    resumed: bool


class Display:
    """Shows nothing; the base of those that do."""

    def start(self, plan: Plan, outcome: SweepOutcome) -> None:
        """Begin; ``outcome`` is kept up to date by the sweep."""

    def started(self, run_id: str, at_work: AtWork) -> None:
        """Note that a run was started."""

    def ended(self, run_id: str, outcome: str, reason: str, seconds: float) -> None:
        """Note that an attempt ended."""

    def locked(self, run_id: str) -> None:
        """Note that another process is at a run."""

    def tick(self, running: Mapping[str, AtWork], num_waiting: int, locked: Collection[str]) -> None:
        """Note how things stand, a few times a second."""

    def stopping(self, num_running: int) -> None:
        """Note that the sweep was asked to stop."""

    def stop(self) -> None:
        """End; what is shown stays."""


class PlainLines(Display):
    """A line an event, for logs and pipes."""

    def start(self, plan: Plan, outcome: SweepOutcome) -> None:
        """Say what there is to do."""
        self._plan, self._outcome, self._began = plan, outcome, time.monotonic()
        skipped = f", {len(outcome.skipped)} finished before" if outcome.skipped else ""
        to_do = len(plan.runs) - len(outcome.skipped)
        self._print(f"{plan.name}: {to_do} of {len(plan.runs)} runs to do{skipped}; in {plan.folder}")

    def started(self, run_id: str, at_work: AtWork) -> None:
        """Say so."""
        how = f", attempt {at_work.attempt}" if at_work.attempt > 1 else ""
        how += ", resumed" if at_work.resumed else ""
        self._print(f"started  {run_id} on {at_work.where}{how}")

    def ended(self, run_id: str, outcome: str, reason: str, seconds: float) -> None:
        """Say how, and what is left."""
        parts = [f"{outcome:<8} {run_id}"]
        if seconds:
            parts.append(f" in {_clock(seconds)}")
        if reason:
            parts.append(f": {reason}" if outcome != "finished" else f", {reason}")
        if outcome == "failed":
            parts.append(f" (see {self._plan.log_of(run_id)})")
        if outcome != "retry":
            left = _time_left(self._plan, self._outcome, self._began)
            parts.append(f"  [{self._outcome.num_done}/{len(self._plan.runs)}{', ' + left if left else ''}]")
        self._print("".join(parts))

    def locked(self, run_id: str) -> None:
        """Say so."""
        self._print(f"locked   {run_id}: another process is at it; it is left alone and looked at again")

    def stopping(self, num_running: int) -> None:
        """Say so."""
        self._print(_stopping(num_running))

    def _print(self, text: str) -> None:
        with suppress(
            OSError
        ):  # nobody reads any more, as in `... 2>&1 | head`: the runs matter, not their news
            print(text, file=sys.stderr, flush=True)


class LiveTable(Display):
    """A bar, the runs at work with their epochs, and what happened last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._events: deque[Text] = deque(maxlen=_NUM_EVENTS)
        self._drawn = 0.0

    def start(self, plan: Plan, outcome: SweepOutcome) -> None:
        """Draw the table."""
        self._plan, self._outcome, self._began = plan, outcome, time.monotonic()
        self._epochs = {run.id: run.config.training.epochs for run in plan.runs if run.config is not None}
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task(plan.name, total=len(plan.runs), words="")
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._live.start()

    def ended(self, run_id: str, outcome: str, reason: str, seconds: float) -> None:
        """Keep it among the last events; a failure stays on the screen."""
        event = Text(f"{outcome} ", style=_STYLES.get(outcome, ""))
        event.append(run_id, style="bold").append(f" {_clock(seconds)} {reason}".rstrip())
        if outcome == "failed":
            self._console.print(event)
        else:
            self._events.append(event)

    def tick(self, running: Mapping[str, AtWork], num_waiting: int, locked: Collection[str]) -> None:
        """Draw, a few times a second at most."""
        now = time.monotonic()
        if now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        words = [f"{num_waiting} waiting"] if num_waiting else []
        words += [f"{len(locked)} locked"] if locked else []
        words += filter(None, [_time_left(self._plan, self._outcome, self._began)])
        rows = [
            (run_id, at_work.where, str(at_work.attempt), _clock(now - at_work.since))
            for run_id, at_work in sorted(running.items())
        ]
        rows += [(run_id, "another process", "", "") for run_id in sorted(locked)]
        self._draw(words, self._table(rows))

    def stopping(self, num_running: int) -> None:
        """Say so."""
        self._console.print(_stopping(num_running))

    def stop(self) -> None:
        """Leave the last picture on the screen."""
        if self._live is not None:
            self._draw([])
            self._live.stop()
            self._live = None

    def _draw(self, words: Sequence[str], *table: Table) -> None:
        outcome, total = self._outcome, len(self._plan.runs)
        counts = [
            f"{outcome.num_done}/{total}",
            *([f"{len(outcome.failed)} failed"] if outcome.failed else []),
        ]
        self._bar.update(self._task, completed=outcome.num_done, words="  ".join([*counts, *words]))
        events = [event.copy() for event in self._events]
        for event in events:
            event.truncate(self._console.width - _SPARE, overflow="ellipsis")
        if self._live is not None:
            self._live.update(Group(self._bar, *table, *events), refresh=True)

    def _table(self, rows: Sequence[tuple[str, str, str, str]]) -> Table:
        """Return the runs at work, in a table that is neither wider nor higher than the terminal."""
        room = max(1, self._console.height - _NUM_EVENTS - 4)
        shown = rows if len(rows) <= room else rows[: room - 1]
        table = Table(box=None, pad_edge=False, header_style="dim")
        titles = ("on", "attempt", "for", "epoch")
        table.add_column("run", no_wrap=True)
        for title in titles:
            table.add_column(title, no_wrap=True, justify="right" if title in ("for", "epoch") else "left")
        cells = [(run_id, *rest, self._epoch(run_id)) for run_id, *rest in shown]
        others = (
            max([len(title), *(len(row[index]) for row in cells)]) for index, title in enumerate(titles, 1)
        )
        width = max(_LEAST_WIDTH, self._console.width - _SPARE - sum(others) - 2 * len(titles))
        for run_id, *rest in cells:
            # Its end tells a run from the others.
            table.add_row(run_id if len(run_id) <= width else f"…{run_id[1 - width :]}", *rest)
        if len(rows) > len(shown):
            table.add_row(f"and {len(rows) - len(shown)} more")
        return table

    def _epoch(self, run_id: str) -> str:
        done = _epochs_done(self._plan.folder_of(run_id))
        return f"{done}/{self._epochs[run_id]}" if done and run_id in self._epochs else done


def make_display(*, quiet: bool) -> Display:
    """Return the display that fits where stderr goes."""
    if quiet:
        return Display()
    console = Console(stderr=True)
    return LiveTable(console) if console.is_terminal and not console.is_dumb_terminal else PlainLines()


def _time_left(plan: Plan, outcome: SweepOutcome, began: float) -> str:
    """Return a guess from the runs that have ended, or nothing."""
    ended = len(outcome.finished) + len(outcome.failed)
    left = len(plan.runs) - outcome.num_done
    return f"about {_clock((time.monotonic() - began) / ended * left)} left" if ended and left else ""


def _stopping(num_running: int) -> str:
    return f"stopping: {num_running} at work, asked to leave their folders in order; once more kills them"


def _epochs_done(folder: Path) -> str:
    """Return how many epochs a run has finished, or nothing: the last line of its ``metrics.csv`` counts from 0."""
    with suppress(OSError, ValueError), (folder / "metrics.csv").open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4000))
        lines = file.read().decode(errors="replace").splitlines()
        return str(int(lines[-1].partition(",")[0]) + 1) if lines else ""
    return ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
