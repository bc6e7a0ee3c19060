"""Everything that a run is, in one object: what a checkpoint holds and a resume puts back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from mtlbalance.balancers.base import Balancer
from mtlbalance.training.batches import ShuffleOrder
from mtlbalance.training.early_stopping import BestEpoch, EarlyStopping
from mtlbalance.training.model import MultiTaskModel
from mtlbalance.training.record import Row
from mtlbalance.training.seeding import rng_state, set_rng_state


@dataclass
class RunState:
    """The state of a run at the end of an epoch.

    Args:
        model: the live weights.
        ema: their shadow, which is evaluated.
        balancer: its state, learned weights included.
        optimizer: AdamW over the model and the balancer's learned weights.
        plateau: the learning-rate schedule after warm-up.
        order: the generators of the sample order.
        best: the best epoch so far.
        early_stopping: how long ago the last gain was.
        epoch: the last finished epoch, from 0; -1 before the first.
        step: the number of optimizer steps taken.
        wall_seconds: time spent in finished epochs, over all sessions.
        metrics: the rows of ``metrics.csv``.
        gradient_stats: the rows of ``gradient_stats.csv``.
    """

    model: MultiTaskModel
    ema: AveragedModel
    balancer: Balancer
    optimizer: AdamW
    plateau: ReduceLROnPlateau
    order: ShuffleOrder
    best: BestEpoch
    early_stopping: EarlyStopping
    epoch: int = -1
    step: int = 0
    wall_seconds: float = 0.0
    metrics: list[Row] = field(default_factory=list)
    gradient_stats: list[Row] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, global random generators included, as tensors, numbers, strings and containers."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "balancer": self.balancer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "order": self.order.state_dict(),
            "best": self.best.state_dict(),
            "early_stopping": self.early_stopping.best.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "wall_seconds": self.wall_seconds,
            "metrics": self.metrics,
            "gradient_stats": self.gradient_stats,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved state, the global random generators included."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.balancer.load_state_dict(state["balancer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.order.load_state_dict(state["order"])
        self.best.load_state_dict(state["best"])
        self.early_stopping.best.load_state_dict(state["early_stopping"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.wall_seconds = state["wall_seconds"]
        self.metrics = state["metrics"]
        self.gradient_stats = state["gradient_stats"]
        set_rng_state(state["rng"])
