"""The ``mtlbalance`` script. Light to import: signals are in hand before anything that takes long is loaded."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

INTERRUPTED, PREEMPTED = 130, 75  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing is raised and the process is not left."""
    from mtlbalance.cli.app import execute

    return execute(sys.argv[1:] if arguments is None else arguments)


def run_cli() -> NoReturn:
    """Run the command line of this process: the ``mtlbalance`` script."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as in `nohup mtlbalance ... &`
            signal.signal(signum, _leave_at_once)
    # Read by OpenMP when torch is imported. Threads that spin while they wait starve whatever else runs on the
    # machine, and are starved by it: a step can take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())


def stop_message(code: int, arguments: Sequence[str]) -> str:
    """Return what to say when a command was stopped from outside."""
    text = {INTERRUPTED: "interrupted", PREEMPTED: "pre-empted"}[code]
    return f"{text}; the run goes on when it is started again" if arguments[:1] == ["run"] else text


def stop_document(message: str, code: int) -> str:
    """Return the JSON document of a ``--json`` command that was stopped from outside."""
    return json.dumps({"error": {"type": "Stopped", "message": message, "exit_code": code}}, indent=2)


def _leave_at_once(signum: int, _frame: FrameType | None) -> None:
    """End the process here, while nothing is written yet; training has handlers of its own.

    An exception would not do: raised inside an import, it can end as another error, or be taken for a
    library that is missing and lost.
    """
    code = INTERRUPTED if signum == signal.SIGINT else PREEMPTED
    message = stop_message(code, sys.argv[1:])
    os.write(2, f"{message}\n".encode())
    if "--json" in sys.argv:
        os.write(1, f"{stop_document(message, code)}\n".encode())
    os._exit(code)
