"""How runs are laid out for a comparison: what is compared, on what, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mtlbalance.config.run_config import FREE_KEYS
from mtlbalance.errors import MtlBalanceError, RunFolderError, did_you_mean
from mtlbalance.reports.runs import FinishedRun, find_runs, read_run
from mtlbalance.sweeps.folder_state import FolderState, folder_states
from mtlbalance.sweeps.plan import Plan, PlannedAxis, PlannedRun

_TRAINED = ("backbone.", "training.")


class ReportError(MtlBalanceError):
    """A report cannot be made as asked."""


@dataclass(frozen=True)
class Cell:
    """Where a run stands: a stratum (a data set, say), a level (a method), a replicate (a seed)."""

    stratum: str
    level: str
    replicate: str


@dataclass
class Study:
    """Runs in their cells.

    Args:
        name: of the sweep, or of the runs' folders.
        compared: what the levels are, such as ``method``.
        levels: in order; the first is the baseline unless another is asked for.
        strata: in order; one empty name where there is nothing to tell apart.
        runs: by cell.
        notices: what the reader must know, in sentences.
    """

    name: str
    compared: str
    levels: list[str]
    strata: list[str]
    runs: dict[Cell, FinishedRun] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def replicates(self, stratum: str, level: str) -> dict[str, FinishedRun]:
        """Return the runs of a level in a stratum, by replicate."""
        return {
            cell.replicate: run
            for cell, run in self.runs.items()
            if (cell.stratum, cell.level) == (stratum, level)
        }


def study_of_sweep(plan: Plan, compare: str | None = None) -> Study:
    """Lay out a sweep's finished runs along its axes.

    Args:
        plan: the sweep's.
        compare: the axis whose points are compared; default: the one that varies the balancer.

    Raises:
        ReportError: there is no such axis, or no finished run.
    """
    axis = _compared_axis(plan, compare)
    others = [item for item in plan.axes if item is not axis and not item.is_replication]
    seeds = [item for item in plan.axes if item.is_replication and item is not axis]

    def cell(run: PlannedRun) -> Cell:
        return Cell(
            stratum=", ".join(_shown(item.name, run.coordinates[item.name]) for item in others),
            level=run.coordinates[axis.name] if axis else plan.name,
            replicate=", ".join(run.coordinates[item.name] for item in seeds),
        )

    states = folder_states(plan)
    cells = {run.id: cell(run) for run in plan.runs}
    study = Study(
        name=plan.name,
        compared=axis.name if axis else "sweep",
        levels=list(dict.fromkeys(found.level for found in cells.values())),
        strata=list(dict.fromkeys(found.stratum for found in cells.values())),
    )
    study.runs = {
        cells[run_id]: read_run(plan.folder_of(run_id))
        for run_id, state in states.items()
        if state is FolderState.FINISHED
    }
    missing = [run_id for run_id, state in states.items() if state is not FolderState.FINISHED]
    checked = _checked(study, missing)
    checked.notices += _special_cases(checked, plan)
    return checked


def study_of_runs(paths: Sequence[Path]) -> Study:
    """Lay out runs from anywhere by what differs in their configs.

    Runs that differ in ``[dataset]`` are different strata; in balancer, backbone or training, different
    levels; in the seed, replicates.
    """
    runs, unfinished = find_runs(paths)
    levels = _level_names(runs)
    strata = _stratum_names(runs)
    study = Study(
        name=", ".join(str(path) for path in paths),
        compared="method",
        levels=list(dict.fromkeys(levels)),
        strata=list(dict.fromkeys(strata)),
    )
    for run, level, stratum in zip(runs, levels, strata, strict=True):
        cell = Cell(stratum, level, str(run.results.get("seed", "")))
        if cell in study.runs:
            study.notices.append(
                f"{run.folder} is the same run as {study.runs[cell].folder} (config and seed), and is left out."
            )
        else:
            study.runs[cell] = run
    return _checked(study, [str(folder) for folder in unfinished])


def _compared_axis(plan: Plan, compare: str | None) -> PlannedAxis | None:
    names = [axis.name for axis in plan.axes]
    if compare is not None:
        if compare not in names:
            raise ReportError(
                f"there is no axis {compare!r}{did_you_mean(compare, names)}; the axes are {', '.join(names)}"
            )
        return plan.axes[names.index(compare)]
    varied = [axis for axis in plan.axes if not axis.is_replication]
    balancers = [axis for axis in varied if any(key.startswith("balancer") for key in axis.keys)]
    return next(iter([*balancers, *varied]), None)


def _level_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Name each run after its balancer and the options in which it differs.

    A balancer's own options are compared with those of other runs with that balancer, all others with those of
    every run: methods that were trained differently are not compared in silence.
    """
    names = []
    for run in runs:
        method = run.config.get("balancer.name")
        alike = [other for other in runs if other.config.get("balancer.name") == method]
        own, others = _differing(run, alike, ("balancer.",)), _differing(run, runs, _TRAINED)
        names.append(", ".join([str(method), *own, *others]))
    return names


