"""What the study and the literature report, and when a run may stand beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtlbalance.errors import MtlBalanceError

from .config import Subset

STUDY_RUL_CAP = 125.0


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
        method: the balancer's name in configs.
        measured: ``rmse_last`` and ``nasa_score`` of the run.
        published: the study's figures for the same method, by metric; empty where it gives none.
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
# study prints; where it prints none there is none here. `fixed` is its 0.5 / 0.5 baseline.
STUDY_RMSE_LAST: Mapping[tuple[str, Subset], Published] = {
    ("fixed", "FD001"): Published(10.08, 1.71),
    ("dwa", "FD001"): Published(10.58, 1.66),
    ("gradnorm", "FD001"): Published(9.38, 1.53),
    ("uncertainty", "FD001"): Published(9.15, 0.42),
    ("amnl", "FD001"): Published(10.43, 1.94),
    ("gaba", "FD001"): Published(9.63, 1.90),
    ("grace", "FD001"): Published(9.14, 1.39),
    ("gradnorm", "FD002"): Published(8.19, 0.78),
    ("amnl", "FD002"): Published(6.74, 0.91),
    ("gaba", "FD002"): Published(7.53, 0.65),
    ("grace", "FD002"): Published(7.72),
    ("fixed", "FD003"): Published(11.53),
    ("amnl", "FD003"): Published(9.51, 1.74),
    ("grace", "FD003"): Published(13.12),
    ("amnl", "FD004"): Published(8.16, 2.17),
}
STUDY_NASA_SCORE: Mapping[tuple[str, Subset], Published] = {
    ("fixed", "FD001"): Published(143.2, 48.4),
    ("dwa", "FD001"): Published(146.1, 40.3),
    ("gradnorm", "FD001"): Published(127.6, 44.3),
    ("uncertainty", "FD001"): Published(115.4, 4.7),
    ("amnl", "FD001"): Published(434.4, 239.8),
    ("gaba", "FD001"): Published(130.4, 41.8),
    ("grace", "FD001"): Published(121.4, 36.8),
    ("fixed", "FD002"): Published(224.5),
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


def compare_with_published(results: Mapping[str, Any]) -> Comparison:
    """Put a run beside the study's figures for the same subset and method.

    Args:
        results: the content of a run's ``results.json``.

    Raises:
        ComparisonError: the run is on simulated or altered data, or its test labels are not the
            study's, so that the figures would mislead; or it is not a C-MAPSS run at all.
    """
    facts = results.get("facts", {})
    if results.get("dataset") != "cmapss" or "subset" not in facts:
        raise ComparisonError("these are not the results of a run on the dataset 'cmapss'")
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
    protocol = results.get("protocol")
    if protocol == "window-split":
        raise ComparisonError(
            "protocol = 'window-split' is a demonstration of a leak, not a result to compare"
        )
    subset, method = facts["subset"], str(results.get("method"))
    return Comparison(
        subset=subset,
        method=method,
        measured={name: float(results["metrics"][name]) for name in ("rmse_last", "nasa_score")},
        published=_figures(STUDY_RMSE_LAST.get((method, subset)), STUDY_NASA_SCORE.get((method, subset))),
        literature=_figures(LITERATURE_RMSE_LAST.get(subset), LITERATURE_NASA_SCORE.get(subset)),
        differences=_differences(results, facts),
    )


def _figures(rmse_last: Published | None, nasa_score: Published | None) -> dict[str, Published]:
    figures = {"rmse_last": rmse_last, "nasa_score": nasa_score}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _differences(results: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, ...]:
    differences = ["This is one run; the study's figures are means over five seeds."]
    if results.get("protocol") == "honest":
        differences.append(
            "The study picks its best epoch on the test set. This run picked it on held-out training engines "
            f"({facts.get('validation_engines')} of them) and trained on fewer, so it is a stricter figure."
        )
    if facts.get("pad") != "all":
        differences.append("The study pads every row (pad = 'all'); this run pads short engines only.")
    name = str(results.get("method_name", ""))
    if results.get("method") == "fixed" and name.startswith("Fixed(") and name != "Fixed(0.50/0.50)":
        differences.append(f"The study's baseline has weights 0.50/0.50; this run has {name}.")
    return tuple(differences)
