"""The losses of an epoch's steps, kept on the device until someone reads them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlbalance.errors import NonFiniteError

_CUDA_CHECK_EVERY_STEPS = 50


class StepLosses:
    """One row a step: each task's mean loss, the balanced total, and the gradient norm before clipping.

    Rows stay on the device, so that no step waits for it; reading them finds the first bad step exactly,
    however late it is looked for.
    """

    def __init__(self, tasks: Sequence[str], num_steps: int, device: torch.device) -> None:
        self.tasks = tuple(tasks)
        self._values_SC = torch.zeros(num_steps, len(tasks) + 2, device=device)
        self._counts = array("q")  # (S, K), flat: a tensor would cost each step ten times as much
        self._done = self._checked = 0
        self._check_every = 1 if device.type == "cpu" else _CUDA_CHECK_EVERY_STEPS

    def row(self, losses: Mapping[str, Tensor], total: Tensor, grad_norm: Tensor) -> Tensor:
        """Return a step's row from its losses ((B,) by task), on the device."""
        nothing = torch.zeros_like(total)
        row = [losses[task].detach().mean() if task in losses else nothing for task in self.tasks]
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
        step = self._done
        self._values_SC[step] = row_C
        found = set(present)
        self._counts.extend(num_samples if task in found else 0 for task in self.tasks)
        self._done += 1
        if step + 1 - self._checked >= self._check_every:
            self.check(epoch)

    def check(self, epoch: int) -> None:
        """Raise NonFiniteError for the first step since the last check with a non-finite value."""
        first, end = self._checked, self._done
        self._checked = end
        values = self._values_SC[first:end]
        if bool(torch.isfinite(values.sum())):  # one non-finite entry makes the sum non-finite
            return
        finite_SC = torch.isfinite(values).cpu()
        if bool(finite_SC.all()):  # the sum itself overflowed
            return
        step = int((~finite_SC.all(dim=1)).nonzero()[0])
        raise NonFiniteError(
            f"{self.describe(values[step])} in epoch {epoch}, step {first + step} (both from 0); training stopped, "
            "the checkpoints of earlier epochs are intact. Look at that task's data, lower training.lr, or see "
            "training.on_nonfinite"
        )

    def describe(self, row_C: Tensor) -> str:
        """Say what in a row is not finite."""
        value_C, finite_C = row_C.tolist(), torch.isfinite(row_C).tolist()
        bad = [(task, value_C[k]) for k, task in enumerate(self.tasks) if not finite_C[k]]
        if bad:
            return ", ".join(f"the loss of task {task!r} is {value}" for task, value in bad)
        if not finite_C[-2]:
            return f"the balanced loss is {value_C[-2]}, although every task's loss is finite"
        return f"the gradient's norm is {value_C[-1]}, although every loss is finite"

    def means(self) -> dict[str, float]:
        """Return ``train_loss`` (mean over steps of the total) and ``train_loss_<task>`` (over samples)."""
        values = self._values_SC[: self._done].cpu().double()
        counts = self._counts_SK().double()
        means = {"train_loss": float(values[:, -2].mean())}
        for k, task in enumerate(self.tasks):
            total = counts[:, k].sum()
            means[f"train_loss_{task}"] = float((values[:, k] * counts[:, k]).sum() / total)
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {
            "values": self._values_SC[: self._done].cpu().clone(),  # not the storage behind it
            "counts": self._counts_SK(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved rows, which were checked when they were saved."""
        self._done = self._checked = len(state["counts"])
        self._counts = array("q", state["counts"].flatten().tolist())
        self._values_SC[: self._done] = state["values"].to(self._values_SC.device)

    def _counts_SK(self) -> Tensor:
        return torch.tensor(self._counts.tolist(), dtype=torch.int64).reshape(self._done, len(self.tasks))
