"""The commands of ``mtlbalance``, and how every kind of end becomes an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mtlbalance import __version__
from mtlbalance.cli import configs, inference, plugins, reports, run, sweeps
from mtlbalance.cli.output import (
    plain_warnings,
    report_error,
    report_internal_error,
    report_stop,
    report_usage_error,
)
from mtlbalance.cli.stops import INTERRUPTED, PREEMPTED, stop_message
from mtlbalance.errors import MtlBalanceError

# Typer brings its own copy of click in some versions and depends on click in others.
_UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="mtlbalance",
    help="Train several tasks at once without one of them drowning the others.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("validate")(configs.validate)
app.command("report")(reports.report)
app.command("predict")(inference.predict)
app.command("export")(inference.export)
app.add_typer(configs.app, name="config")
app.add_typer(plugins.app, name="plugins")
sweeps.app.command("report")(reports.sweep_report)
app.add_typer(sweeps.app, name="sweep")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mtlbalance {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Train several tasks at once without one of them drowning the others."""


def execute(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; nothing is raised and the process is not left."""
    arguments = list(arguments)
    as_json = "--json" in arguments
    with plain_warnings():
        try:
            code = app(arguments, prog_name="mtlbalance", standalone_mode=False)
            sys.stdout.flush()  # here, where a closed pipe is no surprise
            return _left(code if isinstance(code, int) else 0, arguments)
        except MtlBalanceError as error:
            report_error(error, as_json=as_json)
            return error.exit_code
        except (KeyboardInterrupt, typer.Abort):
            return _left(INTERRUPTED, arguments)
        except BrokenPipeError:  # whoever read stdout has seen enough, as in `mtlbalance ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
            return _left(code, arguments)
        except Exception as error:
            if isinstance(error, _UsageError):
                context = getattr(error, "ctx", None)
                command = context.command_path if context else "mtlbalance"
                message = error.format_message()  # type: ignore[attr-defined]
                if not message:  # a bare group of commands: its help has been printed
                    return 2
                report_usage_error(message, command, as_json=as_json)
                return 2
            report_internal_error(error, as_json=as_json)
            return 1


def _left(code: int, arguments: Sequence[str]) -> int:
    """Say so when a command was stopped from outside; return ``code``."""
    if code in (INTERRUPTED, PREEMPTED):
        report_stop(stop_message(code, arguments), code, as_json="--json" in arguments)
    return code
