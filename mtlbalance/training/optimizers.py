"""The optimizer of a run: AdamW over the model and what the balancer learns."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW

from mtlbalance.balancers.base import Balancer
from mtlbalance.config.sections import TrainingSection
from mtlbalance.training.model import MultiTaskModel


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
