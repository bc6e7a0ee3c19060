"""Writing a new plugin: a project of its own, complete, tested, and small enough to be read whole."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from mtlbalance.errors import PluginError
from mtlbalance.plugins.registrations import Slot

_SUMMARIES: dict[Slot, str] = {
    "balancer": "weights inverse to the running means of the losses",
    "dataset": "a made-up regression and classification",
    "backbone": "residual blocks on the flattened input",
}


def write_plugin(name: str, slot: Slot, folder: Path) -> list[Path]:
    """Write a plugin project into a new folder, and return its files in the order in which to read them.

    Args:
        name: what configs will say, in kebab case; the distribution has this name too.
        slot: ``"balancer"``, ``"dataset"`` or ``"backbone"``.
        folder: created; an existing one must be empty.

    Raises:
        PluginError: the name cannot be a plugin's or a module's, or the folder is not empty.
    """
    if slot not in _SUMMARIES:
        raise PluginError(f"no plugin of the slot {slot!r} can be written (slots: {', '.join(_SUMMARIES)})")
    package = _package(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(
            f"{folder} exists already and is not empty; nothing was written (choose another with --out)"
        )
    values = {
        "name": name,
        "slot": slot,
        "package": package,
        "cls": "".join(part.capitalize() for part in name.split("-")),
        "summary": _SUMMARIES[slot],
    }
    files = {
        "README.md": "README.md",
        f"{package}/__init__.py": f"init_{slot}.py",
        f"{package}/{slot}.py": f"{slot}.py",
        f"{package}/py.typed": "",
        f"tests/test_{package}.py": f"test_{slot}.py",
        "example.toml": f"example_{slot}.toml",
        "pyproject.toml": "pyproject.toml",
    }
    written = []
    for target, template in files.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(template, values) if template else "", encoding="utf-8")
        written.append(path)
    return written


def _package(name: str) -> str:
    """Return the module's name, ``acme_loss`` for ``acme-loss``, if a new module can have it."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise PluginError(f"{name!r} cannot be a plugin's name: write it in kebab case, such as 'acme-loss'")
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or importlib.util.find_spec(package) is not None:
        raise PluginError(
            f"{name!r} would be the module {package!r}, which exists already; choose another, such as 'my-{name}'"
        )
    return package


def _filled(template: str, values: dict[str, str]) -> str:
    source = resources.files("mtlbalance.plugins").joinpath("templates", f"{template}.txt")
    return Template(source.read_text(encoding="utf-8")).substitute(values)
