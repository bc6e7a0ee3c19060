"""How signals end a run: the first one asks for it, the second one does not wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

_PREEMPTED_EXIT_CODE = 75


class StopRequest:
    """Whether this process was asked to stop.

    Training defers the first signal, so that it can finish its step and write a checkpoint; anywhere else, and at
    a Ctrl-C that follows, an exception is raised at once: KeyboardInterrupt at Ctrl-C, else SystemExit with the code
    of a pre-empted run. Either leaves what is on disk as it was, for every write is atomic. Only a person hurries:
    whoever stops a whole group of processes (a scheduler, torchrun) may send SIGTERM to each of them twice.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.raised = False
        self._deferring = False

    def receive(self, signum: int, _frame: FrameType | None = None) -> None:
        """Take in a signal."""
        first = self.signum == 0
        self.signum = self.signum or signum
        if self._deferring and (first or signum != signal.SIGINT):
            if first:
                with suppress(
                    OSError
                ):  # who read it may have ended at the same Ctrl-C, as in `... | tee log`
                    os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C stops at once\n")
            return
        self.raised = True
        raise stop_exception(signum)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a first signal in the body only be noted, in ``signum``."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before


def stop_exception(signum: int) -> BaseException:
    """Return what ends a run that was asked to stop by this signal."""
    return KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(_PREEMPTED_EXIT_CODE)


@contextmanager
def stops_on_signals(preempt_signal: str = "none") -> Iterator[StopRequest]:
    """Take Ctrl-C, SIGTERM and ``preempt_signal`` into hand for the body.

    A signal can strike inside code that turns the exception into an error of its own, an import that was cut short
    for example; whatever is raised after it therefore counts as that signal. A signal that the process ignores
    stays ignored. Only the main thread can do this; elsewhere nothing changes.

    Args:
        preempt_signal: ``"none"``, or a third signal that counts as SIGTERM: ``"USR1"`` or ``"USR2"``.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.getsignal(signum) for signum in _signals(preempt_signal)}
    for signum, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(signum, request.receive)
    try:
        yield request
    except Exception as error:
        if request.raised:
            raise stop_exception(request.signum) from error
        raise
    finally:
        for signum, handler in before.items():
            if handler is not None:  # None: set outside Python, and not to be set back
                signal.signal(signum, handler)


def _signals(preempt_signal: str) -> Sequence[signal.Signals]:
    extra = getattr(signal, f"SIG{preempt_signal}", None)  # Windows has neither
    return [signal.SIGINT, signal.SIGTERM, *([extra] if extra is not None else [])]
