"""Which engine carries out a sweep: the sweep file's ``[engine]``, what the command line says of it, or ``local``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtlbalance.config import InvalidConfigError, LocatedProblem
from mtlbalance.config.document import Document, parse_override, read_document
from mtlbalance.config.validation import Fault, show, validate
from mtlbalance.errors import did_you_mean
from mtlbalance.plugins import PluginRegistry, build_plugin
from mtlbalance.sweeps.engines import Engine


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides for the runs, and those for the engine (``engine.per_device=2``)."""
    of_engine = [text for text in overrides if (parse_override(text) or ("",))[0] == "engine"]
    return [text for text in overrides if text not in of_engine], of_engine


def build_engine(path: Path, overrides: Sequence[str], registry: PluginRegistry) -> Engine:
    """Build the engine that a sweep file and overrides choose.

    Args:
        path: the sweep file.
        overrides: texts such as ``engine.name=ray``; another name leaves out the file's options.
        registry: every plugin that was found.

    Raises:
        InvalidConfigError: there is no such engine, or its options are wrong.
        PluginError: it cannot be built.
    """
    document = read_document(path)
    document.apply(overrides)
    section = {"name": "local"} | document.data.get("engine", {})
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
    options, faults = validate(registration.config, section, f"[engine] ({name})")
    if options is None:
        raise InvalidConfigError([_located(document, fault) for fault in faults])
    engine: Engine = build_plugin(registration, options)
    return engine


def _located(document: Document, fault: Fault) -> LocatedProblem:
    place = document.place(("engine", *fault.path), fault.at)
    return LocatedProblem(fault.message, place, fault.help)


def _invalid(document: Document, path: tuple[Any, ...], message: str, advice: str) -> InvalidConfigError:
    return InvalidConfigError([LocatedProblem(message, document.place(path), advice)])
