"""Which engine carries out a sweep: the sweep file's ``[engine]``, what the command line says of it, or ``local``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlbalance.config import InvalidConfigError, LocatedProblem
from mtlbalance.config.document import Document, parse_override, read_document
from mtlbalance.config.validation import Fault, show, validate
from mtlbalance.errors import did_you_mean
from mtlbalance.plugins import EngineRegistration, PluginConfig, PluginRegistry, build_plugin
from mtlbalance.sweeps.engines import Engine

_DEFAULT = "local"


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides for the runs, and those for the engine (``engine.per_device=2``)."""
    of_engine = [text for text in overrides if (parse_override(text) or ("",))[0] == "engine"]
    return [text for text in overrides if text not in of_engine], of_engine


@dataclass(frozen=True)
class EngineChoice:
    """The engine that a sweep is to have, its options checked.

    Args:
        registration: the engine's.
        options: checked.
        notices: what the user should know about how overrides were applied.
    """

    registration: EngineRegistration
    options: PluginConfig
    notices: tuple[str, ...]

    def build(self) -> Engine:
        """Build the engine, which may join a cluster.

        Raises:
            PluginError: it cannot be built.
        """
        engine: Engine = build_plugin(self.registration, self.options)
        return engine


def choose_engine(path: Path, overrides: Sequence[str], registry: PluginRegistry) -> EngineChoice:
    """Return the engine that a sweep file and overrides choose; nothing is started.

    Args:
        path: the sweep file.
        overrides: texts such as ``engine.name=ray``; another name leaves out the file's options.
        registry: every plugin that was found.

    Raises:
        InvalidConfigError: there is no such engine, or its options are wrong.
    """
    document = read_document(path)
    if isinstance(section := document.data.get("engine"), dict):
        section.setdefault("name", _DEFAULT)  # so that its options go when another engine is asked for
    document.apply(overrides)
    if document.problems:
        raise InvalidConfigError(document.problems)
    section = document.data.get("engine", {})
    if not isinstance(section, dict):
        raise _invalid(
            document,
            ("engine",),
            f"'engine' is a section, not {show(section)}",
            "write engine.name=local, or --engine",
        )
    section = {"name": _DEFAULT} | section
    name = section.pop("name")
    names = registry.names("engine")
    if name not in names:
        close = did_you_mean(str(name), names).removeprefix("; ")
        raise _invalid(
            document,
            ("engine", "name"),
            f"unknown engine {name!r}" if isinstance(name, str) else f"an engine's name is not {show(name)}",
            f"{close or 'an engine may come with a package of its own, such as mtlbalance-ray;'} "
            f"available: {', '.join(names)}",
        )
    registration = registry.get("engine", name)
    assert isinstance(registration, EngineRegistration)
    options, faults = validate(registration.config, section, f"[engine] ({name})")
    if options is None:
        raise InvalidConfigError([_located(document, fault) for fault in faults])
    return EngineChoice(registration, options, tuple(document.notices))


def _located(document: Document, fault: Fault) -> LocatedProblem:
    place = document.place(("engine", *fault.path), fault.at)
    return LocatedProblem(fault.message, place, fault.help)


def _invalid(document: Document, path: tuple[Any, ...], message: str, advice: str) -> InvalidConfigError:
    return InvalidConfigError([LocatedProblem(message, document.place(path), advice)])
