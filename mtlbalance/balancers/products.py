"""Inner products of task gradients, in float64 and without holding a copy of all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtlbalance.balancers.signals import Gradients, real_parts

_TRIANGLE_FROM = 4  # tasks: of fewer the whole product is as fast
_SYMMETRIC_FROM = 16  # tasks: of fewer the triangle row by row is as fast
_CPU_BLOCK_NUMBERS, _BLOCK_NUMBERS = 2**20, 2**22  # copied to float64, and multiplied, at a time
_KEPT = threading.local()  # the CPU's memory for such a block, which every call uses again


def gram_matrix(rows: Sequence[Gradients], device: torch.device) -> Tensor:
    """Return the (K, K) inner products of K tasks' gradients, without a host sync.

    ``rows`` has one list of gradients a task over the same tensors; None counts as zero. An empty row is a
    task without any gradient. Products are summed in float64 where the device has it: what float32 rounds
    off in a singular Gramian would be inverted as if it were signal.
    """
    total_KK: Tensor | None = None
    with _exactly(device):
        for block_KC in _blocks(rows):
            products_KK = _products(block_KC).to(device)
            total_KK = products_KK if total_KK is None else total_KK + products_KK
    if total_KK is None:
        return torch.zeros(len(rows), len(rows), dtype=product_dtype(device), device=device)
    return total_KK


def cross_products(first_KP: Tensor, second_KP: Tensor) -> Tensor:
    """Return the (K, K) inner products of the rows of two batches' gradients, in float64, without a host sync."""
    dtype = product_dtype(first_KP.device)
    count, width = first_KP.shape
    total = torch.zeros(count, count, dtype=dtype, device=first_KP.device)
    step = _widest_block(count, first_KP.device)
    with _exactly(first_KP.device):
        for start in range(0, width, step):  # copies in float64 would be larger than the gradients
            columns = slice(start, start + step)
            total = total + first_KP[:, columns].to(dtype) @ second_KP[:, columns].to(dtype).T
    return total


def _blocks(rows: Sequence[Gradients]) -> Iterator[Tensor]:
    """Yield all gradients of K tasks as (K, C) blocks in float64, small tensors together and large ones in pieces.

    A block is valid until the next one is asked for.
    """
    pieces: list[Gradients] = []
    size = 0
    for position in range(max((len(row) for row in rows), default=0)):
        column = [row[position] if row else None for row in rows]
        flat: Gradients = [None if g is None else _flat(g) for g in column]
        found = next((gradient for gradient in flat if gradient is not None), None)
        if found is None:
            continue
        width = _widest_block(len(rows), found.device)
        for start in range(0, found.numel(), width):
            stop = min(start + width, found.numel())
            if pieces and (size + stop - start > width or found.device != _device_of(pieces[0])):
                yield _block(pieces)
                pieces, size = [], 0
            whole = stop - start == found.numel()
            pieces.append(flat if whole else [None if g is None else g[start:stop] for g in flat])
            size += stop - start
    if pieces:
        yield _block(pieces)


def _widest_block(count: int, device: torch.device) -> int:
    """Return C: all copies at once would be larger than the gradients."""
    return max(1, (_CPU_BLOCK_NUMBERS if device.type == "cpu" else _BLOCK_NUMBERS) // count)


def _block(pieces: Sequence[Gradients]) -> Tensor:
    """Return pieces of K tasks' gradients, each a list of K or None, side by side as one (K, C) block."""
    device = _device_of(pieces[0])
    sizes = [next(gradient.numel() for gradient in piece if gradient is not None) for piece in pieces]
    count, width = len(pieces[0]), sum(sizes)
    numbers = _memory(count * width, device)
    given = (piece[task] for task in range(count) for piece in pieces)
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for target, source in zip(torch.split(numbers, sizes * count), given, strict=True):
        if source is None:
            target.zero_()
        else:
            targets.append(target)
            sources.append(source)
    torch._foreach_copy_(targets, sources)
    return numbers.view(count, width)


def _memory(size: int, device: torch.device) -> Tensor:
    """Return so many numbers, uninitialised; on a CPU in memory that is kept, up to 8 MB.

    The C library would hand megabytes back to the system after each call, and to fault them in again takes several
    times as long as to fill them.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=product_dtype(device), device=device)
    kept: Tensor | None = getattr(_KEPT, "numbers", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = _KEPT.numbers = torch.empty(size, dtype=torch.float64, device="cpu")
    return kept[:size]


def _exactly(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products of gradients do not lose precision: autocast leaves float64 alone."""
    if product_dtype(device) == torch.float64:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _products(block_KC: Tensor) -> Tensor:
    """Return the inner products of the rows."""
    if block_KC.device.type != "cpu" or len(block_KC) < _TRIANGLE_FROM:
        return block_KC @ block_KC.T
    if len(block_KC) >= _SYMMETRIC_FROM:
        # NumPy sees a matrix by its own transpose, and makes one triangle.
        numbers: NDArray[np.float64] = block_KC.numpy()
        return torch.from_numpy(numbers @ numbers.T)
    products_KK = block_KC.new_zeros(len(block_KC), len(block_KC))
    for task, row_C in enumerate(
        block_KC
    ):  # one triangle, row by row: on a CPU half the time of the whole product
        products_KK[task, : task + 1] = block_KC[: task + 1] @ row_C
    return products_KK + products_KK.tril(-1).T


def _flat(gradient: Tensor) -> Tensor:
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    return real_parts(dense).reshape(-1)


def _device_of(piece: Gradients) -> torch.device:
    return next(gradient.device for gradient in piece if gradient is not None)


def product_dtype(device: torch.device) -> torch.dtype:
    """Return what inner products are summed in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
