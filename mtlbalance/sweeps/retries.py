"""What to make of an attempt that has ended: finished, to be tried again, left alone, or failed."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from mtlbalance.sweeps.folder_state import FolderState
from mtlbalance.sweeps.jobs import JobEnd

Outcome = Literal["finished", "retry", "locked", "failed"]

_PREEMPTED, _INTERRUPTED = 75, 130
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "memoryerror", "can't allocate memory")
_IN_USE = "is in use by another process"


@dataclass(frozen=True)
class Verdict:
    """An outcome and, unless all went well, why."""

    outcome: Outcome
    reason: str = ""


class Retries:
    """Remembers how often a run was tried again, and judges its ends.

    Only what may go better the next time is tried again: a signal, a lost worker, a pre-empted run (each
    counts towards ``limit``), and memory that ran out (once: another run may have had it).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._retries: dict[str, int] = {}
        self._out_of_memory: set[str] = set()

    def judge(self, end: JobEnd, state: FolderState) -> Verdict:
        """Return what to do after an attempt, given the state that its folder was left in."""
        code = end.exit_code
        if state is FolderState.FINISHED and code == 0:
            return Verdict("finished")
        if code == 2 and f"{PurePath(end.run_id).name} {_IN_USE}" in end.tail:
            return Verdict("locked")
        if state is FolderState.LOCKED and code == 0:  # somebody looks whether it is: look again
            return Verdict("locked")
        if end.how == "timeout":
            return Verdict(
                "failed", f"timed out after {end.seconds:.0f} s; started again, it goes on where it stopped"
            )
        if end.how == "lost":
            return self._transient(end, f"its worker was lost ({end.last_words or 'no word of why'})")
        if code < 0 or (128 < code <= 128 + 64 and code != _INTERRUPTED):
            return self._transient(end, f"killed by {_signal_name(-code if code < 0 else code - 128)}")
        if code == _PREEMPTED:
            return self._transient(end, "pre-empted")
        if code == 1 and any(words in end.tail.lower() for words in _OUT_OF_MEMORY):
            if end.run_id in self._out_of_memory:
                return Verdict("failed", f"out of memory, twice: {end.last_words}")
            self._out_of_memory.add(end.run_id)
            return Verdict("retry", "out of memory")
        if code == 0:
            return Verdict("failed", "it ended well, but left no results.json")
        return Verdict("failed", f"exit code {code}: {end.last_words or 'it said nothing'}")

    def _transient(self, end: JobEnd, reason: str) -> Verdict:
        tried = self._retries.get(end.run_id, 0)
        if tried >= self.limit:
            return Verdict("failed", f"{reason}; tried {tried + 1} times")
        self._retries[end.run_id] = tried + 1
        return Verdict("retry", reason)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
