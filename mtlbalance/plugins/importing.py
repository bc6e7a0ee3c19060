"""Finding and importing the modules of a config's ``plugins = [...]``, and naming where a plugin failed."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mtlbalance.errors import PluginError

# Frames of these are never where a plugin failed.
_MACHINERY = ("<frozen", str(Path(__file__).parent), str(Path(importlib.__file__).parent))


@dataclass(frozen=True)
class ModuleAddress:
    """Where a listed plugin lives.

    Args:
        module: its dotted name.
        folder: the folder that holds its top module, or None for an installed one.
        resolved: what a resolved config lists: the absolute path, or the name of an installed module.
    """

    module: str
    folder: Path | None
    resolved: str


def find_module(listed: str, base_dir: Path | None) -> ModuleAddress:
    """Find a listed plugin: a path relative to ``base_dir``, a module beside it, or an installed module.

    A module beside the config wins over an installed one of the same name, so that a working copy is
    what runs.

    Raises:
        PluginError: a path that does not exist, or a folder that is not a package.
    """
    base = (base_dir or Path()).resolve()
    if "/" in listed or "\\" in listed or listed.endswith(".py") or listed.startswith("~"):
        return _address_of_path(base / Path(listed).expanduser(), listed)
    parts = listed.split(".")
    if not all(part.isidentifier() for part in parts):
        raise PluginError("it is neither a module name nor a path")
    beside = base.joinpath(*parts)
    for candidate in (beside, beside.with_name(beside.name + ".py")):
        if candidate.is_file() or (candidate / "__init__.py").is_file():
            return ModuleAddress(listed, base, str(candidate))
    return ModuleAddress(listed, None, listed)


def _address_of_path(path: Path, listed: str) -> ModuleAddress:
    path = path.resolve()
    if not path.exists():
        raise PluginError(f"there is no {path}")
    if path.is_dir() and not (path / "__init__.py").is_file():
        inside = sorted(init.parent.name for init in path.glob("*/__init__.py"))
        hint = f"; did you mean {str(Path(listed) / inside[0])!r}?" if inside else ""
        raise PluginError(f"it is a folder without __init__.py{hint}")
    if path.is_file() and path.suffix != ".py":
        raise PluginError("it is not a Python module")
    names, folder = [path.stem if path.is_file() else path.name], path.parent
    while (folder / "__init__.py").is_file():  # a module inside a package is imported as part of it
        names.insert(0, folder.name)
        folder = folder.parent
    return ModuleAddress(".".join(names), folder, str(path))


def import_module(address: ModuleAddress) -> ModuleType:
    """Import the module at ``address``; what fails on the way is forgotten, so that it can be tried again.

    Raises:
        PluginError: another module of the same name is already imported from elsewhere.
        Exception: whatever the module itself raises.
    """
    if address.folder is None:
        return importlib.import_module(address.module)
    top, file = _top_file(address.module, address.folder)
    loaded = sys.modules.get(top)
    if loaded is not None and (loaded_file := _real_file(loaded)) != file.resolve():
        raise PluginError(
            f"module {top!r} is already imported from {loaded_file or 'the standard library'}, "
            f"so {file} cannot be imported beside it; rename one of them"
        )
    before = set(sys.modules)
    try:
        if loaded is None:
            _execute(top, file)
        module = importlib.import_module(address.module)
    except BaseException:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == top:
                del sys.modules[name]
        raise
    if str(address.folder) not in sys.path:  # so that worker processes find the module by its name
        sys.path.append(str(address.folder))
    return module


def is_installed(address: ModuleAddress) -> bool:
    """Return whether the module at ``address`` is the one that Python would import by itself."""
    if address.folder is None:
        return True
    top, file = _top_file(address.module, address.folder)
    spec = importlib.machinery.PathFinder.find_spec(top)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file.resolve()


def _top_file(module: str, folder: Path) -> tuple[str, Path]:
    top = module.partition(".")[0]
    package = folder / top / "__init__.py"
    return top, package if package.is_file() else folder / f"{top}.py"


def _execute(name: str, file: Path) -> None:
    search = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=search)
    if spec is None or spec.loader is None:
        raise PluginError(f"{file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _real_file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def module_files(plugin: object) -> set[str]:
    """Return the real file of the module behind a plugin object, as a set of at most one path."""
    name = plugin.__name__ if isinstance(plugin, ModuleType) else getattr(plugin, "__module__", "")
    module = sys.modules.get(name)
    file = _real_file(module) if module else None
    return {str(file)} if file else set()


def describe_failure(error: BaseException, module: str) -> tuple[str, str]:
    """Return ``("ValueError: text", "file:line")``, the place being the plugin's own line where there is one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg}", f"{error.filename}:{error.lineno}"
    text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}".rstrip(": ")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_MACHINERY)
    ]
    top = module.partition(".")[0]
    own = [f for f in frames if top in Path(f.filename).parts or Path(f.filename).stem == top]
    frames = own or frames
    return text, f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
