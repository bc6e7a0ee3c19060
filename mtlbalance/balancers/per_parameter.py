"""State with numbers for every shared parameter: sized at the first call, and then tied to the same parameters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call
from mtlbalance.balancers.gradient_balancer import GradientBalancer
from mtlbalance.balancers.layout import Layout
from mtlbalance.errors import SharedParametersError


class PerParameter(GradientBalancer):
    """Base of balancers that keep a buffer of shape (K, P) for P shared numbers, named by ``per_parameter``.

    The numbers must be the same in every call, so representations are refused.
    """

    per_parameter: ClassVar[str]
    needs_parameters: ClassVar[bool] = True
    reads_products: ClassVar[bool] = False  # but every number

    _parameters_seen: Sequence[weakref.ref[Tensor]] = ()
    _shapes_seen: Sequence[torch.Size] = ()

    def _shared(self, call: Call) -> list[Tensor]:
        shared = super()._shared(call)
        if not all(tensor.is_leaf for tensor in shared):
            raise SharedParametersError(
                f"{self.get_name()} keeps state for every shared parameter, so shared_params must hold parameters, "
                "not representations"
            )
        size, kept = Layout(shared, call.losses_K.device).size, getattr(self, self.per_parameter).shape[1]
        if kept not in (0, size):
            raise SharedParametersError(
                f"{self.get_name()} has state for {kept} shared numbers, but shared_params holds {size}; pass the same "
                "parameters in every call"
            )
        self._check_same(shared)
        return shared

    def _check_same(self, shared: list[Tensor]) -> None:
        """Raise where as many numbers are of other parameters: one layer frozen, another of its size not any more.

        Copies of all of them, as in a model that was loaded anew, pass if their shapes are the same.
        """
        known = [reference() for reference in self._parameters_seen]
        shapes = [tensor.shape for tensor in shared]
        now, before = (
            [id(tensor) for tensor in shared],
            [id(tensor) for tensor in known if tensor is not None],
        )
        if (
            self._parameters_seen
            and now != before
            and (set(now) & set(before) or shapes != self._shapes_seen)
        ):
            raise SharedParametersError(
                f"{self.get_name()} has state for every shared parameter, but shared_params now holds others, or in "
                "another order, though as many numbers; pass the same parameters in every call"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave what refers to the model's parameters out of copies and pickles."""
        return super().__getstate__() | {"_parameters_seen": [], "_shapes_seen": []}

    def size_state(self, layout: Layout) -> None:
        """Make the buffer as wide as ``layout`` in a first call, and tie it to these parameters.

        To be called in every call that moves the state, once nothing stands against that any more.
        """
        if getattr(self, self.per_parameter).shape[1] == 0:
            size = (len(self.tasks), layout.size)
            setattr(self, self.per_parameter, torch.zeros(size, dtype=layout.dtype, device=layout.device))
        self._parameters_seen = [weakref.ref(tensor) for tensor in layout.tensors]
        self._shapes_seen = [tensor.shape for tensor in layout.tensors]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + self.per_parameter)
        if saved is not None and saved.dim() == 2 and len(saved) == len(self.tasks):
            kept: Tensor = getattr(self, self.per_parameter)
            setattr(self, self.per_parameter, torch.zeros_like(saved, device=kept.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
