"""What the commands print: results and JSON on stdout; errors, warnings and notices on stderr."""

from __future__ import annotations

import json
import math
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from mtlbalance.cli.stops import stop_document
from mtlbalance.errors import MtlBalanceError
from mtlbalance.plugins.manager import PluginWarning

_PACKAGE = str(Path(__file__).parent.parent)
_STYLES = {"error:": "bold red", "warning:": "bold yellow", "notice:": "bold", "help:": "cyan", "-->": "blue"}
_PIPE_WIDTH = 120  # where nothing says how wide a line may be


def stdout_console() -> Console:
    """Return a console on today's stdout; tables are not squeezed when it is a pipe."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal and console.width == 80:
        console.width = _PIPE_WIDTH
    return console


def hanging(line: str, width: int) -> str:
    r"""Return an indented line wrapped at words, its further lines indented as it is and by two more.

    >>> hanging("    a = b + c", 10).split("\n")
    ['    a = b', '      + c']
    """
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) <= width:
        return line
    further = f"{indent}  " if indent else ""
    return textwrap.fill(
        line.strip(), width, initial_indent=indent, subsequent_indent=further, break_long_words=False
    )


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send to stderr what plugins print while they are imported or run; stdout is for the result."""
    with redirect_stdout(sys.stderr):
        yield


def print_json(document: Any) -> None:
    """Print the one JSON document of a ``--json`` command."""
    print(json.dumps(_strict(document), indent=2, default=str, allow_nan=False))


def _strict(value: Any) -> Any:
    """Return a value with null for NaN and infinity, which JSON does not have and most readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def print_stderr(text: str) -> None:
    """Print a message, coloured in a terminal, exactly as it is elsewhere; where nobody can read it, nothing."""
    with suppress(OSError):  # a terminal or a pipe that is gone: the exit code still tells
        _print_styled(text)


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """Leave it an OSError; rich would end the process, with a code of its own and stdout closed."""
        raise  # called where a BrokenPipeError is being handled


def _print_styled(text: str) -> None:
    console = _Stderr(stderr=True, highlight=False)
    for line in text.splitlines():
        word, style = _leading_style(line)
        styled = Text(line)
        if style:
            start = line.index(word)
            styled.stylize(style, start, start + len(word))
        elif line.lstrip(" |").startswith("^"):
            styled.stylize("bold red", line.index("^"))
        # A terminal wraps prose at words; what is copied or shows a source line stays one line.
        console.print(styled, soft_wrap=not (console.is_terminal and word.endswith(":")))


def _leading_style(line: str) -> tuple[str, str]:
    word = line.split(maxsplit=1)[0] if line.strip() else ""
    return word, _STYLES.get(word, "")


def report_error(error: MtlBalanceError, *, as_json: bool) -> None:
    """Print what went wrong; with ``as_json`` as a JSON document on stdout as well."""
    text = str(error)
    print_stderr(text if text.startswith("error:") else f"error: {text}")
    if as_json:
        problems = [problem.to_dict() for problem in getattr(error, "problems", [])]
        document: dict[str, Any] = {
            "type": type(error).__name__,
            "message": text,
            "exit_code": error.exit_code,
        }
        print_json({"error": document | ({"problems": problems} if problems else {})})


def report_usage_error(message: str, command: str, *, as_json: bool) -> None:
    """Print what is wrong with a command line."""
    print_stderr(f"error: {message}\nhelp: see '{command} --help'")
    if as_json:
        print_json({"error": {"type": "UsageError", "message": message, "exit_code": 2}})


def report_stop(message: str, code: int, *, as_json: bool) -> None:
    """Say that a command was stopped from outside."""
    print_stderr(message)
    if as_json:
        print(stop_document(message, code))


def report_internal_error(error: BaseException, *, as_json: bool) -> None:
    """Print a fault of mtlbalance or of a plugin: one line, then the traceback for whoever mends it."""
    line = f"internal error: {type(error).__name__}: {error}"
    with suppress(OSError):
        print("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    print_stderr(f"error: {line}\nhelp: this is a fault in mtlbalance or in a plugin; the traceback is above")
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": line, "exit_code": 1}})


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show mtlbalance's own warnings as a line for the user, and others as Python does."""
    with warnings.catch_warnings():
        as_python_does = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if file is None and (issubclass(category, PluginWarning) or filename.startswith(_PACKAGE)):
                print_stderr(f"warning: {message}")
            else:
                as_python_does(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.filterwarnings("default", category=PluginWarning)  # also under -W error: never a crash
        yield
