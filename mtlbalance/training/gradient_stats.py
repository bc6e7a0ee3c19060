"""A row of ``gradient_stats.csv``: what each task pulls, and the weights it gets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer
from mtlbalance.balancers.graph import casts_to_half
from mtlbalance.balancers.probe_scale import half_scale
from mtlbalance.balancers.ranks import Ranks, active_ranks
from mtlbalance.balancers.signals import (
    Gradients,
    gradient_norm,
    require_related,
    task_gradient_norms,
    task_gradients,
)
from mtlbalance.errors import BalancerError
from mtlbalance.training.record import Row


class GradientStats:
    """Taken at the last training batch of an epoch, so that epoch 0 shows the weights after all its batches.

    A balancer that reads gradient norms reports them; for any other they are measured on that batch, each
    task's plain mean loss on the trunk's parameters, before the balancer's call. Measuring changes neither
    the gradients nor the random generators.

    Args:
        balancer: what is reported.
        shared: the trunk's parameters.
        every: epochs between measurements; 0: only what the balancer measures.
    """

    def __init__(self, balancer: Balancer, shared: Sequence[Tensor], *, every: int) -> None:
        self._balancer = balancer
        self._shared = shared
        self._every = every if any(parameter.requires_grad for parameter in shared) else 0
        self._reported = self._unmeasurable = False
        self._measured: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, bool]:
        """Return what was found out on the way: that the balancer reports norms, that they cannot be measured."""
        return {"reported": self._reported, "unmeasurable": self._unmeasurable}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Continue from a saved state."""
        self._reported, self._unmeasurable = state["reported"], state["unmeasurable"]

    def before_balancing(self, losses: Mapping[str, Tensor], epoch: int) -> None:
        """Measure the gradient norms of this batch, where the balancer is not known to do so."""
        self._measured = {}
        if self._reported or self._unmeasurable or self._every == 0 or epoch % self._every != 0:
            return
        try:
            ranks = active_ranks(None)
            if ranks is None:
                self._measured = task_gradient_norms(losses, self._shared)
            else:
                self._measured = _norms_over_ranks(losses, list(self._shared), ranks)
        except BalancerError as error:
            self._unmeasurable = True
            warnings.warn(
                f"gradient norms are not measured in this run: {error}", RuntimeWarning, stacklevel=2
            )

    def row(self, epoch: int, step: int) -> Row:
        """Return the row, after the batch has been balanced."""
        tasks = self._balancer.tasks
        report = self._balancer.report()
        norms = report.get("grad_norm", {})
        self._reported = len(norms) > 0 and all(math.isfinite(value) for value in norms.values())
        if not self._reported:
            report = report | {"grad_norm": {task: float(norm) for task, norm in self._measured.items()}}
        row: Row = {"epoch": epoch, "step": step}
        for kind in ("grad_norm", "raw", "smoothed", "applied"):
            row |= {f"{kind}_{task}": _known(report.get(kind, {}).get(task)) for task in tasks}
        if len(tasks) == 2:
            first, second = (row[f"grad_norm_{task}"] for task in tasks)
            row["grad_ratio"] = first / second if first is not None and second else None
        return row


def _norms_over_ranks(losses: Mapping[str, Tensor], shared: list[Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return the norms of each task's gradient on the whole batch, which ranks share."""
    shared = [parameter for parameter in shared if parameter.requires_grad]
    rows: dict[int, Gradients] = {}
    for index, (task, loss) in enumerate(losses.items()):
        mean = loss.float().mean() if loss.element_size() < 4 else loss.mean()
        scale = half_scale(mean) if casts_to_half([mean]) else torch.ones((), device=mean.device)
        found = task_gradients(mean * scale, shared, retain_graph=True)
        require_related(task, found, shared)
        rows[index] = [None if gradient is None else gradient / scale for gradient in found]
    everywhere = torch.full((len(losses),), float(ranks.size), device=shared[0].device)
    means = ranks.mean_gradients(rows, shared, everywhere)
    return {task: gradient_norm(means[index], losses[task].device) for index, task in enumerate(losses)}


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
