"""Projects that ``plugins new`` writes: as they are they pass tests and linters, and are found when installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from mtlbalance.cli.main import main
from mtlbalance.errors import PluginError
from mtlbalance.plugins import load_plugins
from mtlbalance.plugins.scaffold import write_plugin

ROOT = Path(__file__).parents[2]
SLOTS = ("balancer", "dataset", "backbone")
LONG = "a-name-as-long-as-they-come"


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One project a slot, as written."""
    folder = tmp_path_factory.mktemp("projects")
    for slot in SLOTS:
        write_plugin(f"acme-{slot}", slot, folder / slot)
    return {slot: folder / slot for slot in SLOTS}


def run(*arguments: str, cwd: Path, path: Iterable[Path] = ()) -> str:
    """Run a module; ``path`` is where it finds what is not installed."""
    python_path = os.pathsep.join(map(str, [ROOT, *path]))
    types_path = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": python_path, "MYPYPATH": types_path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass_as_it_is(projects: dict[str, Path]) -> None:
    assert " passed" in run("pytest", "-q", cwd=projects["balancer"])


def test_those_of_the_other_slots_pass(projects: dict[str, Path]) -> None:
    """In one process, for they take longer to import than to run."""
    others = [projects["dataset"], projects["backbone"]]
    assert " passed" in run("pytest", "-q", *map(str, others), cwd=others[0].parent, path=others)


@pytest.mark.parametrize("name", ["acme", LONG])
def test_it_is_formatted_and_lints_whatever_the_name(tmp_path: Path, name: str) -> None:
    for slot in SLOTS:
        write_plugin(f"{name}-{slot}", slot, tmp_path / slot)
        run("ruff", "check", "--no-cache", ".", cwd=tmp_path / slot)
        run("ruff", "format", "--no-cache", "--check", ".", cwd=tmp_path / slot)


def test_it_is_typed_to_the_strictest(projects: dict[str, Path]) -> None:
    """With our own settings, so that the cache of ``make lint`` serves."""
    packages = [argument for slot in SLOTS for argument in ("-p", f"acme_{slot}")]
    run("mypy", *packages, cwd=ROOT, path=list(projects.values()))


def test_installed_it_is_found_by_its_entry_point(
    projects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot, project in projects.items():
        monkeypatch.syspath_prepend(str(project))
        table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
        lines = [f"{key} = {value}" for key, value in table["entry-points"]["mtlbalance"].items()]
        info = tmp_path / f"acme_{slot}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {table['name']}\nVersion: {table['version']}\n"
        )
        (info / "entry_points.txt").write_text("\n".join(["[mtlbalance]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = load_plugins()
    for slot in SLOTS:
        assert str(registry.origin(slot, f"acme-{slot}")) == f"acme-{slot} 0.1.0"


@pytest.mark.parametrize("name", ["Acme", "acme_loss", "9lives", "acme-", "", "-x"])
def test_names_are_in_kebab_case(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match="kebab case"):
        write_plugin(name, "balancer", tmp_path / "project")
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize("name", ["json", "class", "mtlbalance"])
def test_a_module_that_exists_is_not_hidden(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match=f"would be the module '{name}', which exists already"):
        write_plugin(name, "dataset", tmp_path / "project")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PluginError, match="exists already and is not empty; nothing was written"):
        write_plugin("acme-loss", "balancer", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(PluginError, match="exists already"):
        write_plugin("acme-loss", "balancer", tmp_path / "notes.txt")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "acme-loss", "--slot", "balancer"]) == 0
    out = capfd.readouterr().out
    assert out.startswith(
        "wrote the balancer acme-loss to acme-loss:\n  README.md\n  acme_loss/__init__.py\n"
    )
    assert "  mtlbalance plugins check acme-loss --plugin ./acme_loss\n" in out
    assert main(["plugins", "new", "acme-loss", "--slot", "balancer"]) == 2
    assert "acme-loss exists already and is not empty" in capfd.readouterr().err
    assert main(["plugins", "new", "gaba", "--slot", "balancer"]) == 2
    assert capfd.readouterr().err.startswith("error: there is a balancer called 'gaba' already")
    assert main(["plugins", "new", "acme-set", "--slot", "dataset", "--out", "here", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["files"][2] == str(Path("here/acme_set/dataset.py"))
    assert main(["plugins", "new", "acme-x", "--slot", "balancr"]) == 2
    assert "did you mean 'balancer'" in capfd.readouterr().err
