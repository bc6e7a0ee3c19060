"""``python -m mtlbalance.cli.leash run ...``: a run that stops, in order, when whoever started it is gone.

An engine's worker holds the other end of the run's standard input. A worker that dies, however suddenly,
lets go of it; the run then does as at SIGTERM: it saves its state and leaves its folder to be resumed. One
that does not is killed: nobody else would, and it would keep its folder and its GPU for ever.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import NoReturn

_GRACE_SECONDS = 30.0  # as where a sweep stops a run itself


def run_leashed() -> NoReturn:
    """Run the command line of this process, for as long as its standard input is open."""
    threading.Thread(target=_wait_for_the_end_of_input, daemon=True).start()
    from mtlbalance.cli.main import run_cli

    run_cli()


def _wait_for_the_end_of_input() -> None:
    while True:
        try:
            if not os.read(0, 1024):
                break
        except OSError:
            break
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.killpg(os.getpgid(0), signal.SIGKILL)  # with what it started: it is the head of a group of its own


if __name__ == "__main__":
    run_leashed()
