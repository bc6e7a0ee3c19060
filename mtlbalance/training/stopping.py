"""How Ctrl-C and SIGTERM end a run: as exceptions, so that it leaves its folder in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PREEMPTED_EXIT_CODE = 75


@contextmanager
def stops_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C and, at SIGTERM, SystemExit with the code of a pre-empted run.

    Either can strike inside code that turns it into an error of its own, an import that was cut short for
    example; whatever is raised after a signal therefore counts as that signal. A signal that the process
    ignores stays ignored. Only the main thread can do this; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        raise _exception(signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(signum, stop)
    try:
        yield
    except Exception as error:
        if received:
            raise _exception(received[0]) from error
        raise
    finally:
        for signum, handler in before.items():
            if handler is not None:  # None: set outside Python, and not to be set back
                signal.signal(signum, handler)


def _exception(signum: int) -> BaseException:
    return KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(_PREEMPTED_EXIT_CODE)
