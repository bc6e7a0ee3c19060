"""Running out of memory, told as what was being done and what to lower."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import torch

from mtlbalance.errors import TrainingError

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, of the machine or of an accelerator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def names_out_of_memory(phase: str, lower: str) -> AbstractContextManager[None]:
    """Turn an allocation that fails in the body into an error for the user.

    What it returns may be entered any number of times.

    Args:
        phase: what was being done, such as ``"the forward pass"``.
        lower: what makes it need less.

    Raises:
        TrainingError: memory ran out.
    """
    return _Phase(phase, lower)


class _Phase:
    """A class and no generator: a step enters several of them, and a generator takes some microseconds each time."""

    __slots__ = ("_lower", "_phase")

    def __init__(self, phase: str, lower: str) -> None:
        self._phase = phase
        self._lower = lower

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is None or not isinstance(error, MemoryError | RuntimeError) or not is_out_of_memory(error):
            return
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"out of memory in {self._phase}{f' ({reason})' if reason else ''}; lower {self._lower}. What was saved "
            "before is intact, and the run goes on from there when it is started again with the same result-deciding "
            "options"
        ) from error
