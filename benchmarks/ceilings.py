"""How fast this machine multiplies and copies, measured beside a step, and the time that counts take at that rate."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from counting import Counts, Layer, LstmLayer, Product
from numpy.typing import NDArray
from rounds import Entry
from torch import Tensor, nn

Seconds = NDArray[np.float64]  # one number a round
SQUARE = Product(1024, 1024, 1024, "NN")
COPIED_BYTES = tuple(2**power for power in (19, 21, 23, 25, 27))  # read and written: 512 KiB to 128 MiB
_ONE_DNN = " by oneDNN"


def copy_name(size_bytes: int) -> str:
    """Return the name of an entry that copies."""
    return f"copy {size_bytes >> 10} KiB"


def triangle_name(layer: Layer) -> str:
    """Return the name of an entry that factors a layer's inputs."""
    return f"R of {layer.inputs} x {layer.rows}"


def reduced_product(layer: Layer) -> Product:
    """Return the product R·D of a layer's factors."""
    return Product(min(layer.rows, layer.inputs), layer.rows, layer.outputs, "NN")


def weight_product(layer: Layer) -> Product:
    """Return the product DᵀX, the gradient of a layer's weight."""
    return Product(layer.outputs, layer.rows, layer.inputs, "TN")


def entries(
    products: Collection[Product | LstmLayer], layers: Collection[Layer], device: torch.device
) -> dict[str, Entry]:
    """Return what to measure: products by their shapes, a large one, layers' factors, and copies."""
    wanted = {SQUARE, *products, *(reduced_product(layer) for layer in layers)}
    found: dict[str, Entry] = {}
    for product in sorted(wanted, key=str):
        if isinstance(product, LstmLayer):
            found[str(product)] = Entry(_recur(product, device))
        else:
            found[str(product)] = Entry(_multiply(product, device))
            if _has_one_dnn(device):
                found[f"{product}{_ONE_DNN}"] = Entry(_multiply_by_one_dnn(product))
    found |= {triangle_name(layer): Entry(_triangle(layer, device)) for layer in layers}
    return found | {copy_name(size): Entry(_copy(size, device)) for size in COPIED_BYTES}


def _multiply(product: Product, device: torch.device) -> Iterator[None]:
    left = _matrix(product.rows, product.inner, product.form[0], device)
    right = _matrix(product.inner, product.columns, product.form[1], device)
    out = torch.empty(product.rows, product.columns, device=device)
    while True:
        torch.mm(left, right, out=out)
        yield


def _matrix(rows: int, columns: int, form: str, device: torch.device) -> Tensor:
    if form == "N":
        return torch.randn(rows, columns, device=device)
    return torch.randn(columns, rows, device=device).T


def _has_one_dnn(device: torch.device) -> bool:
    return device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _multiply_by_one_dnn(product: Product) -> Iterator[None]:
    """Multiply by the library that torch has beside its BLAS, which it takes for float32 in few places only."""
    left, right = torch.randn(product.rows, product.inner), torch.randn(product.columns, product.inner)
    while True:
        torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        yield


def _recur(layer: LstmLayer, device: torch.device) -> Iterator[None]:
    lstm = nn.LSTM(layer.inputs, layer.hidden).to(device)
    inputs = torch.randn(layer.length, layer.batch, layer.inputs, device=device, requires_grad=True)
    outputs, _ = lstm(inputs)
    gradient = torch.randn_like(outputs)
    while True:
        if layer.backward:
            torch.autograd.grad(outputs, [inputs, *lstm.parameters()], gradient, retain_graph=True)
        else:
            lstm(inputs)
        yield


def _triangle(layer: Layer, device: torch.device) -> Iterator[None]:
    inputs = torch.randn(layer.rows, layer.inputs, device=device)
    while True:
        torch.linalg.qr(inputs.T, mode="r")
        yield


def _copy(size_bytes: int, device: torch.device) -> Iterator[None]:
    source = torch.randn(size_bytes // 8, device=device)  # float32: half of it read, half written
    target = torch.empty_like(source)
    while True:
        target.copy_(source)
        yield


@dataclass(frozen=True)
class Ceilings:
    """What was measured.

    Args:
        seconds: of each entry, in every round.
        any_kernel: take a product by whichever library is faster, not as torch takes it.
    """

    seconds: Mapping[str, Seconds]
    any_kernel: bool = False

    def of(self, what: str | Product | LstmLayer) -> Seconds:
        """Return the seconds of one entry."""
        found = self.seconds[str(what)]
        other = self.seconds.get(f"{what}{_ONE_DNN}", found) if self.any_kernel else found
        return min(found, other, key=lambda seconds: float(np.median(seconds)))

    def rate(self, what: str | Product | LstmLayer, amount: float) -> float:
        """Return the median of an amount (of FLOPs, bytes) a second."""
        return float(np.median(amount / self.of(what)))

    def multiplying(self, counts: Counts) -> Seconds:
        """Return the seconds of all products, each as fast as by itself and with its operands in the caches.

        Other FLOPs go at the rate of the fastest product there is.
        """
        fastest = max({SQUARE, *counts.products}, key=lambda product: self.rate(product, product.flops))
        total = counts.other_flops / fastest.flops * self.of(fastest)
        for product, times in counts.products.items():
            if times:
                total = total + times * self.of(product)
        return np.asarray(total)

    def moving(self, moved: Mapping[int, int]) -> Seconds:
        """Return the seconds of all that is read and written, each at the rate of copying a block no larger."""
        rates = np.stack([size / self.of(copy_name(size)) for size in COPIED_BYTES])
        # A smaller block is no slower, but for the call itself.
        rates = np.maximum.accumulate(rates[::-1], axis=0)[::-1]
        total = np.zeros(rates.shape[1])
        for size, count in moved.items():
            level = max(0, int(np.searchsorted(COPIED_BYTES, size, side="right")) - 1)
            total += count / rates[level]
        return total
