"""A study as tables: each level's figures, its rank, and its paired differences to a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from mtlbalance.errors import did_you_mean
from mtlbalance.reports.runs import FinishedRun
from mtlbalance.reports.statistics import (
    LEVEL,
    PairedDifference,
    Summary,
    holm,
    mean_ranks,
    paired_difference,
    pairs_needed,
    smallest_p,
    summarise,
)
from mtlbalance.reports.study import ReportError, Study

Mode: TypeAlias = Literal["min", "max"]

_KNOWN_MODES: dict[str, Mode] = {
    "rmse": "min", "mae": "min", "r2": "max", "accuracy": "max", "f1": "max",
}  # fmt: skip
ALL = "all together"
_FEW_PAIRS = 10


@dataclass(frozen=True)
class Figure:
    """A level's values of the metric in a stratum, by replicate, and their summary."""

    stratum: str
    level: str
    values: dict[str, float]
    summary: Summary


@dataclass(frozen=True)
class Difference:
    """A level minus the baseline, over the pairs of a stratum or of all strata together.

    ``p_holm`` is corrected for all differences of the same kind in the report: those within strata are one
    family, those over all strata another.
    """

    stratum: str
    level: str
    paired: PairedDifference
    p_holm: float | None


@dataclass
class MetricReport:
    """All that is said of one metric."""

    metric: str
    mode: Mode | None
    figures: list[Figure]
    mean_ranks: dict[str, float]
    num_ranked: int
    differences: list[Difference]
    sentences: list[str] = field(default_factory=list)


@dataclass
class Report:
    """A report on a study."""

    name: str
    compared: str
    baseline: str
    levels: list[str]
    strata: list[str]
    num_runs: int
    metrics: list[MetricReport]
    notices: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def make_report(study: Study, metrics: Sequence[str] = (), baseline: str | None = None) -> Report:
    """Compare the levels of a study.

    Args:
        study: finished runs in their cells.
        metrics: such as ``rmse_last`` or ``nasa_score:min`` (which values are good); default: the key metric.
        baseline: the level that the others are compared with; default: the first.

    Raises:
        ReportError: there is no such level or metric.
    """
    if baseline is None:
        baseline = study.levels[0]
    elif baseline not in study.levels:
        raise ReportError(
            f"there is no {study.compared} {baseline!r}{did_you_mean(baseline, study.levels)}; "
            f"there are {', '.join(study.levels)}"
        )
    runs = list(study.runs.values())
    # Of one run there is nothing to compare, so everything is shown.
    wanted = list(metrics) or (sorted(runs[0].metrics) if len(runs) == 1 else [_key_metric(runs)])
    return Report(
        name=study.name,
        compared=study.compared,
        baseline=baseline,
        levels=study.levels,
        strata=study.strata,
        num_runs=len(runs),
        metrics=[_metric_report(study, *_metric_and_mode(study, text), baseline) for text in wanted],
        notices=study.notices,
    )


def _key_metric(runs: Sequence[FinishedRun]) -> str:
    return str(runs[0].results.get("key_metric") or next(iter(runs[0].metrics)))


def _metric_and_mode(study: Study, text: str) -> tuple[str, Mode | None]:
    metric, colon, said = text.partition(":")
    runs = study.runs.values()
    known = sorted({name for run in runs for name in run.metrics})
    if metric not in known and any(metric in run.recorded for run in runs):
        raise ReportError(f"{metric!r} is a finite number in no run; there are {', '.join(known)}")
    if metric not in known:
        raise ReportError(
            f"no run has a metric {metric!r}{did_you_mean(metric, known)}; there are {', '.join(known)}"
        )
    if colon and said not in ("min", "max"):
        raise ReportError(f"{text!r}: after the colon comes min or max, whichever values are good")
    if said:
        return metric, "min" if said == "min" else "max"
    for run in runs:
        if run.results.get("key_metric") == metric.removeprefix("validation_"):
            return metric, "max" if run.results.get("key_metric_mode") == "max" else "min"
    return metric, _KNOWN_MODES.get(metric.rpartition("_")[2])


def _metric_report(study: Study, metric: str, mode: Mode | None, baseline: str) -> MetricReport:
    values = {
        (stratum, level): {
            replicate: run.metrics[metric]
            for replicate, run in study.replicates(stratum, level).items()
            if metric in run.metrics
        }
        for stratum in study.strata
        for level in study.levels
    }
    figures = [
        Figure(stratum, level, found, summarise(list(found.values())))
        for (stratum, level), found in values.items()
        if found
    ]
    blocks = [
        {
            level: values[stratum, level][replicate]
            for level in study.levels
            if replicate in values[stratum, level]
        }
        for stratum in study.strata
        for replicate in values[stratum, baseline]
    ]
    ranks, num_ranked = mean_ranks(blocks, study.levels, mode) if mode else ({}, 0)
    report = MetricReport(metric, mode, figures, ranks, num_ranked, _differences(study, values, baseline))
    report.sentences = [*_left_out(study, metric), *_sentences(study, report, baseline)]
    return report


