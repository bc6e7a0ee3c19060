"""The loop that someone would write by hand for one run: what ``mtlbalance run`` is compared with.

Same model, balancer, batches, optimizer, clipping, weight average, plateau schedule and evaluation in every epoch; no
checks, no checkpoints, no files, no statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from run_plugin import note_epoch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtlbalance import Balancer

Set = tuple[Tensor, Mapping[str, Tensor]]


class Model(nn.Module):
    """The backbone's trunk and heads behind one call."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict, scalar: Mapping[str, bool]) -> None:
        super().__init__()
        self.trunk, self.heads, self.scalar = trunk, heads, dict(scalar)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return each task's prediction."""
        features = self.trunk(inputs)
        found = {task: head(features) for task, head in self.heads.items()}
        return {
            task: value.squeeze(-1) if self.scalar[task] and value.dim() > 1 else value
            for task, value in found.items()
        }


def loss_of(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss: squared error of numbers, cross-entropy of classes."""
    if target.dtype == torch.int64:
        return functional.cross_entropy(prediction, target)
    return functional.mse_loss(prediction, target)


@torch.no_grad()
def evaluate(model: nn.Module, watched: Set, batch_size: int) -> float:
    """Return the error of the first task over the watched set, and compute that of the others."""
    model.eval()
    inputs, targets = watched
    parts = [model(chunk) for chunk in torch.split(inputs, batch_size)]
    errors = []
    for task, target in targets.items():
        predicted = torch.cat([part[task] for part in parts])
        if target.dtype == torch.int64:
            errors.append(float((predicted.argmax(1) == target).float().mean()))
        else:
            errors.append(float((predicted - target).square().mean().sqrt()))
    return errors[0]


def train(
    model: Model,
    balancer: Balancer,
    training: Set,
    watched: Set,
    *,
    epochs: int,
    batch_size: int,
    ema_decay: float = 0.999,
) -> float:
    """Train and return the mean loss of the last epoch."""
    fused = torch.get_num_threads() == 1 or training[0].is_cuda  # as a run has it
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=1e-4, fused=fused, foreach=not fused
    )
    average = AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(ema_decay),  # type: ignore[no-untyped-call]
    )
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=30, min_lr=5e-6)
    shared, parameters = list(model.trunk.parameters()), list(model.parameters())
    inputs, targets = training
    total = torch.zeros(())
    for _ in range(epochs):
        model.train()
        total = torch.zeros((), device=inputs.device)
        batches = torch.split(torch.randperm(len(inputs), device=inputs.device), batch_size)
        for index in batches:
            predictions = model(inputs.index_select(0, index))
            losses = {
                task: loss_of(predictions[task], target.index_select(0, index))
                for task, target in targets.items()
            }
            loss = balancer(losses, shared_params=shared)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update_parameters(model)
            total += loss.detach()
        balancer.end_epoch()
        plateau.step(evaluate(average, watched, 4 * batch_size))
        note_epoch()
    return float(total) / len(batches)
