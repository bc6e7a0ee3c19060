"""Imports only go down the floors of the house, and no file is a grab-bag or too long to be read."""

from __future__ import annotations

import ast
import graphlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cmapss"
FLOORS = {
    "mtlbalance": 0,  # only the package's own file; its public names are imported when first used
    "mtlbalance.errors": 0,
    "mtlbalance.allocator": 0,
    "mtlbalance.slots": 0,
    "mtlbalance.balancers": 1,
    "mtlbalance.datasets": 1,
    "mtlbalance.backbones": 1,
    "mtlbalance.plugins": 2,
    "mtlbalance.config": 2,
    "mtlbalance.caching": 2,
    "mtlbalance.training": 3,
    "mtlbalance.inference": 3,
    "mtlbalance.sweeps": 3,
    "mtlbalance.reports": 3,
    "mtlbalance.testing": 3,
    "mtlbalance.cli": 4,
    "mtlbalance.__main__": 4,
}
ALLOWED_BELOW_FLOOR_2 = {0: set[str](), 1: {"torch", "numpy"}}
MAX_LINES = 400


@dataclass
class Imports:
    """What one module imports: when it is imported itself, and later inside functions."""

    at_import: set[str] = field(default_factory=set)
    lazily: set[str] = field(default_factory=set)

    @property
    def all(self) -> set[str]:
        return self.at_import | self.lazily


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_under(package: Path) -> dict[str, Path]:
    return {module_name(path, package.parent): path for path in sorted(package.rglob("*.py"))}


MODULES = modules_under(ROOT / "mtlbalance")


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk(node: ast.AST, inside_function: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield every import with whether it waits for a call; those for type checkers only are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside_function
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from walk(ast.Module(body=[other], type_ignores=[]), inside_function)
        else:
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, inside_function or deferred)


def targets(statement: ast.stmt, module: str, is_package: bool, modules: dict[str, Path]) -> set[str]:
    """Return the modules that an import statement names, ``from package import module`` resolved."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    assert isinstance(statement, ast.ImportFrom)
    base = statement.module or ""
    if statement.level:
        parts = module.split(".")
        kept = len(parts) - statement.level + (1 if is_package else 0)
        base = ".".join([*parts[:kept], *([base] if base else [])])
    found = set()
    for alias in statement.names:
        full = f"{base}.{alias.name}"
        found.add(full if full in modules else public_home(alias.name) if base == "mtlbalance" else base)
    return found


def public_home(name: str) -> str:
    """Return the module that a public name of ``mtlbalance`` really comes from."""
    home: dict[str, str] = importlib.import_module("mtlbalance")._HOME
    return home.get(name, "mtlbalance")


def imports_of(source: str, module: str, is_package: bool, modules: dict[str, Path]) -> Imports:
    imports = Imports()
    for statement, waits in walk(ast.parse(source)):
        (imports.lazily if waits else imports.at_import).update(
            targets(statement, module, is_package, modules)
        )
    return imports


def imports_in(path: Path, module: str, modules: dict[str, Path]) -> Imports:
    return imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", modules)


def floor_of(module: str) -> int:
    top = ".".join(module.split(".")[:2])
    assert top in FLOORS, f"{module} is on no floor: say in this test on which it belongs"
    return FLOORS[top]


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "mtlbalance"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    imports = imports_in(MODULES[module], module, MODULES)
    upward = {name for name in ours(imports.all) if floor_of(name) > floor_of(module)}
    assert not upward, f"{module} (floor {floor_of(module)}) imports from above: {sorted(upward)}"


@pytest.mark.parametrize("module", [name for name in MODULES if floor_of(name) < 2])
def test_the_lower_floors_need_torch_alone(module: str) -> None:
    imports = imports_in(MODULES[module], module, MODULES)
    foreign = {name.split(".")[0] for name in imports.all} - set(sys.stdlib_module_names) - {"mtlbalance"}
    assert foreign <= ALLOWED_BELOW_FLOOR_2[floor_of(module)]


@pytest.mark.parametrize("module", [name for name in MODULES if floor_of(name) in (0, 2)])
def test_torch_is_never_imported_with_plugins_or_config(module: str) -> None:
    imports = imports_in(MODULES[module], module, MODULES)
    assert not {name for name in imports.at_import if name.split(".")[0] == "torch"}
    assert not {name for name in ours(imports.at_import) if floor_of(name) == 1}, "floor 1 imports torch"


def test_no_module_needs_itself_to_be_imported() -> None:
    graph = {
        module: ours(imports_in(path, module, MODULES).at_import) - {module}
        for module, path in MODULES.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_the_example_stands_on_public_ground() -> None:
    """A plugin needs the slots, the hooks and the lower floors, never the trainer or the command line."""
    modules = modules_under(EXAMPLE / "mtlbalance_cmapss")
    assert modules, "the example package is gone: this test would pass without looking at anything"
    for module, path in modules.items():
        above = {name for name in ours(imports_in(path, module, MODULES).all) if floor_of(name) > 2}
        assert not above, f"{module} imports {sorted(above)}"


def test_files_are_short_and_have_a_subject() -> None:
    files = [*(ROOT / "mtlbalance").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
    grab_bags = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [name for name in lengths if Path(name).name in grab_bags] == []


def test_the_parser_sees_what_it_must() -> None:
    source = """
from __future__ import annotations
import mtlbalance.errors
from typing import TYPE_CHECKING
from mtlbalance import GABALoss
from mtlbalance.plugins import hookspecs, hookimpl
from . import registrations
if TYPE_CHECKING:
    from mtlbalance.cli import main
else:
    import mtlbalance.slots
def later():
    try:
        from mtlbalance.training import trainer
    except ImportError:
        pass
"""
    imports = imports_of(source, "mtlbalance.plugins.x", is_package=False, modules=MODULES)
    assert ours(imports.at_import) == {
        "mtlbalance.errors",
        "mtlbalance.balancers.gaba",
        "mtlbalance.plugins.hookspecs",
        "mtlbalance.plugins",
        "mtlbalance.plugins.registrations",
        "mtlbalance.slots",
    }
    assert {name.removesuffix(".trainer") for name in imports.lazily} == {"mtlbalance.training"}
