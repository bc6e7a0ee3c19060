"""The plan of a sweep: every run with its coordinates, its folder and its checked config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtlbalance.config import InvalidConfigError, LocatedProblem, Override, Place, RunConfig, load_config
from mtlbalance.config.document import parse_override
from mtlbalance.errors import RunFolderError
from mtlbalance.sweeps.sweep_file import SweepFile, read_sweep_file

PLAN_FILE = "plan.json"
_SCHEMA = 1


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Args:
        id: its folder below the sweep's, such as ``FD002/gaba/seed_42``.
        coordinates: label by axis.
        config: its checked config, or None in a plan that was read back.
    """

    id: str
    coordinates: Mapping[str, str]
    config: RunConfig | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class PlannedAxis:
    """An axis of a plan: its labels, and the dotted keys that its points set."""

    name: str
    labels: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def is_replication(self) -> bool:
        """Whether its points differ in the seed alone."""
        return self.keys == ("run.seed",)


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep.

    Args:
        name: the sweep's.
        folder: where its runs, logs and configs are.
        axes: in the order of the file.
        runs: in the order of the axes, the last one moving fastest.
        notices: what the user should know about how overrides were applied.
    """

    name: str
    folder: Path
    axes: tuple[PlannedAxis, ...]
    runs: tuple[PlannedRun, ...]
    notices: tuple[str, ...] = ()

    def folder_of(self, run_id: str) -> Path:
        """Return a run's folder."""
        return self.folder / run_id

    def log_of(self, run_id: str) -> Path:
        """Return the file that a run's output goes to."""
        return self.folder / "logs" / f"{run_id}.log"

    def config_of(self, run_id: str) -> Path:
        """Return the file that a run's resolved config goes to."""
        return self.folder / "configs" / f"{run_id}.toml"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, for ``plan.json``."""
        return {
            "schema": _SCHEMA,
            "sweep": self.name,
            "axes": [
                {"name": axis.name, "labels": list(axis.labels), "keys": list(axis.keys)}
                for axis in self.axes
            ],
            "runs": [{"id": run.id, "coordinates": dict(run.coordinates)} for run in self.runs],
        }


def make_plan(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> Plan:
    """Read a sweep file and check the config of every run, before anything is started.

    Args:
        path: the sweep file.
        overrides: ``key=value`` texts that hold for every run.
        out: the sweep's folder; default ``{run.output_dir of the base}/{name}``.

    Raises:
        InvalidConfigError: all problems, each once, with file and line.
    """
    return _Planner(read_sweep_file(path), overrides).plan(out)


def read_plan(folder: Path) -> Plan:
    """Read the plan that ``sweep run`` left in a sweep's folder.

    Raises:
        RunFolderError: there is none, or it cannot be read.
    """
    path = folder / PLAN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"it has schema {content['schema']!r}, and this version reads {_SCHEMA}")
        axes = tuple(
            PlannedAxis(axis["name"], tuple(axis["labels"]), tuple(axis["keys"])) for axis in content["axes"]
        )
        runs = tuple(
            PlannedRun(run["id"], {axis.name: run["coordinates"][axis.name] for axis in axes})
            for run in content["runs"]
        )
        return Plan(content["sweep"], folder, axes, runs)
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(
            f"{folder} is not the folder of a sweep: it has no {PLAN_FILE}; "
            "name the folder that 'mtlbalance sweep run' wrote to"
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(
            f"cannot read {path}: {error}; 'mtlbalance sweep run' writes it again"
        ) from error


class _Planner:
    def __init__(self, sweep: SweepFile, overrides: Sequence[str]) -> None:
        self.sweep = sweep
        self.overrides = overrides
        self.problems: dict[LocatedProblem, list[str]] = {}  # with the runs that have it
        self.notices: dict[str, None] = {}
        self.special_cases_met: set[int] = set()

    def plan(self, out: Path | None) -> Plan:
        self.check_overrides()
        runs: list[PlannedRun] = []
        num_runs = 0
        for points in itertools.product(*(axis.points for axis in self.sweep.axes)):
            coordinates = {
                axis.name: point.label for axis, point in zip(self.sweep.axes, points, strict=True)
            }
            if any(exclusion.matches(coordinates) for exclusion in self.sweep.exclusions):
                continue
            num_runs += 1
            levels = [axis.folder(coordinates[axis.name]) for axis in self.sweep.axes]
            run_id = "/".join(levels)
            try:
                special = self.special(coordinates)
                config = self.config(
                    [*(item for point in points for item in point.overrides), *special], levels
                )
            except InvalidConfigError as error:
                for problem in error.problems:
                    self.problems.setdefault(problem, []).append(run_id)
                continue
            runs.append(PlannedRun(run_id, coordinates, config))
            # A point of an axis that names another plugin replaces the base's: that is what it is for.
            mine = tuple(self.overrides)
            self.notices |= dict.fromkeys(text for text in config.notices if text.startswith(mine))
        for index, case in enumerate(self.sweep.special_cases):
            if num_runs and index not in self.special_cases_met:
                self.problem("no run of the sweep is here: every one of them is excluded", case.place)
        if num_runs == 0:
            self.problem("every run is excluded", self.sweep.document.place(("exclude",), "key"))
        if self.problems:
            raise InvalidConfigError(
                [self.in_runs(problem, ids, num_runs) for problem, ids in self.problems.items()]
            )
        self.note_equal_runs(runs)
        assert runs[0].config is not None  # as in every run that was just planned
        return Plan(
            name=self.sweep.name,
            folder=out if out is not None else runs[0].config.run.output_dir / self.sweep.name,
            axes=tuple(
                PlannedAxis(axis.name, tuple(axis.labels), tuple(axis.keys)) for axis in self.sweep.axes
            ),
            runs=tuple(runs),
            notices=tuple(self.notices),
        )

    def problem(self, message: str, place: Place, advice: str = "") -> None:
        self.problems[LocatedProblem(message, place, advice)] = []

    def special(self, coordinates: Mapping[str, str]) -> list[Override]:
        """Return the overrides of a run alone."""
        found: dict[tuple[str, ...], Override] = {}
        for index, case in enumerate(self.sweep.special_cases):
            if not case.where.matches(coordinates):
                continue
            self.special_cases_met.add(index)
            for override in case.overrides:
                if override.keys in found:
                    what = f"another special case sets {'.'.join(override.keys)!r} for some of the same runs"
                    raise InvalidConfigError([LocatedProblem(what, override.at("key"))])
                found[override.keys] = override
        return list(found.values())

    def check_overrides(self) -> None:
        """An override that holds for every run must not set what an axis varies: the runs would be alike."""
        for text in self.overrides:
            keys = parse_override(text)
            if keys == ("run", "name"):
                self.problem("a sweep names its runs itself", Place(f"command line: {text}"))
            for axis in self.sweep.axes:
                for varied in axis.keys:
                    parts = tuple(varied.split("."))
                    if keys is not None and (keys[: len(parts)] == parts or parts[: len(keys)] == keys):
                        self.problem(f"axis {axis.name!r} varies {varied!r}", Place(f"command line: {text}"))
            for case in self.sweep.special_cases:
                for override in case.overrides:
                    if keys == override.keys:
                        self.problem(
                            f"special_cases set {'.'.join(keys)!r} for some runs",
                            Place(f"command line: {text}"),
                        )

    def config(self, overrides: Sequence[Override], levels: Sequence[str]) -> RunConfig:
        name = "-".join([self.sweep.name, *levels])
        named = Override(("run", "name"), name, Place("the sweep's own name for a run"), f"run.name={name}")
        return load_config(self.sweep.base, [*self.sweep.overrides, *overrides, named, *self.overrides])

    def note_equal_runs(self, runs: Sequence[PlannedRun]) -> None:
        first: dict[str, str] = {}
        for run in runs:
            assert run.config is not None
            twin = first.setdefault(run.config.result_hash(), run.id)
            if twin != run.id:
                self.notices[f"{run.id} has the same config as {twin}: it must give the same result"] = None

    def in_runs(self, problem: LocatedProblem, ids: Sequence[str], num_runs: int) -> LocatedProblem:
        """Say which runs have a problem, where the place does not say it: in some, and not in the sweep file."""
        if len(ids) in (0, num_runs) or problem.place.source == str(self.sweep.path):
            return problem
        others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        return LocatedProblem(f"{problem.message} (in {ids[0]}{others})", problem.place, problem.help)
