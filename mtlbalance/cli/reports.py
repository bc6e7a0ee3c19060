"""``mtlbalance report`` and ``mtlbalance sweep report``: what finished runs come to."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from mtlbalance.cli.configs import JsonOption
from mtlbalance.cli.output import print_json, stdout_console

if TYPE_CHECKING:
    from mtlbalance.reports import Report


class Format(StrEnum):
    """How a report is printed."""

    TEXT = "text"
    MARKDOWN = "markdown"
    CSV = "csv"


MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="A metric, such as rmse_last, or nasa_score:min to say which values are good. May be repeated.",
        show_default="the key metric",
    ),
]
BaselineOption = Annotated[
    str | None, typer.Option(help="What the others are compared with.", show_default="the first")
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print it.")]


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or folders above them.", show_default=False),
    ],
    metric: MetricOption = None,
    baseline: BaselineOption = None,
    form: FormatOption = Format.TEXT,
    as_json: JsonOption = False,
) -> None:
    """Compare finished runs from anywhere: what differs in their configs tells them apart."""
    from mtlbalance.reports import make_report, study_of_runs

    print_report(make_report(study_of_runs(runs), metric or [], baseline), form, as_json=as_json)


def sweep_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder.", show_default=False)],
    metric: MetricOption = None,
    baseline: BaselineOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="The axis whose points are compared.", show_default="the one that varies the balancer"
        ),
    ] = None,
    form: FormatOption = Format.TEXT,
    as_json: JsonOption = False,
) -> None:
    """Compare a sweep's finished runs: spread, ranks, and paired differences with exact tests."""
    from mtlbalance.reports import make_report, study_of_sweep
    from mtlbalance.sweeps.plan import read_plan

    study = study_of_sweep(read_plan(folder), compare)
    print_report(make_report(study, metric or [], baseline), form, as_json=as_json)


def print_report(report: Report, form: Format, *, as_json: bool) -> None:
    """Print a report on stdout."""
    from mtlbalance.reports.rendering import sentences_of, tables_of, to_csv, to_markdown

    if as_json:
        print_json(report.to_dict())
    elif form is Format.CSV:
        print(to_csv(report), end="")
    elif form is Format.MARKDOWN:
        print(to_markdown(report), end="")
    else:
        console = stdout_console()
        console.print(f"{report.name}: {report.num_runs} runs", markup=False, style="bold", soft_wrap=True)
        for found in tables_of(report):
            table = Table(title=Text(found.title), title_justify="left", title_style="")
            for index, heading in enumerate(found.headings):
                is_name = index < found.num_names
                table.add_column(Text(heading), justify="left" if is_name else "right", overflow="fold")
            for row in found.rows:
                table.add_row(*map(Text, row))
            console.print(table)
        for sentence in sentences_of(report):
            console.print(f"- {sentence}", markup=False)