def _differences(
    study: Study, values: dict[tuple[str, str], dict[str, float]], baseline: str
) -> list[Difference]:
    pairs = {
        (stratum, level): [
            values[stratum, level][replicate] - at_baseline
            for replicate, at_baseline in values[stratum, baseline].items()
            if replicate in values[stratum, level]
        ]
        for stratum in study.strata
        for level in study.levels
        if level != baseline
    }
    within = _family(pairs)
    if len(study.strata) < 2:
        return within
    together = {
        (ALL, level): [value for stratum in study.strata for value in pairs[stratum, level]]
        for level in study.levels
        if level != baseline
    }
    return within + _family(together)


def _family(pairs: dict[tuple[str, str], list[float]]) -> list[Difference]:
    found = {cell: paired_difference(values) for cell, values in pairs.items() if values}
    tested = [cell for cell, paired in found.items() if paired.p_value is not None]
    corrected = dict(zip(tested, holm([found[cell].p_value or 0.0 for cell in tested]), strict=True))
    return [Difference(*cell, paired, corrected.get(cell)) for cell, paired in found.items()]


def _left_out(study: Study, metric: str) -> list[str]:
    """Say so if runs have no such number: a mean without those that diverged looks better than the method is."""
    cells = [cell for cell, run in study.runs.items() if metric not in run.metrics]
    if not cells:
        return []
    names = [", ".join(filter(None, (cell.stratum, cell.level, cell.replicate))) for cell in cells]
    shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"{len(cells)} of {len(study.runs)} finished runs have no finite {metric}, and are in none of its figures, "
        f"which may look better for it: {shown}."
    ]


def _unpaired(study: Study, report: MetricReport, baseline: str) -> list[str]:
    """Say so where there is nothing to compare, or to rank."""
    present = {(item.stratum, item.level) for item in report.figures}
    compared = {(item.stratum, item.level) for item in report.differences}
    sentences = []
    if not any(level == baseline for _, level in present):
        sentences.append(
            f"No run of {baseline} has {report.metric}, so nothing is compared with it; --baseline names another."
        )
    else:
        lacking = [
            f"{level}{' on ' + stratum if stratum else ''}"
            for stratum, level in sorted(present - compared)
            if level != baseline
        ]
        if lacking:
            sentences.append(
                f"Not compared with {baseline}, for want of a run on the same data with the same seed: "
                f"{', '.join(lacking)}."
            )
    if report.mode is not None and len(study.levels) > 1 and not report.num_ranked:
        sentences.append(f"No data and seed has a run of every {study.compared}, so there are no ranks.")
    return sentences


def _sentences(study: Study, report: MetricReport, baseline: str) -> list[str]:
    """Say in words what the numbers cannot bear."""
    sentences = _unpaired(study, report, baseline)
    if report.mode is None and len(study.levels) > 1:
        sentences.append(
            f"Whether small or large values of {report.metric} are good is not known, so there are no ranks; "
            f"ask for {report.metric}:min or {report.metric}:max."
        )
    if all(figure.summary.n == 1 for figure in report.figures):
        sentences.append("One run each says nothing about spread: run more seeds before comparing.")
    for name in dict.fromkeys(["within", ALL] if len(study.strata) > 1 else ["within"]):
        family = [item for item in report.differences if (item.stratum == ALL) == (name == ALL)]
        tested = [item for item in family if item.p_holm is not None]
        if tested:
            sentences += _too_small(tested, over_all=name == ALL)
    if any(1 < item.paired.n < _FEW_PAIRS for item in report.differences):
        sentences.append(
            "Bootstrap intervals from few pairs are too narrow: of 95 % intervals from 5 normal differences "
            "about 84 % hold the true mean, from 10 about 90 %."
        )
    return sentences


def _too_small(tested: Sequence[Difference], *, over_all: bool) -> list[str]:
    """Say so if no difference, however large, could have been significant."""
    n, family = max(item.paired.n for item in tested), len(tested)
    of_what = "Over everything together, " if over_all else ""
    best = smallest_p(n)
    also = f", {pairs_needed(family)} for the {family} of this table" if family > 1 else ""
    if best > LEVEL:
        return [
            f"{of_what}{n} paired runs cannot give a p-value below {_number(best)} (2 / 2^{n}), so no difference "
            f"can be significant at {LEVEL:g}, however large: at least {pairs_needed()} pairs are needed for one "
            f"comparison{also}."
        ]
    if best * family > LEVEL:
        return [
            f"{of_what}corrected for {family} comparisons, {n} paired runs cannot give a p-value below "
            f"{_number(min(1.0, best * family))}: {pairs_needed(family)} pairs are needed."
        ]
    return []


def _number(value: float) -> str:
    return f"{value:.4g}"
