"""The parts of a run: how to leave each out, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Balancer
from mtlbalance.training import batches, step
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.evaluation import WeightEMA
from mtlbalance.training.gradient_stats import GradientStats
from mtlbalance.training.losses import TaskLosses
from mtlbalance.training.record import CsvTable, EventLog
from mtlbalance.training.step_losses import StepLosses
from mtlbalance.training.trainer import Trainer

_INDEXED: Any = batches._IndexedBatches


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing instead."""


def _same_batch(epoch: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Yield the first batch of an epoch in place of all the others."""

    def repeated(self: Any, first_batch: int = 0) -> Iterator[Any]:
        batch = next(epoch(self, first_batch))
        for _ in range(len(self) - first_batch):
            yield batch

    return repeated


def _no_row(self: StepLosses, _losses: Any, total: Tensor, _grad_norm: Any) -> Tensor:
    return torch.zeros(len(self.tasks) + 2, device=total.device)


WITHOUT: dict[str, list[tuple[Any, str, Any]]] = {
    "drawing batches": [(_INDEXED, "epoch", _same_batch(_INDEXED.epoch))],
    "checkpoints": [(Checkpoints, "save", _nothing)],
    "files and log": [(CsvTable, "append", _nothing), (EventLog, "write", _nothing)],
    "loss rows and finite checks": [
        (StepLosses, "row", _no_row),
        (StepLosses, "check", _nothing),
        (step.TrainingStep, "check_weights", _nothing),
    ],
    "gradient statistics": [(GradientStats, "before_balancing", _nothing)],
}


@contextmanager
def without(part: str) -> Iterator[None]:
    """Leave one part of a run out."""
    with ExitStack() as stack:
        for owner, name, instead in WITHOUT[part]:
            stack.enter_context(patch.object(owner, name, instead))
        yield


_TIMED: tuple[tuple[str, Any, str], ...] = (
    ("forward", nn.Module, "__call__"),
    ("inner losses", TaskLosses, "__call__"),
    ("balancer", Balancer, "__call__"),
    ("backward", Tensor, "backward"),
    ("clipping", step, "clip_gradients"),
    ("AdamW", torch.optim.AdamW, "step"),
    ("weight average", WeightEMA, "update"),
    ("loss rows and finite checks", StepLosses, "row"),
    ("loss rows and finite checks", StepLosses, "keep"),
    ("loss rows and finite checks", StepLosses, "means"),
    ("loss rows and finite checks", step.TrainingStep, "check_weights"),
    ("gradient statistics", GradientStats, "before_balancing"),
    ("gradient statistics", GradientStats, "row"),
    ("evaluation", Trainer, "_evaluate"),
    ("checkpoints", Checkpoints, "save"),
    ("files and log", CsvTable, "append"),
    ("files and log", EventLog, "write"),
)
REST = "all else"


class PartTimes:
    """Wall seconds by part, of what is called while it is entered; a part inside another counts for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        return timed

    def _drawn(self, epoch: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def drawn(self_: Any, first_batch: int = 0) -> Iterator[Any]:
            taken = epoch(self_, first_batch)
            following = self._timed("drawing batches", lambda: next(taken, None))
            while (batch := following()) is not None:
                yield batch

        return drawn

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the parts of what runs in the body."""
        with ExitStack() as stack:
            for part, owner, name in _TIMED:
                stack.enter_context(
                    patch.object(owner, name, self._timed(part, getattr(owner, name)), create=True)
                )
            stack.enter_context(patch.object(_INDEXED, "epoch", self._drawn(_INDEXED.epoch)))
            yield
