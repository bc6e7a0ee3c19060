"""One training step: stages 4 to 10 of the cadence, in any precision, and what becomes of a step that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlbalance.config.sections import TrainingSection
from mtlbalance.errors import NonFiniteError, TrainingError
from mtlbalance.slots import TaskSpec
from mtlbalance.training.batches import Batch
from mtlbalance.training.losses import TaskLosses
from mtlbalance.training.memory import names_out_of_memory
from mtlbalance.training.optimizers import clip_gradients
from mtlbalance.training.precision import autocast, scaled_step
from mtlbalance.training.state import RunState
from mtlbalance.training.step_losses import StepLosses
from mtlbalance.training.team import Team

_LESS_DATA = "training.batch_size, or the backbone's size"
_LESS_BALANCING = f"{_LESS_DATA}, or choose a balancer that keeps no gradients of each task"


class TrainingStep:
    """Moves a run by one batch.

    A step whose losses or gradients are not finite never reaches the weights on the CPU; on CUDA it is found within
    50 steps, and before anything is saved. With ``on_nonfinite = "skip"`` it is left out everywhere, at the price of
    waiting for the device in each step: no optimizer step, no EMA, and the buffers of the model (BatchNorm's running
    statistics) as they were. In fp16 an overflow of finite losses' gradients is the scaler's to handle: it too moves
    neither weights nor EMA, but counts as no fault.

    Args:
        state: the run; moved forward in place.
        tasks: the tasks.
        training: the options.
        device: where the model is.
        forward: the model, or its wrapper that averages gradients over ranks.
        team: the ranks.
    """

    def __init__(
        self,
        state: RunState,
        tasks: Sequence[TaskSpec],
        training: TrainingSection,
        device: torch.device,
        forward: nn.Module,
        team: Team,
    ) -> None:
        self.state = state
        self.training = training
        self._forward = forward
        self._team = team
        self._learned = [p for p in state.balancer.parameters() if p.requires_grad]
        self._autocast = autocast(training.precision, device)
        self._losses = TaskLosses(tasks)
        self._shared: Sequence[Tensor] = list(state.model.trunk.parameters())
        self._parameters = [p for p in state.model.parameters() if p.requires_grad]
        self._max_norm = training.grad_clip if training.grad_clip > 0 else float("inf")
        self._skips = training.on_nonfinite == "skip"
        self._buffers = list(state.model.buffers())
        self._in_forward = names_out_of_memory("the forward pass", _LESS_DATA)
        self._in_balancing = names_out_of_memory(f"balancing by {state.balancer.get_name()}", _LESS_BALANCING)
        self._in_backward = names_out_of_memory("the backward pass", _LESS_DATA)
        self._in_update = names_out_of_memory("the optimizer step", "the backbone's size")

    def __call__(self, batch: Batch, kept: StepLosses, epoch: int, *, measure: bool) -> str:
        """Train on one batch and keep its losses; return why the step was left out, or an empty string.

        Args:
            batch: the batch.
            kept: where the step's losses go.
            epoch: from 0.
            measure: whether the gradient statistics are taken at this batch.

        Raises:
            NonFiniteError: something was not finite, and such steps are not, or no longer, left out.
            TrainingError: memory ran out.
        """
        state, model, optimizer = self.state, self.state.model, self.state.optimizer
        buffers = [buffer.clone() for buffer in self._buffers] if self._skips else []
        with self._in_forward, self._autocast:
            try:
                predictions = self._forward(batch.inputs)  # 4 forward
            except ValueError as error:
                _refuse_lone_samples(batch, error)
                raise
            losses = self._losses(predictions, batch.targets)  # 5 inner losses, one value a sample
            if batch.weight is not None:
                losses = {task: batch.weight.to(loss.dtype) * loss for task, loss in losses.items()}
        with self._in_balancing:
            if measure:
                state.stats.before_balancing(losses, epoch)
            total = state.balancer(  # 6 balancer
                losses, shared_params=self._shared, model=model, targets=batch.targets
            )
        with self._in_backward:
            optimizer.zero_grad(set_to_none=True)
            state.scaler.scale(total).backward()  # 7 backward
            for learned in self._learned:
                if learned.grad is not None:
                    self._team.mean_(learned.grad)
            state.scaler.unscale_(optimizer)
            norm = clip_gradients(self._parameters, self._max_norm)  # 8 clip the joint norm
        if state.scaler.is_enabled():  # an overflow is the scaler's to handle
            norm = torch.nan_to_num(norm, 0.0, 0.0, 0.0)
        row = self._team.mean_(kept.row(losses, total, norm))
        state.step += 1
        if self._skips and not all(map(math.isfinite, values := row.tolist())):
            self._leave_out(buffers)
            return self._within_budget(
                f"{kept.describe(values)} in epoch {epoch}, step {state.step - 1} of the run"
            )
        kept.keep(row, losses, batch.num_samples, epoch)
        with self._in_update:
            if scaled_step(state.scaler, optimizer):  # 9 AdamW
                state.ema.update()  # 10 weight EMA
        return ""

    def _leave_out(self, buffers: Sequence[Tensor]) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.state.scaler.is_enabled():
            self.state.scaler.update()  # it has unscaled these gradients, and must not wait for their step
        for buffer, before in zip(self._buffers, buffers, strict=True):
            buffer.copy_(before)
        self.state.skipped_steps += 1

    def _within_budget(self, reason: str) -> str:
        allowed = self.training.max_skipped_steps
        if self.state.skipped_steps > allowed:
            raise NonFiniteError(
                f"{reason}; that is more than the {allowed} steps that training.max_skipped_steps allows to be left "
                "out, so training stopped. Look at that task's data, or lower training.lr"
            )
        return reason

    def check_ranks(self) -> None:
        """Raise TrainingError if ranks hold different weights, which nothing else would show."""
        if self._team.size == 1:
            return
        sums = torch.stack([p.detach().double().sum() for p in (*self._parameters, *self._learned)])
        everywhere = self._team.all(sums.tolist())
        apart = [rank for rank, found in enumerate(everywhere) if found != everywhere[0]]
        if apart:
            raise TrainingError(
                f"ranks {', '.join(map(str, apart))} hold other weights than rank 0, so they have been trained apart; "
                "what a backbone or a balancer changes by itself must change alike on every rank"
            )

    def check_weights(self, epoch: int) -> None:
        """Raise NonFiniteError if a weight or a buffer is not finite: that must not reach a checkpoint."""
        tensors = [tensor.detach() for tensor in (*self._parameters, *self.state.model.buffers())]
        norm = nn.utils.get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()])
        (bad,) = self._team.largest(
            int(not bool(torch.isfinite(norm)))
        )  # each rank has running statistics of its own
        if bad:
            raise NonFiniteError(
                f"the model's weights or buffers became non-finite in epoch {epoch} (from 0); training stopped, the "
                "checkpoints of earlier epochs are intact. Lower training.lr, or set training.grad_clip"
            )


def _refuse_lone_samples(batch: Batch, error: ValueError) -> None:
    """Say what to do where BatchNorm is given the one sample that the last batch of an epoch has left."""
    if "more than 1 value per channel" not in str(error):
        return
    lone = "a batch of one sample" if batch.num_samples == 1 else "one sample of a batch on each rank"
    raise TrainingError(
        f"the backbone normalises over a batch, and cannot over {lone}; set training.drop_last = true, or choose a "
        "training.batch_size that leaves more samples for the last batch"
    ) from error
