"""What the study and the literature report, and when a run may stand beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtlbalance.errors import MtlBalanceError

from .config import STUDY_RUL_CAP, SUBSETS, Subset
from .differences import AMNL_ROW, BASELINE, differences_from_study


class ComparisonError(MtlBalanceError):
    """A result must not stand beside published figures."""


@dataclass(frozen=True)
class Published:
    """A published figure: mean and sample standard deviation over seeds, where given."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A run beside what is published.

    Args:
        subset: for example ``"FD002"``.
        method: the balancer's full name, such as ``GABA`` or ``AMNL(normalised)``.
        measured: ``rmse_last`` and ``nasa_score`` of the run.
        published: the study's figures for the same form of the method, by metric; empty where it gives none.
        literature: the best figures published by others, by metric.
        differences: what is not alike, in sentences.
    """

    subset: str
    method: str
    measured: Mapping[str, float]
    published: Mapping[str, Published]
    literature: Mapping[str, Published]
    differences: tuple[str, ...]


# Five seeds each, labels capped at 125, the best epoch picked on the test set. Only figures that the
# study prints; where it prints none there is none here. A row is a balancer's name in configs, and of
# balancers with several forms the full name.
STUDY_RMSE_LAST: Mapping[tuple[str, Subset], Published] = {
    (BASELINE, "FD001"): Published(10.08, 1.71),
    ("dwa", "FD001"): Published(10.58, 1.66),
    ("gradnorm", "FD001"): Published(9.38, 1.53),
    ("uncertainty", "FD001"): Published(9.15, 0.42),
    (AMNL_ROW, "FD001"): Published(10.43, 1.94),
    ("gaba", "FD001"): Published(9.63, 1.90),
    ("grace", "FD001"): Published(9.14, 1.39),
    ("gradnorm", "FD002"): Published(8.19, 0.78),
    (AMNL_ROW, "FD002"): Published(6.74, 0.91),
    ("gaba", "FD002"): Published(7.53, 0.65),
    ("grace", "FD002"): Published(7.72),
    (BASELINE, "FD003"): Published(11.53),
    (AMNL_ROW, "FD003"): Published(9.51, 1.74),
    ("grace", "FD003"): Published(13.12),
    (AMNL_ROW, "FD004"): Published(8.16, 2.17),
}
STUDY_NASA_SCORE: Mapping[tuple[str, Subset], Published] = {
    (BASELINE, "FD001"): Published(143.2, 48.4),
    ("dwa", "FD001"): Published(146.1, 40.3),
    ("gradnorm", "FD001"): Published(127.6, 44.3),
    ("uncertainty", "FD001"): Published(115.4, 4.7),
    (AMNL_ROW, "FD001"): Published(434.4, 239.8),
    ("gaba", "FD001"): Published(130.4, 41.8),
    ("grace", "FD001"): Published(121.4, 36.8),
    (BASELINE, "FD002"): Published(224.5),
    ("dwa", "FD002"): Published(234.4),
    ("gradnorm", "FD002"): Published(260.9, 36.1),
    ("uncertainty", "FD002"): Published(224.4),
    ("gaba", "FD002"): Published(224.2, 22.4),
    ("grace", "FD002"): Published(223.4),
}
# DKAMFormer, the best figures of others that the study cites.
LITERATURE_RMSE_LAST: Mapping[Subset, Published] = {
    "FD001": Published(10.68),
    "FD002": Published(10.70),
    "FD003": Published(10.52),
    "FD004": Published(12.89),
}
LITERATURE_NASA_SCORE: Mapping[Subset, Published] = {"FD002": Published(498.0)}


def compare_with_published(results: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Comparison:
    """Put a run beside the study's figures for the same subset and form of the method.

    Args:
        results: the content of a run's ``results.json``.
        config: the content of its ``config.resolved.toml``; without it, options are not compared.

    Raises:
        ComparisonError: the run is on simulated or altered data, its test labels are not the study's, or
            its protocol leaks, so that the figures would mislead; or it is not a C-MAPSS run at all.
    """
    facts = _facts_of(results)
    if results.get("data_source") != "nasa":
        raise ComparisonError(
            "this run was made on a simulated fleet; it says nothing about NASA's engines and must not be "
            "compared with published figures. Run it again with NASA's files (dataset.source = 'nasa')"
        )
    if not facts.get("official_files"):
        raise ComparisonError(
            "this run read files that differ from NASA's (SHA256), so it is not comparable with published "
            "figures; `mtlbalance-cmapss verify` names the files"
        )
    if not facts.get("cap_test_labels") or facts.get("rul_cap") != STUDY_RUL_CAP:
        raise ComparisonError(
            f"published figures are for test labels capped at {STUDY_RUL_CAP:g} cycles, but this run has "
            f"cap_test_labels = {str(bool(facts.get('cap_test_labels'))).lower()} and rul_cap = "
            f"{facts.get('rul_cap')}; a perfect predictor limited to 125 has an RMSE of 18.3 on uncapped FD002"
        )
    if "window-split" in (results.get("protocol"), facts.get("protocol")):
        raise ComparisonError(
            "protocol = 'window-split' is a demonstration of a leak, not a result to compare"
        )
    subset, method = facts["subset"], str(results.get("method"))
    name = str(results.get("method_name", method))
    row = name if method in ("amnl", "fixed") else method
    return Comparison(
        subset=subset,
        method=name,
        measured={metric: _measured(results, metric) for metric in ("rmse_last", "nasa_score")},
        published=_figures(STUDY_RMSE_LAST.get((row, subset)), STUDY_NASA_SCORE.get((row, subset))),
        literature=_figures(LITERATURE_RMSE_LAST.get(subset), LITERATURE_NASA_SCORE.get(subset)),
        differences=differences_from_study(results, config),
    )


def _facts_of(results: object) -> Mapping[str, Any]:
    if isinstance(results, Mapping) and results.get("dataset") == "cmapss":
        facts = results.get("facts")
        if isinstance(facts, Mapping) and facts.get("subset") in SUBSETS:
            return facts
    raise ComparisonError("these are not the results of a run on the dataset 'cmapss'")


def _measured(results: Mapping[str, Any], metric: str) -> float:
    metrics = results.get("metrics")
    value = metrics.get(metric) if isinstance(metrics, Mapping) else None
    if not isinstance(value, int | float):
        raise ComparisonError(f"the run has no number for {metric!r} among its metrics")
    return float(value)


def _figures(rmse_last: Published | None, nasa_score: Published | None) -> dict[str, Published]:
    figures = {"rmse_last": rmse_last, "nasa_score": nasa_score}
    return {name: figure for name, figure in figures.items() if figure is not None}
