"""How the gradients of several tensors lie in one flat vector, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlbalance.balancers.signals import real_parts


class Layout:
    """One vector of real numbers for the gradients of ``tensors``: leaves first, then representations.

    Args:
        tensors: what is differentiated; they may differ in precision and device.
        device: where the vector lies. Its numbers are float32, or float64 if those of some tensor are.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._order = sorted(range(len(tensors)), key=lambda column: not tensors[column].is_leaf)
        self.tensors = [tensors[column] for column in self._order]
        self.shapes = [real_parts(tensor.detach()).shape for tensor in self.tensors]
        self.device = device
        double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
        self.dtype = torch.float64 if double else torch.float32
        self._sizes = [shape.numel() for shape in self.shapes]
        self.size = sum(self._sizes)
        pairs = zip(self.tensors, self._sizes, strict=True)
        self.leaf_size = sum(size for tensor, size in pairs if tensor.is_leaf)

    def zeros(self) -> Tensor:
        """Return a vector of zeros."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def flatten(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the gradients, in the order of the tensors given, as a new vector; None counts as zero."""
        parts = [gradients[column] for column in self._order]
        return torch.cat(
            [
                torch.zeros(size, dtype=self.dtype, device=self.device)
                if part is None
                else real_parts(part.to_dense()).reshape(-1).to(self.device, self.dtype)
                for part, size in zip(parts, self._sizes, strict=True)
            ]
        )

    def split(self, flat_P: Tensor) -> list[Tensor]:
        """Return views of the vector, one of the shape of each of ``self.tensors``."""
        parts = torch.split(flat_P, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unflatten(self, flat_P: Tensor) -> list[Tensor]:
        """Return the vector as gradients of ``self.tensors``, each on its tensor's device."""
        # Complex parts are copied: behind an odd count of real numbers, a view of them would not be aligned.
        return [
            (torch.view_as_complex(part.clone()) if tensor.is_complex() else part).to(tensor.device)
            for tensor, part in zip(self.tensors, self.split(flat_P), strict=True)
        ]
