"""A sweep file as read: its base config, its axes, what it leaves out or alters, each with its place for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtlbalance.config import InvalidConfigError, LocatedProblem, Override, Place
from mtlbalance.config.document import Document, read_document
from mtlbalance.config.validation import show
from mtlbalance.errors import did_you_mean
from mtlbalance.sweeps.labels import NAME, RESERVED_FOLDERS, default_label, folder_of, is_label, shown

_KEYS = ("base", "name", "overrides", "axes", "exclude", "special_cases", "engine")


@dataclass(frozen=True)
class Point:
    """One value of an axis: a label, and the overrides that it stands for."""

    label: str
    overrides: tuple[Override, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The dotted keys that it sets."""
        return tuple(".".join(override.keys) for override in self.overrides)


@dataclass(frozen=True)
class Axis:
    """A named list of points."""

    name: str
    points: tuple[Point, ...]

    @property
    def labels(self) -> list[str]:
        """The labels, in order."""
        return [point.label for point in self.points]

    @property
    def keys(self) -> list[str]:
        """The dotted keys that any point sets, in order."""
        return list(dict.fromkeys(key for point in self.points for key in point.keys))

    def folder(self, label: str) -> str:
        """Return a label as a folder's name: a number says what it is a number of."""
        return folder_of(self.name, label)


@dataclass(frozen=True)
class Selection:
    """Combinations: those whose label is among the given ones on every axis named."""

    labels: Mapping[str, tuple[str, ...]]

    def matches(self, coordinates: Mapping[str, str]) -> bool:
        """Return whether a run at these coordinates is one of them."""
        return all(coordinates[axis] in labels for axis, labels in self.labels.items())


@dataclass(frozen=True)
class SpecialCase:
    """Runs with overrides of their own, which no axis sets."""

    where: Selection
    overrides: tuple[Override, ...]
    place: Place


@dataclass
class SweepFile:
    """What a sweep file says, checked in itself; its runs' configs are checked by ``make_plan``."""

    path: Path
    base: Path
    name: str
    overrides: tuple[Override, ...]
    axes: tuple[Axis, ...]
    exclusions: tuple[Selection, ...]
    special_cases: tuple[SpecialCase, ...]
    document: Document = field(repr=False)

    @property
    def engine(self) -> dict[str, Any]:
        """The ``[engine]`` section, unchecked."""
        return dict(self.document.data.get("engine", {}))


