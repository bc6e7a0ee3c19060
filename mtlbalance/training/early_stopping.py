"""Which epoch is best, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class BestEpoch:
    """The best value of the key metric so far. NaN is never better than anything.

    Args:
        mode: ``"min"`` or ``"max"``.
        min_delta: an improvement is a change by more than this.
    """

    mode: Literal["min", "max"]
    min_delta: float = 0.0
    epoch: int | None = None
    value: float | None = None

    def update(self, epoch: int, value: float) -> bool:
        """Take in an epoch's value; return whether it is the best."""
        if math.isnan(value):
            return False
        if self.value is not None:
            gain = self.value - value if self.mode == "min" else value - self.value
            if not gain > self.min_delta:  # also where infinities make it NaN
                return False
        self.epoch, self.value = epoch, value
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch and its value."""
        return {"epoch": self.epoch, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.epoch, self.value = state["epoch"], state["value"]


@dataclass
class EarlyStopping:
    """Stops once ``patience`` epochs in a row brought no improvement of at least ``min_delta``.

    It keeps its own best value: with a ``min_delta``, many small gains are no reason to go on, although
    the best epoch's weights are still worth keeping.
    """

    best: BestEpoch
    patience: int

    def update(self, epoch: int, value: float) -> None:
        """Take in an epoch's value."""
        self.best.update(epoch, value)

    def exhausted(self, epoch: int) -> bool:
        """Return whether ``epoch`` (from 0) is the last one worth training."""
        last_gain = -1 if self.best.epoch is None else self.best.epoch
        return epoch - last_gain >= self.patience
