"""What fp32, bf16 and fp16 mean in a training step: autocast, the gradient scaler, and how exact fp32 products are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from mtlbalance.errors import NonFiniteError, TrainingError

Precision = Literal["fp32", "bf16", "fp16"]
MatmulPrecision = Literal["highest", "high", "medium"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 2.0**-24  # of the loss: 40 overflows in a row from where a scaler starts


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of forward pass and losses; weights stay fp32 in every precision."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    return nullcontext()


@contextmanager
def matmul_precision(wanted: MatmulPrecision | None) -> Iterator[None]:
    """Let float32 matrix products be as exact as ``wanted`` in the body; afterwards the process has its own again.

    Args:
        wanted: as ``torch.set_float32_matmul_precision`` has it; None: the process's own.

    Raises:
        TrainingError: the process's own cannot be read, so it could not be given back.
    """
    if wanted is None:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        raise TrainingError(
            f"training.matmul_precision = {wanted!r} cannot be set: this process has moved torch's switches for it one "
            "by one (torch.backends.*.fp32_precision), which could not be undone afterwards; leave one of the two out"
        ) from error
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def own_matmul_precision() -> str:
    """Return how exact the process's float32 matrix products are."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's switches differ from each other
        return "mixed"


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
