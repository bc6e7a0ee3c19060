"""What an engine is: where the runs of a sweep are carried out, and nothing of which or why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mtlbalance.sweeps.jobs import Job, JobEnd


class Engine(Protocol):
    """Carries out jobs somewhere. The supervisor decides which, tries again, and keeps nothing else here.

    What a plugin's ``EngineRegistration.build`` returns is one of these. It is used by one thread.
    """

    def room(self) -> int:
        """Return how many more jobs it takes now."""

    def start(self, job: Job) -> str:
        """Start or queue a job; return where, in a word, such as ``cuda:0``."""

    def poll(self, seconds: float) -> Sequence[JobEnd]:
        """Return the jobs that have ended since the last call; wait for one, but at most this long."""

    def stop(self) -> None:
        """Ask every job to leave its folder in order and end; ``poll`` then returns their ends."""

    def close(self) -> None:
        """Let go of everything; jobs that still run are killed."""

    def adopt(self, log: Path) -> None:
        """Note that another process is at the run with this log: an earlier sweep may have started it here."""
