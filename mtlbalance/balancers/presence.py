"""Which tasks take part in a call, and which state may move.

Nearly every call has all tasks and finite losses. Where the host knows so without asking a device, the mask is one
constant tensor that is recognised, and nothing is masked by it: on small models, arithmetic on masks of K
numbers was half of what a call cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TRUE: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
_CPU = torch.device("cpu")
_SCALAR = ((), _CPU)
_READ_AT_MOST = 64  # numbers looked at on the host, one by one


def _always(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the one tensor of that shape that is True everywhere."""
    mask = _TRUE.get((shape, device))
    if mask is None or mask._version:  # someone wrote into it: it means something else now
        with torch.inference_mode(False):
            mask = _TRUE[shape, device] = torch.ones(shape, dtype=torch.bool, device=device)
    return mask


def everyone(count: int, device: torch.device) -> Tensor:
    """Return the (K,) mask of a call that has every task."""
    return _always((count,), device)


def is_everyone(mask_K: Tensor) -> bool:
    """Return whether the host knows that all K entries are True; False says nothing."""
    return mask_K is _TRUE.get((mask_K.shape, mask_K.device)) and not mask_K._version


def known_finite(values: Tensor) -> bool:
    """Return whether the host knows that all values are finite; False says nothing."""
    if values.device.type != "cpu" or values.numel() > _READ_AT_MOST:
        return False
    numbers = values.tolist() if values.dim() == 1 else values.flatten().tolist()
    return all(map(math.isfinite, numbers))


def all_finite(values: Tensor) -> Tensor:
    """Return whether all values are finite as a 0-d bool on their device, without waiting for it."""
    return _always((), _CPU) if known_finite(values) else torch.isfinite(values).all()


def is_true(condition: Tensor) -> bool:
    """Return whether the host knows that a 0-d bool is True; False says nothing."""
    if condition is _TRUE.get(_SCALAR) and not condition._version:
        return True  # by far the most calls, and asking a tensor takes longer
    return condition.device.type == "cpu" and bool(condition)


def both(first: Tensor, second: Tensor) -> Tensor:
    """Return ``first & second`` of 0-d bools on one device."""
    return second if is_true(first) else first & second


def moving(present_K: Tensor, finite: Tensor) -> Tensor:
    """Return the (K,) mask of the tasks whose state moves: present ones, in a call whose numbers are ``finite``."""
    if is_everyone(present_K) and is_true(finite):
        return present_K
    return present_K & finite


def choose(mask_K: Tensor, new_K: Tensor, old_K: Tensor | float) -> Tensor:
    """Return ``new_K`` where the mask is True and ``old_K`` elsewhere; ``new_K`` itself if that is everywhere."""
    return new_K if is_everyone(mask_K) else torch.where(mask_K, new_K, old_K)


def only(mask_K: Tensor, values_K: Tensor) -> Tensor:
    """Return the finite values where the mask is True and 0 elsewhere; the values themselves if that is everywhere."""
    return values_K if is_everyone(mask_K) else values_K * mask_K


def share_budget(weights_K: Tensor, present_K: Tensor) -> Tensor:
    """Return the weights of the present tasks, scaled so that they sum to what all weights sum to; 0 elsewhere."""
    if is_everyone(present_K):
        return weights_K.clone()  # never the state itself: autograd keeps what it is given
    kept_K = weights_K * present_K
    kept = kept_K.sum()
    return torch.where(kept > 0, kept_K * (weights_K.sum() / kept), kept_K)


def share_of_present(weights_K: Tensor, present_K: Tensor) -> Tensor:
    """Return the present tasks' weights as shares of 1, 0 elsewhere; uniform if they are all 0."""
    if is_everyone(present_K):
        return weights_K.clone()
    kept_K = weights_K * present_K
    absent = (weights_K * ~present_K).sum()
    kept = torch.where(absent > 0, kept_K.sum(), torch.ones_like(absent))  # all present: as they are
    return torch.where(kept > 0, kept_K / kept, present_K / present_K.sum())


def softmax_of_present(logits_K: Tensor, present_K: Tensor) -> Tensor:
    """Return the softmax over the present tasks, 0 elsewhere."""
    return (logits_K if is_everyone(present_K) else logits_K.masked_fill(~present_K, -torch.inf)).softmax(0)