def _stratum_names(runs: Sequence[FinishedRun]) -> list[str]:
    return [", ".join(_differing(run, runs, ("dataset.",))) for run in runs]


def _differing(run: FinishedRun, others: Sequence[FinishedRun], prefixes: tuple[str, ...]) -> list[str]:
    return [
        _shown(key.partition(".")[2], str(run.config.get(key, "default")))
        for key in _keys_that_differ(others, prefixes)
    ]


def _keys_that_differ(runs: Sequence[FinishedRun], prefixes: tuple[str, ...]) -> list[str]:
    """Return the options that decide a result and are not the same in all runs."""
    keys = {key for run in runs for key in run.config if key.startswith(prefixes)} - FREE_KEYS
    differing = []
    for key in sorted(keys):
        values = [run.config.get(key) for run in runs]
        is_place = any(isinstance(value, str) and Path(value).is_absolute() for value in values)
        if not is_place and any(value != values[0] for value in values):
            differing.append(key)
    return differing


def _special_cases(study: Study, plan: Plan) -> list[str]:
    """Say in which options that no axis sets the levels of a sweep differ: its special cases."""
    varied = {key for axis in plan.axes for key in axis.keys}
    found: dict[str, list[str]] = {}
    for stratum in study.strata:
        runs = {cell.level: run for cell, run in study.runs.items() if cell.stratum == stratum}
        for key in _keys_that_differ(list(runs.values()), ("dataset.", *_TRAINED)):
            if key in varied:
                continue
            values: dict[str, list[str]] = {}
            for level in study.levels:
                if level in runs:
                    values.setdefault(str(runs[level].config.get(key, "default")), []).append(level)
            text = "; ".join(f"{value} ({', '.join(levels)})" for value, levels in values.items())
            found.setdefault(f"{key} is {text}", []).append(stratum)
    return [
        f"Not only the {study.compared} differs{' in ' + ', '.join(strata) if any(strata) else ''}: {text}."
        for text, strata in found.items()
    ]


def _shown(name: str, label: str) -> str:
    """Return a label that says what it is: a number with its name."""
    try:
        float(label)
    except ValueError:
        return label
    return f"{name} {label}"


def _checked(study: Study, missing: Sequence[str]) -> Study:
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        total = len(missing) + len(study.runs)
        study.notices.append(f"{len(missing)} of {total} runs are not finished, and not counted: {shown}.")
    if not study.runs:
        raise RunFolderError(f"no run of {study.name} is finished, so there is nothing to report")
    study.notices += _cautions(list(study.runs.values()))
    return study


def _cautions(runs: Sequence[FinishedRun]) -> list[str]:
    """Return what makes figures less than they seem."""
    sentences = []
    for key, what in (
        ("protocol", "protocols"),
        ("data_source", "data sources"),
        ("key_metric", "key metrics"),
    ):
        values = sorted({str(run.results.get(key)) for run in runs})
        if len(values) > 1:
            sentences.append(f"These runs have different {what} ({', '.join(values)}): do not compare them.")
    if any(run.results.get("data_source") == "simulated" for run in runs):
        sentences.append("Simulated data: the figures say nothing about the real data set.")
    if any("validation_metrics" not in run.results for run in runs):
        sentences.append(
            "The best epoch was chosen on the test set, so every figure is the best of many looks at it."
        )
    return sentences
