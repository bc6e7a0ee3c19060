"""How weights become gradients: the scalar whose ``backward()`` leaves in ``.grad`` what the method prescribes.

*Weighted sum*: Σ stopgrad(w_k)·L_k, one ordinary backward pass. *Direct*: the task gradients that were
measured already are weighted, summed and handed over, so that nothing is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mtlbalance.errors import GraphConsumedError


def weighted_sum(losses: Mapping[int, Tensor], weights_K: Tensor, zeros: Sequence[Tensor] = ()) -> Tensor:
    """Return Σ w_k·L_k over the present tasks (index -> 0-d loss), plus ``zeros``, differentiable through both."""
    terms = [*(weights_K[index].to(loss.device) * loss for index, loss in losses.items()), *zeros]
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


class GradientSum:
    """The running sum of weighted task gradients, one buffer a tensor, none of it shared with autograd."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: Tensor) -> None:
        """Add ``weight`` (0-d) times one task's gradients of ``tensors``; None counts as zero."""
        new_tensors: list[Tensor] = []
        new_gradients: list[Tensor] = []
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is None:
                continue
            found = self._sums.get(id(tensor))
            if gradient.dtype in (torch.float16, torch.bfloat16):
                gradient = (
                    gradient.float()
                )  # summed, and scaled at delivery, before it is rounded to the parameter
            if found is None:
                new_tensors.append(tensor)
                new_gradients.append(gradient)
            elif gradient.is_sparse or found[1].is_sparse:
                term = gradient * weight.to(gradient.device)
                total = (
                    term + found[1] if found[1].is_sparse else found[1] + term
                )  # dense + sparse, never reversed
                self._sums[id(tensor)] = (tensor, total)
            else:
                found[1].addcmul_(gradient, weight.to(gradient.device, gradient.dtype))
        # A first product is out of place: autograd may hand out one buffer for two tensors, or a view.
        for tensor, product in zip(new_tensors, _times(new_gradients, weight), strict=True):
            self._sums[id(tensor)] = (tensor, product)

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Add zeros for ``tensors`` that have no gradient yet, so that whoever waits for one gets it."""
        for tensor in tensors:
            self._sums.setdefault(id(tensor), (tensor, torch.zeros_like(tensor)))

    def deliver(self, value: Tensor, *, keep: bool) -> Tensor:
        """Return ``value`` (0-d, detached) as a scalar whose backward pass hands over the sums.

        Args:
            value: what the scalar shows.
            keep: keep the sums after a backward pass, so that another one may follow.
        """
        if not self._sums:
            return value
        tensors = [tensor for tensor, _ in self._sums.values()]
        delivered = _Delivery.apply(  # type: ignore[no-untyped-call]
            value, _Parcel([total for _, total in self._sums.values()], keep), *tensors
        )
        assert isinstance(delivered, Tensor)
        return delivered


class _Parcel:
    """Gradients that are handed over once, unless kept."""

    def __init__(self, gradients: list[Tensor], keep: bool) -> None:
        self._gradients: list[Tensor] | None = gradients
        self._keep = keep

    def take(self, factor: Tensor) -> list[Tensor]:
        """Return the gradients times ``factor``, the cotangent of the delivered scalar."""
        gradients = self._gradients
        if gradients is None:
            raise GraphConsumedError(
                "the gradients of this balanced loss were delivered by an earlier backward(); call the balancer "
                "again on fresh losses, or pass retain_graph=True to its call to differentiate it twice"
            )
        if self._keep:
            return _times(gradients, factor)
        self._gradients = None
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
        return gradients


class _Delivery(torch.autograd.Function):
    """Identity on the value; its backward pass is the parcel."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, parcel: _Parcel, *tensors: Tensor) -> Tensor:  # noqa: ARG004
        ctx.parcel = parcel  # type: ignore[attr-defined]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.parcel.take(factor))


def _times(gradients: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    if len({gradient.device for gradient in gradients}) == 1 and not _any_sparse(gradients):
        return list(torch._foreach_mul(list(gradients), factor.to(gradients[0].device)))
    return [gradient * factor.to(gradient.device) for gradient in gradients]


def _any_sparse(gradients: Iterable[Tensor]) -> bool:
    return any(gradient.is_sparse for gradient in gradients)
