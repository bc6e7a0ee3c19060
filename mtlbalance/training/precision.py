"""What fp32, bf16 and fp16 mean in a training step: autocast, and the gradient scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from mtlbalance.errors import NonFiniteError

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 2.0**-24  # of the loss: 40 overflows in a row from where a scaler starts


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of forward pass and losses; weights stay fp32 in every precision."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    return nullcontext()


def make_scaler(precision: Precision, device: torch.device) -> GradScaler:
    """Return the loss scaler, which does nothing except in fp16."""
    return GradScaler(device.type, enabled=precision == "fp16")


def scaled_step(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Take an optimizer step on unscaled gradients unless they overflowed; return whether it was taken.

    In fp16 this copies the loss scale, one number, to the host.

    Raises:
        NonFiniteError: gradients overflow however small the scale.
    """
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if not scaler.is_enabled():
        return True
    after = scaler.get_scale()
    if after < _SMALLEST_SCALE:
        raise NonFiniteError(
            f"the gradients overflow float16 even with the loss scaled by {after:.1e}; training stopped, the "
            "checkpoints are intact. Use training.precision=bf16 or fp32"
        )
    return after >= before
