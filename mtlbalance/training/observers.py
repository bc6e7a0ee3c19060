"""Telling observer plugins what happens; one that fails is left out from then on, and training goes on."""

from __future__ import annotations

import warnings
from typing import Any

from mtlbalance.training.record import EventLog
from mtlbalance.training.seeding import rng_state, set_rng_state


class Observers:
    """Calls the hooks ``on_run_start``, ``on_epoch_end`` and ``on_run_end`` of every plugin that has them.

    What they draw at random leaves the generators of training alone: an observer is told of an epoch once, so a run
    that is resumed after it would go on from other numbers.

    Args:
        hook: pluggy's hook relay; None, on all ranks but the first: nobody is told.
        log: where a failure is noted.
    """

    def __init__(self, hook: Any, log: EventLog) -> None:
        self._hook = hook
        self._log = log
        self._disabled: set[str] = set()

    def notify(self, event: str, **arguments: Any) -> None:
        """Call one hook; every plugin gets its own chance to fail."""
        if self._hook is None or not (found := getattr(self._hook, event).get_hookimpls()):
            return
        generators = rng_state()
        for implementation in reversed(found):
            name = implementation.plugin_name
            if name in self._disabled:
                continue
            try:
                implementation.function(*(arguments[argument] for argument in implementation.argnames))
            except Exception as error:
                self._disabled.add(name)
                reason = f"{type(error).__name__}: {error}"
                self._log.write("observer_disabled", plugin=name, hook=event, reason=reason)
                warnings.warn(
                    f"the observer plugin {name!r} failed in {event} and is disabled for the rest of this run "
                    f"({reason})",
                    RuntimeWarning,
                    stacklevel=2,
                )
        set_rng_state(generators)
