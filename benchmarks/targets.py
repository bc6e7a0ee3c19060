"""What balancing may cost, and whether the figures of a results folder keep to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from figures import OURS, Figures, Row, by_process, own_methods, pick
from measuring import Ratio, pooled_ratio

_EVERY_FORM = "every 10th step"
_EXACT = {2: 1.50, 4: 2.1, 8: 2.7, 16: 3.3}
_EVERY = {2: 1.08, 4: 1.10, 8: 1.18, 16: 1.22}
_STUDY = {"": 1.60, _EVERY_FORM: 1.08, "features": 1.03}
_SOLVERS = ("pcgrad", "mgda", "cagrad", "nash-mtl", "fairgrad", "upgrad", "aligned-mtl")
_LOSS_READING = ("fixed", "uncertainty", "dwa", "rlw", "famo")


@dataclass(frozen=True)
class Outcome:
    """A target and what was measured, where; ``least`` where the figure should be no smaller."""

    what: str
    where: str
    bound: float
    ratio: Ratio
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether the median keeps to it."""
        return self.ratio.median >= self.bound if self.least else self.ratio.median <= self.bound


def outcomes(figures: Figures) -> Iterator[Outcome]:
    """Yield the targets that were measured."""
    for result in figures.workloads("steps_study"):
        yield from _gaba(result)
    for result in figures.finest("steps_solvers"):
        yield from _gaba(result)
        yield from _solvers(result)
    for result in figures.finest("steps_losses"):
        for method in _LOSS_READING:
            yield from _of(result, method, "", 1.02)
    for result in figures.workloads("steps_models"):
        yield from _gaba(result)
    if "import_time" in figures:
        ratio = figures["import_time"]["ratios"]["from mtlbalance import GABALoss"]
        yield Outcome("`from mtlbalance import GABALoss` to `import torch`", "", 1.05, Ratio(**ratio))
    runs = (*figures.finest("end_to_end_speed", "end_to_end"), *figures.workloads("end_to_end_study"))
    for result in runs:
        what = "speed of `mtlbalance run` to the bare loop's"
        speed = Ratio(**result["speed"]["mtlbalance run"])
        yield Outcome(what, f"{result['family']} run", 0.97, speed, least=True)


def gaba_bounds(result: Row) -> dict[str, float]:
    """Return what GABA may cost on a workload, by its form; nothing where there is no target."""
    count = int(result["tasks"])
    if result["family"] == "study":
        return _STUDY
    if result["family"] == "wide" and result["batch_size"] <= 64:
        return {"": 1.5}
    if result["family"] == "mlp-heads" and count in _EXACT:
        return {"": _EXACT[count], _EVERY_FORM: _EVERY[count], "features": 1.15}
    return {}


def _gaba(result: Row) -> Iterator[Outcome]:
    for form, bound in gaba_bounds(result).items():
        yield from _of(result, "gaba", form, bound)


def _of(result: Row, method: str, form: str, bound: float) -> Iterator[Outcome]:
    row = pick(result, OURS, method, form)
    if row:
        name = method + (f", {form}" if form else "")
        yield Outcome(name, short_name(result), bound, Ratio(**row["ratio"]))


def _solvers(result: Row) -> Iterator[Outcome]:
    gaba = pick(result, OURS, "gaba")
    for method in _SOLVERS:
        row = pick(result, OURS, method)
        if row and gaba and method in own_methods(result):
            ratio = pooled_ratio(by_process(row), by_process(gaba))
            yield Outcome(f"{method} to exact gaba", short_name(result), 1.1, ratio)


def short_name(result: Row) -> str:
    """Return a workload's name for a narrow column."""
    if result["family"] == "wide":
        return f"wide, batch {result['batch_size']}"
    return f"{result['family'].removesuffix('-heads')}, K = {result['tasks']}"
