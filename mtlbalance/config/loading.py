"""``load_config``: a TOML file and overrides in, a complete ``RunConfig`` out, or every problem at once."""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from mtlbalance.config.document import SLOTS, Document, Override, read_document
from mtlbalance.config.problems import InvalidConfigError, LocatedProblem, Place
from mtlbalance.config.run_config import Choice, RunConfig
from mtlbalance.config.sections import RunSection, TrainingSection
from mtlbalance.config.validation import Fault, Model, show, validate, validate_partly
from mtlbalance.errors import MtlBalanceError, PluginError, did_you_mean
from mtlbalance.plugins.importing import describe_failure
from mtlbalance.plugins.manager import PluginRegistry, load_plugins
from mtlbalance.slots import TaskSpec

_SECTIONS: dict[str, type[BaseModel]] = {"run": RunSection, "training": TrainingSection}
_TOP_LEVEL = ("plugins", "run", *SLOTS, "training")
_ELSEWHERE = {
    key: f"[{name}]" for name, model in _SECTIONS.items() for key in model.model_fields if key != "name"
}


def load_config(path: Path | str, overrides: Sequence[str | Override] = ()) -> RunConfig:
    """Read a config, apply overrides, load its plugins and check everything that needs no data.

    An override of a slot's ``name`` that changes the plugin leaves out what the file says about the old
    plugin's options (a notice says so); options for the new one can be given by further overrides.

    Args:
        path: a TOML file.
        overrides: ``key=value`` texts such as ``"balancer.beta=0.9"``; a value that is not TOML is text. Or
            ``Override`` objects, which know where they were written.

    Raises:
        InvalidConfigError: with all problems, each with file, line and column, or the override at fault.
    """
    document = read_document(Path(path))
    document.apply(overrides)
    return _Reader(document).read()


