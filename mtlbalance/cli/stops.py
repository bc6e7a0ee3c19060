"""A command stopped from outside: the exit codes, the words, and leaving at once. Light to import."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

INTERRUPTED, PREEMPTED = 130, 75  # exit codes


def stop_message(code: int, arguments: Sequence[str]) -> str:
    """Return what to say when a command was stopped from outside."""
    text = {INTERRUPTED: "interrupted", PREEMPTED: "pre-empted"}[code]
    return f"{text}; the run goes on when it is started again" if arguments[:1] == ["run"] else text


def stop_document(message: str, code: int) -> str:
    """Return the JSON document of a ``--json`` command that was stopped from outside."""
    return json.dumps({"error": {"type": "Stopped", "message": message, "exit_code": code}}, indent=2)


def leave_at_once(signum: int, _frame: FrameType | None) -> None:
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
