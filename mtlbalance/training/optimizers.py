"""The optimizer of a run, AdamW over the model and what the balancer learns, and the clipping before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mtlbalance.balancers.base import Balancer
from mtlbalance.config.sections import TrainingSection
from mtlbalance.training.model import MultiTaskModel

_SURELY_SHORT = 0.999  # of the largest norm: the factor is then 1, however it is rounded


def make_optimizer(model: MultiTaskModel, balancer: Balancer, training: TrainingSection) -> AdamW:
    """Return AdamW over the model and, in a group of its own without weight decay, the balancer's weights.

    Decay would pull learned task weights towards their value at zero.
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
    fused = _fused_is_faster([parameter for group in groups for parameter in group["params"]])
    return AdamW(groups, lr=training.lr, fused=fused, foreach=not fused)


def _fused_is_faster(parameters: Sequence[Tensor]) -> bool:
    """Return whether to pass over the weights once and not ten times: on CUDA, and on the CPU with one thread.

    With several the CPU's fused form opens a parallel region for every tensor, however small, which on a busy machine
    costs milliseconds each.
    """
    if not all(parameter.is_floating_point() for parameter in parameters):
        return False  # it has no form for complex numbers
    devices = {parameter.device.type for parameter in parameters}
    return devices == {"cuda"} or (devices == {"cpu"} and torch.get_num_threads() == 1)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a joint L2 norm of ``max_norm``, and return the norm that they had.

    The result is that of ``torch.nn.utils.clip_grad_norm_``, which multiplies by 1 what is short enough: asking would
    make a CUDA step wait. On the CPU asking costs nothing, and the pass over all gradients is left out.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or not float(norm) < _SURELY_SHORT * max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