class _Reader:
    """Collects problems while it reads one document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.data = document.data
        self.problems = list(document.problems)
        self.registry = PluginRegistry()
        self.partial: dict[str, set[str | int]] = {}  # faulty or missing options, by slot

    def read(self) -> RunConfig:
        self.check_top_level()
        self.registry = self.load_plugins()
        run = self.section(RunSection, "run", {"name": default_name(self.document.path)})
        training = self.section(TrainingSection, "training", {})
        choices = {slot: self.choice(slot) for slot in SLOTS}
        tasks = self.tasks(choices["dataset"])
        if tasks:
            self.check_balancer(choices["balancer"], tasks)
        if self.problems or run is None or training is None:
            raise InvalidConfigError(self.sorted_problems())
        return RunConfig(
            source=self.document.path,
            run=run,
            training=training,
            dataset=choices["dataset"],
            backbone=choices["backbone"],
            balancer=choices["balancer"],
            tasks=tasks,
            plugins=self.registry.resolved_plugins,
            registry=self.registry,
            notices=tuple(self.document.notices),
        )

    @property
    def listed_are_broken(self) -> bool:
        return any(broken.listed_index is not None for broken in self.registry.broken)

    def problem(self, message: str, place: Place, advice: str = "") -> None:
        self.problems.append(LocatedProblem(message, place, advice))

    def sorted_problems(self) -> list[LocatedProblem]:
        """The file's problems from top to bottom, then those of another file's overrides, then the command line's."""
        own = str(self.document.path)
        return sorted(
            self.problems,
            key=lambda found: (
                found.place.line == 0,
                found.place.source != own,
                found.place.line,
                found.place.column,
            ),
        )

    def check_top_level(self) -> None:
        for key, value in self.data.items():
            if key in _TOP_LEVEL:
                continue
            close = did_you_mean(key, _TOP_LEVEL).removeprefix("; ")
            advice = close or (f"it belongs in {_ELSEWHERE[key]}" if key in _ELSEWHERE else "")
            kind = "section" if isinstance(value, dict) else "key"
            shown = f"[{key}]" if isinstance(value, dict) else repr(key)
            self.problem(
                f"unknown {kind} {shown}",
                self.document.place((key,), "key"),
                advice or f"a config has {', '.join(_TOP_LEVEL)}",
            )

    def load_plugins(self) -> PluginRegistry:
        listed = self.data.get("plugins", [])
        if not isinstance(listed, list):
            self.problem(
                f"'plugins' must be a list of text, not {show(listed)}",
                self.document.place(("plugins",)),
                'such as plugins = ["mtlbalance_cmapss"]',
            )
            listed = []
        for index, entry in enumerate(listed):
            if not isinstance(entry, str) or not entry.strip():
                self.problem(
                    f"a plugin must be a module name or a path, not {show(entry)}",
                    self.document.place(("plugins", index)),
                )
        usable = [
            (index, entry) for index, entry in enumerate(listed) if isinstance(entry, str) and entry.strip()
        ]
        registry = load_plugins([entry for _, entry in usable], self.document.path.parent)
        for broken in registry.broken:
            if broken.listed_index is not None:
                index = usable[broken.listed_index][0]
                self.problem(str(broken), self.document.place(("plugins", index)))
        return registry

    def section(self, model: type[Model], name: str, defaults: dict[str, Any]) -> Model | None:
        written = self.data.get(name, {})
        if not isinstance(written, dict):
            self.problem(f"{name!r} must be a section, not {show(written)}", self.document.place((name,)))
            return None
        return self.validated(model, name, defaults | written, f"[{name}]")

    def validated(self, model: type[Model], name: str, options: dict[str, Any], label: str) -> Model | None:
        elsewhere = {key: place for key, place in _ELSEWHERE.items() if place != f"[{name}]"}
        valid, faults = validate(model, options, label, elsewhere)
        for fault in faults:
            self.report(name, fault)
        return valid

    def report(self, section: str, fault: Fault) -> None:
        place = (
            self.document.place((section, *fault.path), fault.at)
            if fault.path
            else self.document.table_place(section)
        )
        advice = fault.help
        if "must be text, not" in fault.message and place.source.startswith("command line: "):
            key, _, value = place.source.removeprefix("command line: ").partition("=")
            advice = f"""quote it to give text: '{key}="{value}"'"""
        self.problem(fault.message, place, advice)

    def choice(self, slot: str) -> Any:
        """Return the slot's ``Choice``, or None after reporting why there is none."""
        names = self.registry.names(slot)
        available = f"available: {', '.join(names)}"
        section = self.data.get(slot)
        if section is None:
            if not any(did_you_mean(key, [slot]) for key in self.data if key not in _TOP_LEVEL):
                self.problem(
                    f"missing section [{slot}]",
                    Place(str(self.document.path)),
                    f'add [{slot}] with name = "..."; {available}',
                )
            return None
        if not isinstance(section, dict):
            self.problem(
                f"{slot!r} must be a section, not {show(section)}",
                self.document.place((slot,)),
                f'write [{slot}] and, below it, name = "..."; {available}',
            )
            return None
        if "name" not in section:
            nearly = next((key for key in section if did_you_mean(key, ["name"])), None)
            path = (slot, nearly) if nearly else (slot,)
            self.problem(
                f"missing key 'name' in [{slot}]",
                self.document.place(path, "key"),
                f"did you mean 'name'? {available}" if nearly else available,
            )
            return None
        name = section["name"]
        place = self.document.place((slot, "name"))
        if not isinstance(name, str):
            self.problem(f"'name' in [{slot}] must be text, not {show(name)}", place, available)
            return None
        if name not in names:
            close = did_you_mean(name, names).removeprefix("; ")
            if not close and self.listed_are_broken:
                close = "it may come with the plugin that could not be loaded;"
            elif not close:
                close = "a plugin that is not installed must be listed in plugins = [...];"
            self.problem(f"unknown {slot} {name!r}", place, f"{close} {available}")
            return None
        try:
            registration = self.registry.get(slot, name)
        except PluginError as error:
            self.problem(str(error), place)
            return None
        places = registration.config.places
        options = {
            key: self.absolute(slot, key, value) if key in places else value
            for key, value in section.items()
            if key != "name"
        }
        valid = self.validated(registration.config, slot, options, f"[{slot}] ({name})")
        if valid is None:  # what is left lets later checks go on
            at_fault = {
                fault.path[0] for fault in validate(registration.config, options, "")[1] if fault.path
            }
            valid, missing = validate_partly(registration.config, options, at_fault)
            self.partial[slot] = at_fault | missing
        return None if valid is None else Choice(registration, valid)

    def absolute(self, slot: str, key: str, value: Any) -> Any:
        """Return a path, or a list of them, from where it was written: the file's folder or the current one."""
        if isinstance(value, list):
            return [self.absolute(slot, key, item) for item in value]
        if not isinstance(value, str) or not value:  # an empty text names no place
            return value
        override = self.document.override((slot, key))
        base = override.folder if override else self.document.path.parent
        return os.path.abspath(base / os.path.expanduser(value))  # noqa: PTH100, PTH111  # keeps links

    def lacks(self, slot: str, error: Exception) -> bool:
        """Return whether a check failed only because it reads an option that is faulty or missing."""
        return isinstance(error, AttributeError) and error.name in self.partial.get(slot, ())

    def tasks(self, dataset: Any) -> tuple[TaskSpec, ...]:
        if dataset is None:
            return ()
        place = self.document.place(("dataset", "name"))
        try:
            tasks = tuple(dataset.registration.tasks(dataset.options))
            names = [task.name for task in tasks]
        except MtlBalanceError as error:
            self.problem(str(error), place)
            return ()
        except Exception as error:
            if self.lacks("dataset", error):
                return ()
            reason, where = describe_failure(error, "")
            self.problem(f"dataset {dataset.name!r} cannot say its tasks: {reason} (at {where})", place)
            return ()
        if not names or len(set(names)) < len(names):
            self.problem(f"dataset {dataset.name!r} must give tasks with unique names, not {names}", place)
            return ()
        return tasks

    def check_balancer(self, balancer: Any, tasks: tuple[TaskSpec, ...]) -> None:
        if balancer is None or balancer.registration.check is None:
            return
        label = f"[balancer] ({balancer.name})"
        try:
            for item in balancer.registration.check(balancer.options, tasks):
                path = tuple(item.key.split("."))
                if path[0] in self.partial.get("balancer", ()):
                    continue
                unknown_key = "unknown" in item.message and len(path) > 1
                at: Literal["key", "value"] = "key" if unknown_key else "value"
                self.report("balancer", Fault(path, at, f"{label}: {item.message}", item.suggestion))
        except Exception as error:
            if self.lacks("balancer", error):
                return
            reason, where = describe_failure(error, "")
            self.problem(
                f"{label}: its check failed: {reason} (at {where})", self.document.place(("balancer", "name"))
            )


def default_name(path: Path) -> str:
    """Return the run's name for a config file: its stem, with what no folder name should have replaced.

    >>> default_name(Path("my study (2).toml"))
    'my-study-2'
    """
    return re.sub(r"[^\w.-]+", "-", path.stem, flags=re.ASCII).strip("-.") or "run"
