"""The losses of an epoch's steps, kept on the device until someone reads them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtlbalance.errors import NonFiniteError

_CUDA_CHECK_EVERY_STEPS = 50


class StepLosses:
    """One row a step: each task's mean loss, the balanced total, and the gradient norm before clipping.

    On CUDA rows wait on the device, so that no step waits for it, and are read some at a time; reading them finds the
    first bad step exactly. On the CPU, where four numbers are copied in a microsecond, each is read at once.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device) -> None:
        self.tasks = tuple(tasks)
        self._waiting: list[Tensor] = []  # (C,) each, not read yet
        self._values = array("f")  # (S, C), flat, of the steps that were read
        self._counts = array("q")  # (S, K), flat
        self._done = self._checked = 0  # steps
        self._width = len(self.tasks) + 2
        self._check_every = 1 if device.type == "cpu" else _CUDA_CHECK_EVERY_STEPS

    def row(self, losses: Mapping[str, Tensor], total: Tensor, grad_norm: Tensor) -> Tensor:
        """Return a step's row from its losses ((B,) by task), on the device."""
        row = [losses[task].detach().mean() if task in losses else total.new_zeros(()) for task in self.tasks]
        return torch.stack([value.float() for value in (*row, total.detach(), grad_norm)])

    def keep(self, row_C: Tensor, present: Iterable[str], num_samples: int, epoch: int) -> None:
        """Keep a step's row and look for a non-finite one, on the CPU at once.

        Args:
            row_C: as ``row`` returns it.
            present: the tasks that have a loss.
            num_samples: of the whole batch.
            epoch: from 0.

        Raises:
            NonFiniteError: a loss or the gradient is NaN or infinite.
        """
        self._waiting.append(row_C)
        found = set(present)
        self._counts.extend(num_samples if task in found else 0 for task in self.tasks)
        self._done += 1
        if self._done - self._checked >= self._check_every:
            self.check(epoch)

    def check(self, epoch: int) -> None:
        """Raise NonFiniteError for the first step since the last check with a non-finite value."""
        self._read()
        width = self._width
        for step in range(self._checked, self._done):
            row = self._values[step * width : (step + 1) * width]
            if not all(map(math.isfinite, row)):
                raise NonFiniteError(
                    f"{self.describe(row)} in epoch {epoch}, step {step} (both from 0); training stopped, "
                    "the checkpoints of earlier epochs are intact. Look at that task's data, lower training.lr, or see "
                    "training.on_nonfinite"
                )
            self._checked = step + 1

    def describe(self, row: Sequence[float]) -> str:
        """Say what in a row is not finite."""
        bad = [
            (task, value) for task, value in zip(self.tasks, row, strict=False) if not math.isfinite(value)
        ]
        if bad:
            return ", ".join(f"the loss of task {task!r} is {value}" for task, value in bad)
        total, grad_norm = row[-2:]
        if not math.isfinite(total):
            return f"the balanced loss is {total}, although every task's loss is finite"
        return f"the gradient's norm is {grad_norm}, although every loss is finite"

    def means(self) -> dict[str, float]:
        """Return ``train_loss`` (mean over steps of the total) and ``train_loss_<task>`` (over samples)."""
        values, counts = self._values_SC().double(), self._counts_SK().double()
        means = {"train_loss": float(values[:, -2].mean())}
        for k, task in enumerate(self.tasks):
            total = counts[:, k].sum()
            means[f"train_loss_{task}"] = float((values[:, k] * counts[:, k]).sum() / total)
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"values": self._values_SC(), "counts": self._counts_SK()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved rows, which were checked when they were saved."""
        self._waiting = []
        self._values = array("f", state["values"].flatten().tolist())
        self._counts = array("q", state["counts"].flatten().tolist())
        self._done = self._checked = len(state["counts"])

    def _read(self) -> None:
        """Copy the rows that wait to the host, all at once."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1:
            self._values.extend(waiting[0].tolist())
        elif waiting:
            self._values.extend(torch.stack(waiting).flatten().tolist())

    def _values_SC(self) -> Tensor:
        self._read()
        return torch.from_numpy(np.array(self._values)).reshape(-1, self._width)

    def _counts_SK(self) -> Tensor:
        return torch.from_numpy(np.array(self._counts)).reshape(-1, len(self.tasks))
