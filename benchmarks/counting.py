"""What a training step multiplies and moves, counted as PyTorch performs it: products by shape, other FLOPs, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from workloads import Workload

_OPERANDS = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1}  # product -> where its two operands begin
_LSTM, _LSTM_BACKWARD = torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten.mkldnn_rnn_layer_backward
_ALLOCATES = ("empty", "new_empty")


class Product(NamedTuple):
    """A product of matrices, (rows, inner) by (inner, columns).

    Args:
        form: for each operand, ``N`` if it lies in memory row by row, ``T`` if it is the transpose of one that does.
    """

    rows: int
    inner: int
    columns: int
    form: str

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Product:
        """Return the product of these two."""
        form = "".join("N" if operand.is_contiguous() else "T" for operand in (left, right))
        return cls(left.shape[0], left.shape[1], right.shape[1], form)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.inner} x {self.columns} {self.form}"


class LstmLayer(NamedTuple):
    """One direction of one layer of a fused LSTM, there or back: products and all the rest in one operation."""

    length: int
    batch: int
    inputs: int
    hidden: int
    backward: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions of its products; torch has no formula for them.

        Back, every product of the way there has two, for both of its operands; the first hidden state needs none.
        """
        gates, rows = 4 * self.hidden, self.length * self.batch
        there = 2 * rows * gates * (self.inputs + self.hidden)
        return 2 * there - 2 * self.batch * gates * self.hidden if self.backward else there

    def __str__(self) -> str:
        sizes = f"{self.length} x {self.batch}, {self.inputs} to {self.hidden}"
        return f"LSTM {sizes}, {'back' if self.backward else 'there'}"


@dataclass
class Counts:
    """What some operations do.

    Args:
        products: how many of each.
        other_flops: of what else multiplies: convolutions, batched products.
        moved: the size in bytes of what is gone through -> bytes that are read or written there. For an operation on
            its own both are its operands and results, each once.
    """

    products: Counter[Product | LstmLayer] = field(default_factory=Counter)
    other_flops: int = 0
    moved: Counter[int] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """All multiplications and additions."""
        return sum(product.flops * count for product, count in self.products.items()) + self.other_flops

    def minus(self, other: Counts) -> Counts:
        """Return what is left without the other's; below zero where the other does more."""
        products, moved = self.products.copy(), self.moved.copy()
        products.subtract(other.products)
        moved.subtract(other.moved)
        return Counts(products, self.other_flops - other.other_flops, moved)

    def add(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Count one operation.

        Raises:
            NotImplementedError: it is recurrent, and nothing here says what it multiplies.
        """
        called = operation._overloadpacket
        if called in _OPERANDS:
            start = _OPERANDS[called]
            self.products[Product.of(*args[start : start + 2])] += 1
        elif called in (_LSTM, _LSTM_BACKWARD):
            length, batch, inputs = args[0].shape
            self.products[LstmLayer(length, batch, inputs, args[2].shape[1], called is _LSTM_BACKWARD)] += 1
        elif called in flop_registry:
            self.other_flops += flop_registry[called](*args, **kwargs, out_val=result)
        elif "rnn" in str(called):
            raise NotImplementedError(f"{called} is not counted; see counting.LstmLayer for the one that is")
        elif size := _moved_bytes(operation, (args, kwargs), result):
            self.moved[size] += size


def _moved_bytes(operation: Any, operands: Any, result: Any) -> int:
    """Return the bytes of operands and results, each once; none for a view, or where memory is only asked for."""
    read = {id(tensor): tensor for tensor in tree_leaves(operands) if isinstance(tensor, Tensor)}.values()
    written = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
    if operation.__name__.startswith(_ALLOCATES):
        return 0
    if not operation._schema.is_mutable:
        places = {tensor.untyped_storage().data_ptr() for tensor in read}
        if any(tensor.untyped_storage().data_ptr() in places for tensor in written):
            return 0
    return sum(_size(tensor) for tensor in (*read, *written))


def _size(tensor: Tensor) -> int:
    """Return a tensor's bytes; what is expanded is there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts.add(func, args, kwargs or {}, result)
        return result


@contextmanager
def counted() -> Iterator[Counts]:
    """Count all that is done inside."""
    with _Counting() as mode:
        yield mode.counts


class Layer(NamedTuple):
    """A linear layer of the trunk that is called once, on so many rows."""

    rows: int
    inputs: int
    outputs: int


class StepCounts(NamedTuple):
    """What a step does, in its parts.

    Args:
        trunk_forward, heads_forward: up to the features, and up to the losses.
        backward: of the losses' sum, through heads and trunk.
        trunk_backward: of it, from the features to the trunk's parameters.
        passes: one backward pass a task, each through its head and the trunk.
        linear: the trunk's linear layers.
        feature_bytes: of the trunk's features.
    """

    trunk_forward: Counts
    heads_forward: Counts
    backward: Counts
    trunk_backward: Counts
    passes: Counts
    linear: tuple[Layer, ...]
    feature_bytes: int


def count_step(workload: Workload) -> StepCounts:
    """Take a step apart, once, without an optimizer."""
    trunk, heads, model = workload.fresh_model()
    linear: list[Layer] = []
    for module in trunk.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(_noting(linear))
    with counted() as trunk_forward:
        features = trunk(workload.inputs)
    with counted() as heads_forward:
        losses = workload.losses({task: heads[task](features) for task in workload.tasks})
    total = torch.stack(list(losses.values())).sum()
    with counted() as backward:
        torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    shared = list(trunk.parameters())
    with counted() as passes:
        for task, loss in losses.items():
            torch.autograd.grad(loss, [*shared, *heads[task].parameters()], retain_graph=True)
    gradient = torch.ones_like(features)
    with counted() as trunk_backward:
        torch.autograd.grad(features, shared, gradient)
    feature_bytes = features.numel() * features.element_size()
    return StepCounts(
        trunk_forward, heads_forward, backward, trunk_backward, passes, tuple(linear), feature_bytes
    )


def _noting(found: list[Layer]) -> Any:
    def note(module: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if inputs[0].dim() == 2:
            found.append(Layer(len(inputs[0]), module.in_features, module.out_features))

    return note
