"""The ``mtlbalance`` script. Light to import: signals are in hand before anything that takes long is loaded."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from mtlbalance.cli.stops import leave_at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing is raised and the process is not left."""
    from mtlbalance.cli.app import execute

    return execute(sys.argv[1:] if arguments is None else arguments)


def run_cli() -> NoReturn:
    """Run the command line of this process: the ``mtlbalance`` script."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as in `nohup mtlbalance ... &`
            signal.signal(signum, leave_at_once)
    _open_closed_streams()
    # Read by OpenMP when torch is imported. Threads that spin while they wait starve whatever else runs on the
    # machine, and are starved by it: a step can take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = main()
    try:
        sys.stderr.flush()
    except OSError:  # nobody reads it any more: at exit, Python would put a code of its own in place of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(code)


def _open_closed_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr, as by ``2>&-``, /dev/null in its place.

    The next file to be opened, a checkpoint perhaps, would get its number, and what is said would be written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(
                sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode)
            )  # the lowest number that is free
