"""A run at its very beginning: model, balancer, optimizer and schedules, as the config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mtlbalance.balancers.base import Balancer
from mtlbalance.plugins.references import build_plugin
from mtlbalance.slots import MultiTaskData
from mtlbalance.training.batches import ShuffleOrder, count_samples
from mtlbalance.training.early_stopping import BestEpoch, EarlyStopping
from mtlbalance.training.evaluation import WeightEMA
from mtlbalance.training.gradient_stats import GradientStats
from mtlbalance.training.model import build_model
from mtlbalance.training.optimizers import make_optimizer
from mtlbalance.training.precision import make_scaler
from mtlbalance.training.schedules import plateau_schedule
from mtlbalance.training.state import RunState

if TYPE_CHECKING:
    from mtlbalance.config import RunConfig


def build_state(config: RunConfig, data: MultiTaskData, device: torch.device) -> RunState:
    """Return the state before the first step.

    Raises:
        PluginError: the backbone or the balancer cannot be built, or does not fit the tasks.
    """
    training = config.training
    backbone: nn.Module = build_plugin(
        config.backbone.registration, config.backbone.options, data.inputs, data.tasks
    )
    # Built on the CPU and then moved, so that every device starts from the same weights.
    model = build_model(backbone, data.tasks, name=config.backbone.registration.name).to(device)
    balancer: Balancer = build_plugin(config.balancer.registration, config.balancer.options, data.tasks)
    balancer = balancer.to(device)
    optimizer = make_optimizer(model, balancer, training)
    mode = data.key_metric_mode
    order = ShuffleOrder(
        count_samples(data.train, "training"),
        training.batch_size,
        drop_last=training.drop_last,
        seed=config.run.seed,
    )
    return RunState(
        model=model,
        ema=WeightEMA(model, training.ema_decay),
        balancer=balancer,
        optimizer=optimizer,
        plateau=plateau_schedule(optimizer, mode, training),
        order=order,
        best=BestEpoch(mode),
        early_stopping=EarlyStopping(BestEpoch(mode, training.min_delta), training.patience),
        scaler=make_scaler(training.precision, device),
        stats=GradientStats(balancer, list(model.trunk.parameters()), every=training.gradient_stats_every),
    )
