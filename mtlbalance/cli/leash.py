"""``python -m mtlbalance.cli.leash run ...``: a run that stops, in order, when whoever started it is gone.

An engine's worker holds the other end of the run's standard input. A worker that dies, however suddenly,
lets go of it; the run then does as at SIGTERM: it saves its state and leaves its folder to be resumed.
"""

from __future__ import annotations

import os
import signal
import threading


def _wait_for_the_end_of_input() -> None:
    while True:
        try:
            if not os.read(0, 1024):
                break
        except OSError:
            break
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_wait_for_the_end_of_input, daemon=True).start()
    from mtlbalance.cli.main import run_cli

    run_cli()
