"""State with numbers for every shared parameter: sized at the first call, and then tied to the same parameters."""

from __future__ import annotations

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
        return shared

    def size_state(self, layout: Layout) -> None:
        """Make the buffer as wide as ``layout``, in a first call that nothing stands against any more."""
        if getattr(self, self.per_parameter).shape[1] == 0:
            size = (len(self.tasks), layout.size)
            setattr(self, self.per_parameter, torch.zeros(size, dtype=layout.dtype, device=layout.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + self.per_parameter)
        if saved is not None and saved.dim() == 2 and len(saved) == len(self.tasks):
            kept: Tensor = getattr(self, self.per_parameter)
            setattr(self, self.per_parameter, torch.zeros_like(saved, device=kept.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