def read_sweep_file(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Raises:
        InvalidConfigError: with all problems, each with file, line and column.
    """
    return _Reader(read_document(path)).read()


class _Reader:
    """Collects problems while it reads one sweep file."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.data = document.data
        self.problems: list[LocatedProblem] = []

    def read(self) -> SweepFile:
        self.check_keys()
        path = self.document.path
        base = self.base()
        name = self.data.get("name", path.stem)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self.problem(
                f"'name' cannot be {show(name)}",
                self.document.place(("name",)),
                "letters, digits, _ . and -; default: the sweep file's name",
            )
        if not isinstance(self.data.get("engine", {}), dict):
            self.problem("'engine' must be a section", self.document.place(("engine",)))
        overrides = self.common_overrides()
        axes = tuple(self.axes())
        self.check_overlaps(overrides, axes)
        exclusions = tuple(
            self.selection(("exclude", index), table, axes)
            for index, table in enumerate(
                self.tables("exclude", 'such as exclude = [{ method = "gaba", seed = [1, 2] }]')
            )
        )
        special_cases = tuple(self.special_cases(axes))
        if self.problems:
            self.problems.sort(key=lambda found: (found.place.line, found.place.column))
            raise InvalidConfigError(self.problems)
        return SweepFile(path, base, name, overrides, axes, exclusions, special_cases, self.document)

    def problem(self, message: str, place: Place, advice: str = "") -> None:
        self.problems.append(LocatedProblem(message, place, advice))

    def check_keys(self) -> None:
        for key in self.data:
            if key not in _KEYS:
                close = did_you_mean(key, _KEYS).removeprefix("; ")
                self.problem(
                    f"unknown key {key!r} in a sweep file",
                    self.document.place((key,), "key"),
                    close or f"a sweep file has {', '.join(_KEYS)}",
                )

    def base(self) -> Path:
        base = self.data.get("base")
        place = self.document.place(("base",))
        if base is None:
            self.problem("missing key 'base'", place, 'name the config to vary, such as base = "study.toml"')
        elif not isinstance(base, str):
            self.problem(f"'base' must be text, not {show(base)}", place)
        else:
            found = self.document.path.parent / Path(base).expanduser()
            if found.is_file():
                return found
            self.problem(f"there is no config {found}", place, "base is relative to the sweep file")
        return Path()

    def common_overrides(self) -> tuple[Override, ...]:
        table = self.data.get("overrides", {})
        if not isinstance(table, dict):
            self.problem(
                f"'overrides' must be a table, not {show(table)}",
                self.document.place(("overrides",)),
                "such as overrides = { training.epochs = 40 }, for every run",
            )
            return ()
        return tuple(self.overrides(("overrides",), table))

    def axes(self) -> Iterator[Axis]:
        axes = self.data.get("axes")
        place = self.document.place(("axes",), "key")
        example = "such as [axes] with seed = [{ run.seed = 1 }, { run.seed = 2 }]"
        if not isinstance(axes, dict) or not axes:
            self.problem("a sweep needs a section [axes] with at least one axis", place, example)
            return
        for name, points in axes.items():
            place = self.document.place(("axes", name), "key")
            if not NAME.fullmatch(name):
                self.problem(f"{name!r} cannot name an axis", place, "letters, digits, _ . and -")
            elif not isinstance(points, list) or not points or not all(isinstance(p, dict) for p in points):
                self.problem(f"axis {name!r} must be a list of override tables", place, example)
            else:
                axis = Axis(name, tuple(self.points(name, points)))
                self.check_labels(axis)
                yield axis

    def points(self, axis: str, tables: Sequence[dict[str, Any]]) -> Iterator[Point]:
        for index, table in enumerate(tables):
            path = ("axes", axis, index)
            overrides = tuple(self.overrides(path, table))
            label = table.get("label", default_label(overrides))
            at = ("label",) if "label" in table else ()
            if not is_label(label):
                self.problem(
                    f"a label cannot be {show(label)}",
                    self.document.place((*path, *at)),
                    'give the point a label of letters, digits, _ . and -, at most 100, such as label = "slow"',
                )
                label = f"point-{index}"
            yield Point(label, overrides)

    def overrides(self, path: tuple[str | int, ...], table: dict[str, Any]) -> Iterator[Override]:
        """Yield a point's overrides: an option is replaced as a whole, a section is not."""
        for section, content in table.items():
            if section == "label":
                continue
            if not isinstance(content, dict):
                yield self.override((section,), content, (*path, section))
                continue
            for key, value in content.items():
                yield self.override((section, key), value, (*path, section, key))

    def override(self, keys: tuple[str, ...], value: Any, path: tuple[str | int, ...]) -> Override:
        place, key_place = self.document.place(path), self.document.place(path, "key")
        if keys[0] == "plugins" or keys in (("run", "name"), ("run", "output_dir")):
            what = "the base config lists" if keys[0] == "plugins" else "the sweep itself chooses"
            self.problem(
                f"{'.'.join(keys)!r} cannot be varied: {what} it",
                key_place,
                "" if keys[0] == "plugins" else "folders are named after the labels",
            )
        shown = f"{'.'.join(keys)}={value}"
        return Override(keys, value, place, shown, self.document.path.parent, key_place)

    def check_labels(self, axis: Axis) -> None:
        before: dict[str, str] = {}  # label by folder; some disks do not tell upper case from lower
        for index, label in enumerate(axis.labels):
            place = self.document.place(("axes", axis.name, index))
            folder = axis.folder(label)
            other = before.setdefault(folder.lower(), label)
            if label in axis.labels[:index]:
                self.problem(
                    f"two points of axis {axis.name!r} are labelled {label!r}",
                    place,
                    'give one of them a label of its own, such as label = "fast"',
                )
            elif other != label:
                self.problem(
                    f"the points {other!r} and {label!r} of axis {axis.name!r} would share the folder {folder!r}",
                    place,
                    'give one of them another label, such as label = "fast"',
                )
            if folder in RESERVED_FOLDERS:
                what = "file" if "." in folder else "folder"
                self.problem(f"{label!r} is the name of a {what} that every sweep has", place)

    def check_overlaps(self, overrides: Sequence[Override], axes: Sequence[Axis]) -> None:
        """Two axes that set the same option would overrule each other."""
        first = {".".join(override.keys): "overrides" for override in overrides}
        for axis in axes:
            for key in axis.keys:
                if key in first:
                    self.problem(
                        f"{first[key]!r} and axis {axis.name!r} both set {key!r}",
                        self.document.place(("axes", axis.name), "key"),
                        "set it in one of them",
                    )
                first.setdefault(key, axis.name)

    def special_cases(self, axes: Sequence[Axis]) -> Iterator[SpecialCase]:
        example = 'such as { where = { method = "gaba", subset = ["FD002"] }, training.lr = 1e-4 }'
        set_by = {key: axis.name for axis in axes for key in axis.keys}
        for index, table in enumerate(self.tables("special_cases", example)):
            path = ("special_cases", index)
            where = table.get("where")
            if not isinstance(where, dict) or not where:
                self.problem(
                    "a special case needs 'where', a table of labels", self.document.place(path), example
                )
                continue
            overrides = tuple(self.overrides(path, {key: table[key] for key in table if key != "where"}))
            if not overrides:
                self.problem("this special case changes nothing", self.document.place(path), example)
            for override in overrides:
                key = ".".join(override.keys)
                if key in set_by:
                    self.problem(
                        f"a special case cannot set {key!r}: axis {set_by[key]!r} does",
                        override.at("key"),
                        "give that axis another point, and exclude what is not wanted",
                    )
            selection = self.selection((*path, "where"), where, axes)
            yield SpecialCase(selection, overrides, self.document.place((*path, "where")))

    def tables(self, key: str, example: str) -> list[dict[str, Any]]:
        tables = self.data.get(key, [])
        if isinstance(tables, list) and all(isinstance(table, dict) and table for table in tables):
            return tables
        self.problem(f"{key!r} must be a list of tables", self.document.place((key,)), example)
        return []

    def selection(
        self, path: tuple[str | int, ...], table: Mapping[str, Any], axes: Sequence[Axis]
    ) -> Selection:
        """Return the runs that labels name; every one of them must be there, or it would match nothing."""
        known = {axis.name: axis.labels for axis in axes}
        found: dict[str, tuple[str, ...]] = {}
        for axis, value in table.items():
            if axis not in known:
                self.problem(
                    f"there is no axis {axis!r}",
                    self.document.place((*path, axis), "key"),
                    did_you_mean(axis, known).removeprefix("; ") or f"the axes are {', '.join(known)}",
                )
                continue
            found[axis] = tuple(shown(item) for item in (value if isinstance(value, list) else [value]))
            if not found[axis]:
                self.problem("this list is empty, so it matches no run", self.document.place((*path, axis)))
            for label in found[axis]:
                if label not in known[axis]:
                    self.problem(
                        f"axis {axis!r} has no point {label!r}",
                        self.document.place((*path, axis)),
                        did_you_mean(label, known[axis]).removeprefix("; ")
                        or f"its points are {', '.join(known[axis])}",
                    )
        return Selection(found)
