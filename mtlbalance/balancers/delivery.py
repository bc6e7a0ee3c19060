"""How weights become gradients: the scalar whose ``backward()`` leaves in ``.grad`` what the method prescribes.

*Weighted sum*: Σ stopgrad(w_k)·L_k, one ordinary backward pass. *Direct*: the task gradients that were
measured already are weighted, summed and handed over, so that nothing is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mtlbalance.balancers.signals import common_kind
from mtlbalance.errors import GraphConsumedError

_HALF = (torch.float16, torch.bfloat16)


def dot(values_K: Tensor, weights_K: Tensor) -> Tensor:
    """Return Σ v_k·w_k of detached or differentiable numbers as a 0-d tensor, in one operation."""
    if values_K.dtype != weights_K.dtype:
        dtype = torch.promote_types(values_K.dtype, weights_K.dtype)
        values_K, weights_K = values_K.to(dtype), weights_K.to(dtype)
    return torch.dot(values_K, weights_K)


def weighted_sum(losses: Mapping[int, Tensor], weights_K: Tensor, zeros: Sequence[Tensor] = ()) -> Tensor:
    """Return Σ w_k·L_k over the present tasks (index -> 0-d loss), plus ``zeros``, differentiable through both."""
    terms = [*(weights_K[index].to(loss.device) * loss for index, loss in losses.items()), *zeros]
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def with_slopes(value: Tensor, slopes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return ``value`` (0-d, detached) as a scalar whose derivative by each tensor is the one given beside it."""
    tensors = [tensor for tensor, _ in slopes]
    sloped = _Sloped.apply(value, [slope for _, slope in slopes], *tensors)  # type: ignore[no-untyped-call]
    assert isinstance(sloped, Tensor)
    return sloped


class _Sloped(torch.autograd.Function):
    """A number with given derivatives."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, slopes: list[Tensor], *tensors: Tensor) -> Tensor:  # noqa: ARG004
        ctx.slopes = slopes  # type: ignore[attr-defined]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(slope * factor.to(slope.device, slope.dtype) for slope in ctx.slopes))


class _Term(NamedTuple):
    """Gradients of the tensors at some positions; they are multiplied by one of the weights."""

    positions: list[int]
    gradients: list[Tensor]
    weights_K: Tensor
    task: int


class GradientSum:
    """A sum of weighted task gradients, taken when it is handed over; what it is given is left as it is."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._position_of: dict[int, int] = {}
        self._terms: list[_Term] = []
        self._inputs: dict[int, Tensor] = {}
        self._waiting: set[int] = set()

    def positions(self, tensors: Iterable[Tensor]) -> list[int]:
        """Return where the sums of ``tensors`` are kept, to `add` to them."""
        return [self._position(tensor) for tensor in tensors]

    def add(
        self, positions: list[int], gradients: Sequence[Tensor | None], weights_K: Tensor, task: int
    ) -> None:
        """Add ``weights_K[task]`` times one task's gradients of the tensors at these positions; None counts as zero."""
        found = [gradient for gradient in gradients if gradient is not None]
        if len(found) < len(gradients):
            pairs = zip(positions, gradients, strict=True)
            positions = [position for position, gradient in pairs if gradient is not None]
        if found:
            self._terms.append(_Term(positions, found, weights_K, task))

    def through(self, weight: Tensor, inputs: Tensor) -> None:
        """Hand over DᵀX with ``inputs`` X where D is the sum that was added for ``weight``, of a linear layer."""
        self._inputs[self._position(weight)] = inputs

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Hand over zeros for those of ``tensors`` that nothing is added for, so that whoever waits gets them."""
        self._waiting.update(self.positions(tensors))

    def deliver(self, value: Tensor, *, keep: bool) -> Tensor:
        """Return ``value`` (0-d, detached) as a scalar whose backward pass hands over the sums.

        Tensors that nothing was added for are left alone: their ``.grad`` stays what it is.

        Args:
            value: what the scalar shows.
            keep: keep the gradients after a backward pass, so that another one may follow.
        """
        reached = {position for term in self._terms for position in term.positions}
        zeros = {position: self._tensors[position].detach() for position in self._waiting - reached}
        given = [t for position, t in enumerate(self._tensors) if position in reached or position in zeros]
        if not given:
            return value
        parcel = _Parcel(self._terms, self._inputs, len(self._tensors), zeros, keep)
        delivered = _Delivery.apply(value, parcel, *given)  # type: ignore[no-untyped-call]
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
            total = sums[position]
            if total is not None:
                sums[position] = _through(total, rows, version)
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
    alike = common_kind([gradient for term in terms for gradient in term.gradients])
    for term, weight in zip(terms, _scaled(terms, factor), strict=True):
        # Half-precision gradients are summed, and scaled, before they are rounded to the parameter.
        gradients = [g.float() if g.dtype in _HALF else g for g in term.gradients]
        if alike is None:
            _add_each(sums, term.positions, gradients, weight)
        else:
            _add_together(sums, term.positions, gradients, weight.to(gradients[0].device))
    return sums


def _add_together(
    sums: list[Tensor | None], positions: list[int], gradients: list[Tensor], weight: Tensor
) -> None:
    """Add weighted gradients of one kind to the sums at these positions."""
    totals = [total for position in positions if (total := sums[position]) is not None]
    if len(totals) == len(gradients):
        weight = weight.to(gradients[0].dtype)
        torch._foreach_addcmul_(totals, gradients, [weight] * len(gradients))
    elif not totals:
        for position, product in zip(positions, torch._foreach_mul(gradients, weight), strict=True):
            sums[position] = product
    else:
        _add_each(sums, positions, gradients, weight)


def _add_each(
    sums: list[Tensor | None], positions: list[int], gradients: list[Tensor], weight: Tensor
) -> None:
    """Add weighted gradients of any kind to the sums at these positions, in place where that can be."""
    for position, gradient in zip(positions, gradients, strict=True):
        total = sums[position]
        if total is None:
            sums[position] = gradient * weight.to(gradient.device)
        elif gradient.is_sparse or total.is_sparse:
            term = gradient * weight.to(gradient.device)
            # dense + sparse, never reversed
            sums[position] = term + total if total.is_sparse else total + term
        else:
            total.addcmul_(gradient, weight.to(gradient.device, gradient.dtype))


def _through(total: Tensor, inputs: Tensor, version: int) -> Tensor:
    """Return the gradient of a linear layer's weight from that of its output."""
    if inputs._version != version:
        raise GraphConsumedError(
            f"the input of a linear layer, of shape {tuple(inputs.shape)}, was changed in place between the balancer's "
            "call and backward(), which needs it; call backward() first, or change a copy"
        )
    with torch.autocast(total.device.type, enabled=False):
        return total.T @ inputs


def _scaled(terms: Sequence[_Term], factor: Tensor) -> Iterator[Tensor]:
    """Yield each term's weight times the factor; the weights of all tasks are multiplied at once."""
    scaled: dict[int, Sequence[Tensor]] = {}
    for term in terms:
        weights_K = term.weights_K
        if id(weights_K) not in scaled:
            scaled[id(weights_K)] = (weights_K * factor.to(weights_K.device)).unbind()
        yield scaled[id(weights_K)][term.task]
