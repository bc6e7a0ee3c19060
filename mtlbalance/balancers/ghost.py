"""Weight gradients of wide linear layers, kept as their factors: everything about them, at a fraction of their cost.

The weight gradient of a linear layer is DᵀX: X (N, d_in) are the rows that came in, D (N, d_out) the gradients of
what went out. With Xᵀ = Q·R, where Q has orthonormal columns and R is (min(N, d_in), N), it has the norm of R·D, and
those of two tasks have the inner product of their R·D: the very numbers, with no square in between that would lose half
of the digits. So the K products DᵀX are never made. A task's pass ends at its D_k, R·D_k is read in the place of the
gradient, and one product is delivered, (Σ w_k·D_k)ᵀX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mtlbalance.balancers.graph import PRODUCTS, Node

_SMALLEST_GAIN = 2**22  # multiplications to be spared: fewer take no longer than the bookkeeping
_UNKNOWN = object()


class Layer(NamedTuple):
    """A linear layer in the graph of the losses.

    Args:
        output: where to differentiate, to get D.
        inputs: X, detached.
    """

    output: GradientEdge
    inputs: Tensor

    def shrink(self, rows: Sequence[list[Tensor | None]], position: int) -> None:
        """Put R·D in the place of every task's D, which stands at ``position`` of its row."""
        with torch.autocast(self.inputs.device.type, enabled=False):
            triangle = torch.linalg.qr(self.inputs.T, mode="r").R
            for row in rows:
                factor = row[position] if row else None
                if factor is not None:
                    row[position] = triangle @ factor


def ghost_layers(
    tensors: Sequence[Tensor], losses: Sequence[Tensor], products: Iterable[Node] | None = None
) -> dict[int, Layer]:
    """Return, by position among ``tensors``, the weights whose gradients are cheaper as factors.

    Those are float32 weights on a CPU that one linear layer uses, once, and whose inputs autograd keeps as they are:
    not recomputed (checkpointing), not moved elsewhere. The gradients of all others are made.

    Args:
        tensors: what is differentiated.
        losses: the losses of the present tasks.
        products: the nodes of the linear layers below the losses, if they were looked up already.
    """
    tasks = len(losses)
    wide = {id(tensor): position for position, tensor in enumerate(tensors) if _may_pay(tensor, tasks)}
    if not wide:
        return {}
    if (
        products is not None
    ):  # nearly always there are too many rows, which is found out here and not by a walk
        rows = {_rows_of(node) for node in products}
        shapes = {tensors[position].shape for position in wide.values()}
        if not any(_pays(number, shape, tasks) for number in rows for shape in shapes):
            return {}
    found: dict[int, Layer] = {}
    users = _users(losses)
    for node in users:
        if type(node).__name__ not in PRODUCTS:
            continue
        weight = _weight_of(node, users)
        if weight is None or id(weight) not in wide or not _pays(_rows_of(node), weight.shape, tasks):
            continue
        inputs = _inputs_of(node)
        if inputs is not None:
            found[wide[id(weight)]] = Layer(GradientEdge(node, 0), inputs)
    return found


def _may_pay(tensor: Tensor, tasks: int) -> bool:
    """Return whether the gradient of ``tensor`` is cheaper as factors for some number of rows."""
    # On other devices the factorisation was never measured.
    if tensor.dim() != 2 or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return False
    return (
        _pays(_most_rows(tensor.shape, tasks), tensor.shape, tasks) and tensor.is_leaf and _is_plain(tensor)
    )


def _pays(rows: int, shape: torch.Size, tasks: int) -> bool:
    """Return whether factors are clearly cheaper: K − 1 products are spared, for R and K products R·D."""
    spared = (tasks - 1) * rows * shape.numel()
    return rows <= _most_rows(shape, tasks) and spared >= _SMALLEST_GAIN


def _most_rows(shape: torch.Size, tasks: int) -> int:
    """Return N up to which N²·(2·d_in + K·d_out) is at most three quarters of (K − 1)·N·d_in·d_out."""
    outputs, inputs = shape
    return 3 * (tasks - 1) * outputs * inputs // max(1, 4 * (2 * inputs + tasks * outputs))


def _users(losses: Sequence[Tensor]) -> dict[Node, int]:
    """Return how often each node below the losses is used."""
    users: dict[Node, int] = {loss.grad_fn: 0 for loss in losses if loss.grad_fn is not None}
    pending = list(users)
    while pending:
        for below, _ in pending.pop().next_functions:
            if below in users:
                users[below] += 1
            elif below is not None:
                users[below] = 1
                pending.append(below)
    return users


def _rows_of(node: Node) -> int:
    """Return N, without asking for X itself."""
    _, name = PRODUCTS[type(node).__name__]
    return int(getattr(node, f"_saved_{name}_sym_sizes")[0])


def _weight_of(node: Node, users: dict[Node, int]) -> Tensor | None:
    """Return the leaf by whose transpose this node multiplies, if nothing else uses it."""
    right, _ = PRODUCTS[type(node).__name__]
    transposed = node.next_functions[right][0]
    if type(transposed).__name__ != "TBackward0" or users[transposed] != 1:
        return None
    leaf = transposed.next_functions[0][0]
    if type(leaf).__name__ != "AccumulateGrad" or users[leaf] != 1:
        return None
    weight: Tensor = leaf.variable
    return weight


def _inputs_of(node: Node) -> Tensor | None:
    """Return the X that was saved for the weight's gradient, or None if it is not simply there."""
    _, name = PRODUCTS[type(node).__name__]
    if getattr(node, "_saved_alpha", 1) != 1:
        return None
    if getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", _UNKNOWN) is not None:
        return None  # recomputed, or fetched from elsewhere, whenever it is asked for
    inputs: Tensor | None = getattr(node, f"_saved_{name}")
    return None if inputs is None or not _is_plain(inputs) else inputs.detach()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
