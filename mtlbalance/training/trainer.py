"""The training loop: the study's cadence of 14 stages, for any dataset, backbone and balancer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mtlbalance.balancers.base import Balancer
from mtlbalance.config.sections import TrainingSection
from mtlbalance.errors import TrainingError
from mtlbalance.slots import MultiTaskData
from mtlbalance.training.batches import EvaluationBatches, TrainingBatches
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.evaluation import predict, score
from mtlbalance.training.gradient_stats import GradientStats
from mtlbalance.training.losses import TaskLosses
from mtlbalance.training.model import MultiTaskModel
from mtlbalance.training.observers import Observers
from mtlbalance.training.progress import ProgressReport
from mtlbalance.training.record import CsvTable, Row
from mtlbalance.training.schedules import adapt_weight_decay, warm_up_learning_rate
from mtlbalance.training.state import RunState
from mtlbalance.training.step_losses import StepLosses

StopReason = Literal["epochs", "early-stop"]


def make_optimizer(model: MultiTaskModel, balancer: Balancer, training: TrainingSection) -> AdamW:
    """Return AdamW over the model and, in a group of its own without weight decay, the balancer's weights.

    Decay would pull learned task weights towards their value at zero. CUDA takes the fused form. The CPU
    does not: there it opens a parallel region for every tensor, however small, which on a busy machine
    costs milliseconds each.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in model.parameters() if parameter.requires_grad],
            "weight_decay": training.weight_decay,
            "decayed": True,
        }
    ]
    learned = [parameter for parameter in balancer.parameters() if parameter.requires_grad]
    if learned:
        groups.append({"params": learned, "weight_decay": 0.0, "decayed": False})
    fused = all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
    return AdamW(groups, lr=training.lr, fused=fused, foreach=not fused)


class Trainer:
    """Trains one run from where its state is to its end, an epoch at a time.

    Args:
        state: the run; moved forward in place.
        data: for the evaluation of the watched set.
        batches: the training set.
        watched: the set that decides best epoch, plateau and early stop.
        training: the options.
        device: where the model is.
    """

    def __init__(
        self,
        state: RunState,
        data: MultiTaskData,
        batches: TrainingBatches,
        watched: EvaluationBatches,
        training: TrainingSection,
        device: torch.device,
    ) -> None:
        self.state = state
        self.data = data
        self.batches = batches
        self.watched = watched
        self.training = training
        self.device = device
        self._losses = TaskLosses(data.tasks)
        self._task_names = [task.name for task in data.tasks]
        self._shared: Sequence[Tensor] = list(state.model.trunk.parameters())
        self._model_parameters = [p for p in state.model.parameters() if p.requires_grad]
        self._stats = GradientStats(state.balancer, self._shared, every=training.gradient_stats_every)
        self._max_norm = training.grad_clip if training.grad_clip > 0 else float("inf")

    def fit(self, run_dir: Path, progress: ProgressReport, observers: Observers) -> StopReason:
        """Train until the last epoch or the early stop; every epoch ends on disk.

        Raises:
            TrainingError: a loss, a gradient or a weight is not finite.
        """
        state, training = self.state, self.training
        metrics_csv = CsvTable(run_dir / "metrics.csv", state.metrics)
        stats_csv = CsvTable(run_dir / "gradient_stats.csv", state.gradient_stats)
        checkpoints = Checkpoints(run_dir / "checkpoints")

        if state.early_stopping.exhausted(state.epoch):  # killed between the last checkpoint and the results
            return "early-stop"
        for epoch in range(state.epoch + 1, training.epochs):
            started = time.perf_counter()
            warm_up_learning_rate(state.optimizer, epoch, training)  # 1 warm-up of the learning rate
            adapt_weight_decay(state.optimizer, epoch, training)  # 2 adaptive weight decay
            row = self._optimizer_settings(epoch)
            stats_row = self._train_epoch(epoch, row, progress)  # 3-10 a batch at a time

            metrics = self._evaluate()  # 11 evaluation with the EMA weights
            key_value = metrics[self.data.key_metric]
            if epoch >= training.warmup_epochs:
                state.plateau.step(key_value)  # 12 plateau schedule, only after warm-up
            is_best = state.best.update(epoch, key_value)  # 13 best tracking and checkpoint
            state.early_stopping.update(epoch, key_value)
            seconds = time.perf_counter() - started
            row |= metrics | {"seconds": seconds}
            state.epoch = epoch
            state.wall_seconds += seconds
            state.metrics.append(row)
            state.gradient_stats.append(stats_row)
            metrics_csv.append(row)
            stats_csv.append(stats_row)
            checkpoints.save(state, is_best=is_best)
            progress.epoch(row, state.balancer.get_weights(), self._best_in_words())
            observers.notify("on_epoch_end", run_dir=run_dir, epoch=epoch, metrics=dict(row))
            if state.early_stopping.exhausted(epoch):  # 14 early stop, last
                return "early-stop"
        return "epochs"

    def _train_epoch(self, epoch: int, row: Row, progress: ProgressReport) -> Row:
        """Stages 3 to 10; adds the training losses to ``row`` and returns the row of gradient statistics."""
        state, model, balancer, optimizer = (
            self.state,
            self.state.model,
            self.state.balancer,
            self.state.optimizer,
        )
        last = len(self.batches) - 1
        step_losses = StepLosses(self._task_names, last + 1, self.device)
        autocast = self._autocast()
        stats_row: Row = {}
        model.train()
        balancer.train()
        for index, (inputs, targets) in enumerate(self.batches):  # 3 fetch
            with autocast:
                predictions = model(inputs)  # 4 forward
                losses = self._losses(predictions, targets)  # 5 inner losses, one value a sample
            if index == last:
                self._stats.before_balancing(losses, epoch)
            total = balancer(losses, shared_params=self._shared, model=model, targets=targets)  # 6 balancer
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # 7 backward
            norm = nn.utils.clip_grad_norm_(self._model_parameters, self._max_norm)  # 8 clip the joint norm
            optimizer.step()  # 9 AdamW
            state.ema.update_parameters(model)  # 10 weight EMA
            state.step += 1
            step_losses.record(losses, total, norm, epoch)
            if index == last:
                stats_row = self._stats.row(epoch, state.step)
            progress.step(epoch, index, step_losses.means)
        balancer.end_epoch()
        step_losses.check(epoch)
        self._check_weights(epoch)
        row["step"] = state.step
        row |= step_losses.means()
        return stats_row

    def _evaluate(self) -> dict[str, float]:
        (predictions,) = predict([self.state.ema], self.watched)
        return score(self.data, predictions)

    def _optimizer_settings(self, epoch: int) -> Row:
        group = self.state.optimizer.param_groups[0]
        return {
            "epoch": epoch,
            "step": self.state.step,
            "lr": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.training.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _check_weights(self, epoch: int) -> None:
        """A bad last step of an epoch must not reach its checkpoint."""
        norm = nn.utils.get_total_norm([parameter.detach() for parameter in self._model_parameters])
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"the model's weights became non-finite in epoch {epoch} (from 0); training stopped, the "
                "checkpoints of earlier epochs are intact. Lower training.lr, or set training.grad_clip"
            )

    def _best_in_words(self) -> str:
        best = self.state.best
        return "no best epoch yet" if best.value is None else f"best {best.value:.4g} at epoch {best.epoch}"
