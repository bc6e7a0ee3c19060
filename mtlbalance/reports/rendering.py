"""A report as tables of text, as Markdown, or as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from mtlbalance.reports.comparison import Difference, MetricReport, Report
from mtlbalance.reports.statistics import CONFIDENCE, Summary


@dataclass(frozen=True)
class TextTable:
    """A table: a title, a heading for every column, rows of text; the first columns are names."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    num_names: int = 1


def tables_of(report: Report) -> list[TextTable]:
    """Return the tables of a report: for each metric its figures, then its differences."""
    tables = []
    for metric in report.metrics:
        tables.append(_figures(report, metric))
        if metric.differences:
            tables.append(_differences(report, metric))
    return tables


def sentences_of(report: Report) -> list[str]:
    """Return everything that a report says in words, each once."""
    return list(
        dict.fromkeys([*report.notices, *(text for item in report.metrics for text in item.sentences)])
    )


def to_markdown(report: Report) -> str:
    """Return a report as Markdown."""
    lines = [f"# {report.name}", ""]
    for table in tables_of(report):
        align = ["---"] * table.num_names + ["---:"] * (len(table.headings) - table.num_names)
        lines += [f"**{table.title}**", "", _row(table.headings), f"|{'|'.join(align)}|"]
        lines += [*map(_row, table.rows), ""]
    lines += [f"- {text}" for text in sentences_of(report)]
    return "\n".join(lines).rstrip() + "\n"


def to_csv(report: Report) -> str:
    """Return a line for every metric, stratum and level, all numbers in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    statistics = ["n", "mean", "std", "mean_rank"]
    comparison = ["baseline", "n_pairs", "difference", "low", "high", "p_value", "exact", "p_holm"]
    writer.writerow(["metric", "stratum", report.compared, *statistics, *comparison])
    for metric in report.metrics:
        differences = {(item.stratum, item.level): item for item in metric.differences}
        for figure in metric.figures:
            summary = figure.summary
            rank = metric.mean_ranks.get(figure.level)
            found = differences.pop((figure.stratum, figure.level), None)
            writer.writerow(
                [
                    *(metric.metric, figure.stratum, figure.level),
                    *(summary.n, summary.mean, summary.std, rank),
                    *_comparison(report, found),
                ]
            )
        for (stratum, level), found in differences.items():  # those over all strata together
            writer.writerow([metric.metric, stratum, level, *[None] * 4, *_comparison(report, found)])
    return buffer.getvalue()


def _comparison(report: Report, found: Difference | None) -> list[object]:
    if found is None:
        return [None] * 8
    paired = found.paired
    return [
        report.baseline, paired.n, paired.mean, paired.low, paired.high, paired.p_value, paired.exact,
        found.p_holm,
    ]  # fmt: skip


def _figures(report: Report, metric: MetricReport) -> TextTable:
    """Levels down, strata across: mean ± sample standard deviation (n)."""
    figures = {(item.stratum, item.level): item.summary for item in metric.figures}
    headings = [report.compared, *(stratum or metric.metric for stratum in report.strata)]
    if metric.mean_ranks:
        headings.append("mean rank")
    rows = []
    for level in report.levels:
        row = [level, *(_mean_and_std(figures.get((stratum, level))) for stratum in report.strata)]
        if metric.mean_ranks:
            row.append(f"{metric.mean_ranks[level]:.2f}")
        rows.append(row)
    good = {"min": ", small is good", "max": ", large is good", None: ""}[metric.mode]
    ranked = f"; ranks over {metric.num_ranked} blocks" if metric.mean_ranks else ""
    return TextTable(f"{metric.metric}{good}: mean ± sample std (n){ranked}", headings, rows)


def _differences(report: Report, metric: MetricReport) -> TextTable:
    several = len(report.strata) > 1
    headings = [
        *(["where"] if several else []), report.compared, "pairs", "difference",
        f"{CONFIDENCE:.0%} interval", "p", "p (Holm)",
    ]  # fmt: skip
    rows = []
    for item in metric.differences:
        paired = item.paired
        interval = "-" if paired.low is None else f"{signed(paired.low)} to {signed(paired.high)}"
        names = [item.stratum, item.level] if several else [item.level]
        sampled = "" if paired.exact or paired.p_value is None else " (sampled)"
        rows.append(
            [
                *names,
                *(str(paired.n), signed(paired.mean), interval),
                *(_p_value(paired.p_value) + sampled, _p_value(item.p_holm)),
            ]
        )
    title = (
        f"{metric.metric} minus that of {report.baseline}, paired; sign-flip permutation test, Holm-corrected"
    )
    return TextTable(title, headings, rows, num_names=2 if several else 1)


def _mean_and_std(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    if summary.std is None:
        return f"{number(summary.mean)} (1)"
    return f"{number(summary.mean)} ± {number(summary.std)} ({summary.n})"


def number(value: float) -> str:
    """Return a figure with four significant digits, and no exponent where it can be read without.

    >>> number(7.5333), number(1792.4), number(0.00001234)
    ('7.533', '1792', '1.234e-05')
    """
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def signed(value: float | None) -> str:
    """Return a difference with its sign.

    >>> signed(0.5), signed(-0.5), signed(None)
    ('+0.5', '-0.5', '-')
    """
    return "-" if value is None else ("+" if value > 0 else "") + number(value)


def _p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
