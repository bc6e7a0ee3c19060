"""Everything that a run is, in one object: what a checkpoint holds and a resume puts back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mtlbalance.balancers.base import Balancer
from mtlbalance.training.batches import ShuffleOrder
from mtlbalance.training.early_stopping import BestEpoch, EarlyStopping
from mtlbalance.training.evaluation import WeightEMA
from mtlbalance.training.gradient_stats import GradientStats
from mtlbalance.training.model import MultiTaskModel
from mtlbalance.training.record import Row
from mtlbalance.training.seeding import set_rng_state
from mtlbalance.training.step_losses import StepLosses


@dataclass
class UnfinishedEpoch:
    """How far the epoch after the last finished one has come.

    Args:
        losses: of its steps so far.
        batches: how many are done, those that were left out included.
        stats_row: its row of ``gradient_stats.csv``, once the last batch has been measured.
        row: the training columns of its row of ``metrics.csv``; None until every batch is done.
        seconds: time spent on it in earlier sessions.
    """

    losses: StepLosses
    batches: int = 0
    stats_row: Row = field(default_factory=dict)
    row: Row | None = None
    seconds: float = 0.0

    @property
    def position(self) -> int:
        """A number that grows with all that happens in an epoch."""
        return self.batches + (self.row is not None)


@dataclass
class RunState:
    """The state of a run between two steps.

    Args:
        model: the live weights.
        ema: their shadow, which is evaluated.
        balancer: its state, learned weights included.
        optimizer: AdamW over the model and the balancer's learned weights.
        scaler: the loss scale of fp16, disabled in other precisions.
        plateau: the learning-rate schedule after warm-up.
        order: the generators of the sample order.
        best: the best epoch so far.
        early_stopping: how long ago the last gain was.
        stats: what the measuring of gradient norms has found out.
        epoch: the last finished epoch, from 0; -1 before the first.
        step: the number of batches trained on.
        skipped_steps: how many of them were left out because something was not finite.
        wall_seconds: time spent in finished epochs, over all sessions.
        metrics: the rows of ``metrics.csv``.
        gradient_stats: the rows of ``gradient_stats.csv``.
        unfinished: how far the next epoch has come; None at the end of an epoch.
    """

    model: MultiTaskModel
    ema: WeightEMA
    balancer: Balancer
    optimizer: AdamW
    scaler: GradScaler
    plateau: ReduceLROnPlateau
    order: ShuffleOrder
    best: BestEpoch
    early_stopping: EarlyStopping
    stats: GradientStats
    epoch: int = -1
    step: int = 0
    skipped_steps: int = 0
    wall_seconds: float = 0.0
    metrics: list[Row] = field(default_factory=list)
    gradient_stats: list[Row] = field(default_factory=list)
    unfinished: UnfinishedEpoch | None = None

    def begin_epoch(self) -> UnfinishedEpoch:
        """Return the unfinished epoch, a new one if there is none."""
        if self.unfinished is None:
            device = next(self.model.parameters()).device
            self.unfinished = UnfinishedEpoch(StepLosses(self.balancer.tasks, device))
        return self.unfinished

    def weights(self) -> dict[str, Tensor]:
        """Return the live and the averaged weights and buffers by name."""
        self.ema.copy_the_rest(self.model)
        return {
            f"{part}.{name}": value
            for part, module in (("model", self.model), ("ema", self.ema))
            for name, value in module.state_dict().items()
        }

    def state_dict(self, generators: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return all but ``weights``: tensors, numbers, strings, containers.

        Args:
            generators: the ``rng_state`` of every rank.
        """
        in_batches = self.unfinished is not None and self.unfinished.row is None
        state: dict[str, Any] = {
            "balancer": self.balancer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "plateau": self.plateau.state_dict(),
            "order": self.order.state_dict(within_epoch=in_batches),
            "best": self.best.state_dict(),
            "early_stopping": self.early_stopping.best.state_dict(),
            "stats": self.stats.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "wall_seconds": self.wall_seconds,
            "metrics": self.metrics,
            "gradient_stats": self.gradient_stats,
            "unfinished": None,
            "rng": list(generators),
        }
        if self.unfinished is not None:
            state["unfinished"] = {
                "losses": self.unfinished.losses.state_dict(),
                "batches": self.unfinished.batches,
                "stats_row": self.unfinished.stats_row,
                "row": self.unfinished.row,
                "seconds": self.unfinished.seconds,
            }
        return state

    def load_state_dict(self, weights: Mapping[str, Tensor], state: dict[str, Any], *, rank: int = 0) -> None:
        """Become the saved state, the global random generators of this rank included.

        A rank that was not there when the run was saved keeps its generators as they are.
        """
        self.model.load_state_dict(_below("model.", weights))
        self.ema.load_state_dict(_below("ema.", weights))
        self.balancer.load_state_dict(state["balancer"])
        self.optimizer.load_state_dict(_for_this_device(state["optimizer"], self.optimizer))
        self.scaler.load_state_dict(state["scaler"])
        self.plateau.load_state_dict(state["plateau"])
        self.order.load_state_dict(state["order"])
        self.best.load_state_dict(state["best"])
        self.early_stopping.best.load_state_dict(state["early_stopping"])
        self.stats.load_state_dict(state["stats"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        self.wall_seconds = state["wall_seconds"]
        self.metrics = state["metrics"]
        self.gradient_stats = state["gradient_stats"]
        self.unfinished = None
        if (unfinished := state["unfinished"]) is not None:
            epoch = self.begin_epoch()
            epoch.losses.load_state_dict(unfinished["losses"])
            epoch.batches = unfinished["batches"]
            epoch.stats_row = unfinished["stats_row"]
            epoch.row = unfinished["row"]
            epoch.seconds = unfinished["seconds"]
        if rank < len(state["rng"]):
            set_rng_state(state["rng"][rank])


def _for_this_device(saved: Mapping[str, Any], optimizer: AdamW) -> dict[str, Any]:
    """Return an optimizer's saved state with the implementation of the device that it goes on with."""
    groups = [
        saved_group | {key: group[key] for key in ("fused", "foreach")}
        for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**saved, "param_groups": groups}


def _below(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
