"""How weights become gradients: the scalar whose ``backward()`` leaves in ``.grad`` what the method prescribes.

*Weighted sum*: Σ stopgrad(w_k)·L_k, one ordinary backward pass. *Direct*: the task gradients that were
measured already are weighted, summed and handed over, so that nothing is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mtlbalance.errors import GraphConsumedError

_HALF = (torch.float16, torch.bfloat16)


def weighted_sum(losses: Mapping[int, Tensor], weights_K: Tensor, zeros: Sequence[Tensor] = ()) -> Tensor:
    """Return Σ w_k·L_k over the present tasks (index -> 0-d loss), plus ``zeros``, differentiable through both."""
    terms = [*(weights_K[index].to(loss.device) * loss for index, loss in losses.items()), *zeros]
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


@dataclass
class _Term:
    """Gradients of the tensors at some positions, and the 0-d weight that they are multiplied by."""

    positions: list[int]
    gradients: list[Tensor]
    weight: Tensor


class GradientSum:
    """A sum of weighted task gradients, taken when it is handed over; what it is given is left as it is."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._position_of: dict[int, int] = {}
        self._terms: list[_Term] = []
        self._inputs: dict[int, Tensor] = {}

    def add(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: Tensor) -> None:
        """Add ``weight`` (0-d) times one task's gradients of ``tensors``; None counts as zero."""
        positions: list[int] = []
        found: list[Tensor] = []
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                positions.append(self._position(tensor))
                found.append(gradient)
        if found:
            self._terms.append(_Term(positions, found, weight))

    def through(self, weight: Tensor, inputs: Tensor) -> None:
        """Hand over DᵀX with ``inputs`` X where D is the sum that was added for ``weight``, of a linear layer."""
        position = self._position_of.get(id(weight))
        if position is not None:
            self._inputs[position] = inputs

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Add zeros for ``tensors`` that have no gradient yet, so that whoever waits for one gets it."""
        for tensor in tensors:
            self._position(tensor)

    def deliver(self, value: Tensor, *, keep: bool) -> Tensor:
        """Return ``value`` (0-d, detached) as a scalar whose backward pass hands over the sums.

        Args:
            value: what the scalar shows.
            keep: keep the gradients after a backward pass, so that another one may follow.
        """
        if not self._tensors:
            return value
        reached = {position for term in self._terms for position in term.positions}
        zeros = {i: tensor.detach() for i, tensor in enumerate(self._tensors) if i not in reached}
        parcel = _Parcel(self._terms, self._inputs, len(self._tensors), zeros, keep)
        delivered = _Delivery.apply(value, parcel, *self._tensors)  # type: ignore[no-untyped-call]
        assert isinstance(delivered, Tensor)
        return delivered

    def _position(self, tensor: Tensor) -> int:
        position = self._position_of.setdefault(id(tensor), len(self._tensors))
        if position == len(self._tensors):
            self._tensors.append(tensor)
        return position


class _Parcel:
    """Gradients that are summed and handed over once, unless kept."""

    def __init__(
        self,
        terms: list[_Term],
        inputs: Mapping[int, Tensor],
        count: int,
        zeros: Mapping[int, Tensor],
        keep: bool,
    ) -> None:
        self._terms: list[_Term] | None = terms
        self._inputs = {position: (rows, rows._version) for position, rows in inputs.items()}
        self._count = count
        self._zeros = zeros
        self._keep = keep

    def take(self, factor: Tensor) -> list[Tensor]:
        """Return the sums times ``factor``, the cotangent of the delivered scalar."""
        terms = self._terms
        if terms is None:
            raise GraphConsumedError(
                "the gradients of this balanced loss were delivered by an earlier backward(); call the balancer "
                "again on fresh losses, or pass retain_graph=True to its call to differentiate it twice"
            )
        inputs = self._inputs
        if not self._keep:
            self._terms, self._inputs = None, {}
        sums = _sum(terms, factor, self._count)
        for position, (rows, version) in inputs.items():
            sums[position] = _through(sums[position], rows, version)
        for position, tensor in self._zeros.items():
            sums[position] = torch.zeros_like(tensor)
        return [total for total in sums if total is not None]


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


def _sum(terms: Sequence[_Term], factor: Tensor, count: int) -> list[Tensor | None]:
    """Return Σ factor·weight·gradient over the terms, a new tensor at each position that has one.

    The first product is a new tensor, never the gradient itself: autograd may hand out one buffer for two tensors,
    or a view of something that is not ours.
    """
    sums: list[Tensor | None] = [None] * count
    for term, weight in zip(terms, _scaled(terms, factor), strict=True):
        # Half-precision gradients are summed, and scaled, before they are rounded to the parameter.
        gradients = [g.float() if g.dtype in _HALF else g for g in term.gradients]
        pairs = list(zip(term.positions, gradients, strict=True))
        new = [(position, gradient) for position, gradient in pairs if sums[position] is None]
        old = [(position, gradient) for position, gradient in pairs if sums[position] is not None]
        for (position, _), product in zip(new, _times([g for _, g in new], weight), strict=True):
            sums[position] = product
        _add_to(sums, old, weight)
    return sums


def _through(total: Tensor | None, inputs: Tensor, version: int) -> Tensor:
    """Return the gradient of a linear layer's weight from that of its output."""
    assert total is not None
    if inputs._version != version:
        raise GraphConsumedError(
            f"the input of a linear layer, of shape {tuple(inputs.shape)}, was changed in place between the balancer's "
            "call and backward(), which needs it; call backward() first, or change a copy"
        )
    with torch.autocast(total.device.type, enabled=False):
        return total.T @ inputs


def _scaled(terms: Sequence[_Term], factor: Tensor) -> Sequence[Tensor]:
    """Return the terms' weights times the factor."""
    if not terms:
        return ()
    return (torch.stack([term.weight for term in terms]) * factor.to(terms[0].weight.device)).unbind()


def _add_to(sums: list[Tensor | None], pairs: Sequence[tuple[int, Tensor]], weight: Tensor) -> None:
    """Add the weighted gradients to the sums at their positions, in place where that can be."""
    if not pairs:
        return
    totals = [total for position, _ in pairs if (total := sums[position]) is not None]
    gradients = [gradient for _, gradient in pairs]
    if _are_alike([*totals, *gradients]):
        weight = weight.to(gradients[0].device, gradients[0].dtype)
        torch._foreach_addcmul_(totals, gradients, [weight] * len(gradients))
        return
    for (position, gradient), total in zip(pairs, totals, strict=True):
        if gradient.is_sparse or total.is_sparse:
            term = gradient * weight.to(gradient.device)
            # dense + sparse, never reversed
            sums[position] = term + total if total.is_sparse else total + term
        else:
            total.addcmul_(gradient, weight.to(gradient.device, gradient.dtype))


def _times(gradients: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    if _are_alike(gradients):
        return list(torch._foreach_mul(list(gradients), weight.to(gradients[0].device)))
    return [gradient * weight.to(gradient.device) for gradient in gradients]


def _are_alike(gradients: Sequence[Tensor]) -> bool:
    """Return whether all are plain tensors of one kind, which one call may take together."""
    kinds = {(type(g), g.device, g.dtype, g.layout) for g in gradients}
    return len(kinds) == 1 and next(iter(kinds))[::3] == (Tensor, torch.strided)
