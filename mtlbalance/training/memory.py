"""Running out of memory, told as what was being done and what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtlbalance.errors import TrainingError

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, of the machine or of an accelerator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def names_out_of_memory(phase: str, lower: str) -> Iterator[None]:
    """Turn an allocation that fails in the body into an error for the user.

    Args:
        phase: what was being done, such as ``"the forward pass"``.
        lower: what makes it need less.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"out of memory in {phase}{f' ({reason})' if reason else ''}; lower {lower}. What was saved before is "
            "intact, and the run goes on from there when it is started again with the same result-deciding options"
        ) from error
