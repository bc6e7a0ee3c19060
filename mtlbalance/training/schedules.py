"""What changes from epoch to epoch: learning rate and weight decay."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mtlbalance.config.sections import TrainingSection


def warmup_factor(epoch: int, warmup_epochs: int, start: float) -> float:
    """Return start + (1 − start)·epoch/warmup_epochs, and 1 from ``warmup_epochs`` on.

    >>> [round(warmup_factor(epoch, 10, 0.1), 2) for epoch in (0, 5, 10, 11)]
    [0.1, 0.55, 1.0, 1.0]
    """
    if epoch >= warmup_epochs:
        return 1.0
    return start + (1.0 - start) * epoch / warmup_epochs


def warm_up_learning_rate(optimizer: Optimizer, epoch: int, training: TrainingSection) -> None:
    """Stage 1: set the rate during warm-up and at its end; afterwards it belongs to the plateau schedule."""
    if epoch <= training.warmup_epochs:
        factor = warmup_factor(epoch, training.warmup_epochs, training.warmup_start)
        for group in optimizer.param_groups:
            group["lr"] = training.lr * factor


def weight_decay_at(epoch: int, training: TrainingSection) -> float:
    """Return the weight decay of an epoch: the late one once ``epoch > weight_decay_late_epoch``."""
    late = training.weight_decay_late
    if late is not None and epoch > training.weight_decay_late_epoch:
        return late
    return training.weight_decay


def adapt_weight_decay(optimizer: Optimizer, epoch: int, training: TrainingSection) -> None:
    """Stage 2: set the weight decay of every group that has one; learned task weights have none."""
    for group in optimizer.param_groups:
        if group["decayed"]:
            group["weight_decay"] = weight_decay_at(epoch, training)


def plateau_schedule(
    optimizer: Optimizer, mode: Literal["min", "max"], training: TrainingSection
) -> ReduceLROnPlateau:
    """Return the schedule of stage 12. A NaN counts as an epoch without improvement.

    An improvement is a relative one of 1e-4, which is torch's default and so the study's.
    """
    return ReduceLROnPlateau(
        optimizer,
        mode=mode,
        factor=training.scheduler_factor,
        patience=training.scheduler_patience,
        min_lr=training.scheduler_min_lr,
    )
