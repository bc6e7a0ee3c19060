"""What a person sees of a run, on stderr: a bar in a terminal, a line an epoch elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

_REDRAW_SECONDS = 0.25
_READ_LOSSES_SECONDS = 2.0


@dataclass(frozen=True)
class RunShape:
    """What progress is measured against.

    Args:
        name: the run's name.
        tasks: in order.
        key_metric: the one to show.
        epochs: at most this many.
        steps: training steps an epoch.
        first_epoch: 0, or where a resumed run goes on.
    """

    name: str
    tasks: Sequence[str]
    key_metric: str
    epochs: int
    steps: int
    first_epoch: int


class ProgressReport:
    """Shows nothing; the base of those that do."""

    def notice(self, text: str) -> None:
        """Show a sentence that must be seen."""

    def start(self, shape: RunShape) -> None:
        """Begin."""

    def step(self, epoch: int, step: int, read_losses: Callable[[], Mapping[str, float]]) -> None:
        """Note a training step; ``read_losses`` waits for the device, so it is called rarely."""

    def epoch(self, row: Mapping[str, float | None], weights: Mapping[str, float], best: str) -> None:
        """Note an epoch: its row of ``metrics.csv``, the applied weights, the best so far in words."""

    def stop(self) -> None:
        """End; what is shown stays."""


class PlainLines(ProgressReport):
    """A line an epoch, for logs and pipes."""

    def notice(self, text: str) -> None:
        """Print the sentence."""
        print(text, file=sys.stderr, flush=True)

    def start(self, shape: RunShape) -> None:
        """Keep the shape and the time."""
        self._shape = shape
        self._started = time.monotonic()

    def epoch(self, row: Mapping[str, float | None], weights: Mapping[str, float], best: str) -> None:
        """Print the line."""
        shape, done = self._shape, int(row["epoch"] or 0) + 1
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - shape.first_epoch) * (shape.epochs - done)
        epoch = f"epoch {done - 1} ({done} of {shape.epochs})"
        print(
            f"{epoch}  {_summary(shape, row, weights)} ({best})  left at most {_clock(left)}",
            file=sys.stderr,
            flush=True,
        )


class Bar(ProgressReport):
    """A live bar with epoch, time left, task losses, weights and the key metric."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def notice(self, text: str) -> None:
        """Print the sentence above the bar."""
        self._console.print(Text(text, style="yellow"))

    def start(self, shape: RunShape) -> None:
        """Draw the bar."""
        self._shape = shape
        self._started = self._drawn = self._read = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"),
            console=self._console,
        )  # fmt: skip
        self._first = shape.first_epoch * shape.steps
        self._task = self._bar.add_task(
            _title(shape, shape.first_epoch),
            total=shape.epochs * shape.steps, completed=self._first, left="",
        )  # fmt: skip
        self._weights: Mapping[str, float] = {}
        self._details, self._best = Text(), Text()
        self._live = Live(
            Group(self._bar, self._details, self._best),
            console=self._console, auto_refresh=False, vertical_overflow="visible",
        )  # fmt: skip
        self._live.start(refresh=True)

    def step(self, epoch: int, step: int, read_losses: Callable[[], Mapping[str, float]]) -> None:
        """Move the bar, a few times a second at most."""
        now = time.monotonic()
        if self._live is None or now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        if now - self._read >= _READ_LOSSES_SECONDS:
            self._read = now
            self._details.plain = _summary(self._shape, dict(read_losses()), self._weights)
        self._move(epoch, epoch * self._shape.steps + step + 1)

    def epoch(self, row: Mapping[str, float | None], weights: Mapping[str, float], best: str) -> None:
        """Show the epoch's figures."""
        self._weights = weights
        self._read = time.monotonic()
        self._details.plain = _summary(self._shape, row, weights)
        self._best.plain = best
        epoch = int(row["epoch"] or 0)
        self._move(epoch, (epoch + 1) * self._shape.steps)

    def stop(self) -> None:
        """Leave the last picture on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _move(self, epoch: int, completed: int) -> None:
        rate = (completed - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = (self._shape.epochs * self._shape.steps - completed) / rate if rate > 0 else 0.0
        self._bar.update(
            self._task,
            completed=completed,
            description=_title(self._shape, epoch),
            left=f"at most {_clock(left)} left",
        )
        if self._live is not None:
            self._live.refresh()


class UntilItFails(ProgressReport):
    """Shows what another report shows, until that cannot be written: training goes on without it.

    A terminal that was closed, or the end of a pipe that is gone, must not cost a run.
    """

    def __init__(self, report: ProgressReport) -> None:
        self._report = report

    def notice(self, text: str) -> None:
        """Pass it on."""
        with self._giving_up():
            self._report.notice(text)

    def start(self, shape: RunShape) -> None:
        """Pass it on."""
        with self._giving_up():
            self._report.start(shape)

    def step(self, epoch: int, step: int, read_losses: Callable[[], Mapping[str, float]]) -> None:
        """Pass it on."""
        with self._giving_up():
            self._report.step(epoch, step, read_losses)

    def epoch(self, row: Mapping[str, float | None], weights: Mapping[str, float], best: str) -> None:
        """Pass it on."""
        with self._giving_up():
            self._report.epoch(row, weights, best)

    def stop(self) -> None:
        """Pass it on."""
        with self._giving_up():
            self._report.stop()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            failed, self._report = self._report, ProgressReport()
            with suppress(OSError):
                failed.stop()


def make_progress(*, quiet: bool) -> ProgressReport:
    """Return the report that fits where stderr goes."""
    if quiet:
        return ProgressReport()
    console = Console(stderr=True)
    bar = console.is_terminal and not console.is_dumb_terminal
    return UntilItFails(Bar(console) if bar else PlainLines())


def _title(shape: RunShape, epoch: int) -> str:
    """Number epochs from 0, as the run's files do."""
    return f"{shape.name}  epoch {epoch} ({epoch + 1} of {shape.epochs})"


def _summary(shape: RunShape, row: Mapping[str, float | None], weights: Mapping[str, float]) -> str:
    parts = ["loss " + "  ".join(f"{task} {_short(row.get(f'train_loss_{task}'))}" for task in shape.tasks)]
    if not all(math.isnan(weight) for weight in weights.values()):  # some methods have none
        parts.append("weight " + "  ".join(f"{task} {_short(weights.get(task))}" for task in shape.tasks))
    if shape.key_metric in row:
        parts.append(f"{shape.key_metric} {_short(row[shape.key_metric])}")
    return " | ".join(parts)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
