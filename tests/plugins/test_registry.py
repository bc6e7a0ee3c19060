"""Built-ins, plugins that a config lists, and how the registry answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from mtlbalance.errors import PluginError
from mtlbalance.plugins import BrokenPlugin, FromClass, PluginConfig, load_plugins, resolve_build

Text = Callable[[str], str]


def only_problem(folder: Path, listed: str) -> BrokenPlugin:
    registry = load_plugins([listed], folder, entry_points=False)
    [broken] = registry.broken
    assert broken.listed_index == 0
    assert registry.resolved_plugins == ()
    assert [row.status for row in registry.rows() if row.name == listed] == ["broken"]
    return broken


def test_builtins() -> None:
    registry = load_plugins(entry_points=False)
    assert registry.names("dataset") == ["toy"]
    assert registry.names("backbone") == ["mlp"]
    balancers = registry.names("balancer")
    assert {"amnl", "fixed", "gaba", "grace", "pcgrad", "mgda", "nash-mtl"} <= set(balancers)
    assert balancers == sorted(balancers)
    assert {(row.plugin, row.status) for row in registry.rows()} == {("built-in", "ok")}
    assert registry.broken == []


def test_unknown_names_are_answered_with_what_exists() -> None:
    registry = load_plugins(entry_points=False)
    with pytest.raises(PluginError) as caught:
        registry.get("balancer", "gabba")
    listed = ", ".join(registry.names("balancer"))
    assert str(caught.value) == f"unknown balancer 'gabba'; did you mean 'gaba'?\navailable: {listed}"
    with pytest.raises(PluginError, match="unknown tracker 'x'\navailable: none"):
        registry.get("tracker", "x")


@pytest.mark.parametrize("module", ["mtlbalance.plugins", "mtlbalance.config", "mtlbalance.cli.app"])
def test_importing_is_light(module: str) -> None:
    code = (
        f"import sys, {module}; from mtlbalance.plugins import load_plugins; load_plugins().rows();"
        "print([name for name in ('torch', 'pandas', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("listed", ["acme", "acme.py", "./acme.py", "../here/acme.py"])
def test_module_beside_the_config(tmp_path: Path, balancer: Text, listed: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "acme.py").write_text(balancer("acme-loss"))
    registry = load_plugins([listed], here, entry_points=False)
    assert registry.broken == []
    assert registry.get("balancer", "acme-loss").summary == "acme-loss of a test"
    assert registry.resolved_plugins == (str(here / "acme.py"),)
    [row] = [row for row in registry.rows() if row.plugin != "built-in"]
    assert (row.slot, row.name, row.plugin, row.status) == ("balancer", "acme-loss", "acme", "ok")


@pytest.mark.parametrize("listed", ["acme", "acme.hooks", "acme/hooks.py"])
def test_package_beside_the_config(tmp_path: Path, balancer: Text, listed: str) -> None:
    package = tmp_path / "acme"
    package.mkdir()
    text = balancer("acme-loss").replace("acme_math:Loss", "acme.math:Loss")
    (package / "__init__.py").write_text("" if "hooks" in listed else "from acme.hooks import *\n")
    (package / "hooks.py").write_text(text)
    (package / "math.py").write_text(
        "class Loss:\n    def __init__(self, tasks, share): self.share = share\n"
    )
    registry = load_plugins([listed], tmp_path, entry_points=False)
    assert registry.broken == []
    registration = registry.get("balancer", "acme-loss")
    built = resolve_build(registration)(registration.config(share=0.25), [])
    assert built.share == 0.25
    # The resolved entry finds the same plugin from another folder, and only once beside the first.
    again = load_plugins([listed, *registry.resolved_plugins], tmp_path, entry_points=False)
    assert again.broken == []
    assert again.resolved_plugins == registry.resolved_plugins


def test_installed_module_is_listed_by_name(site: Path, tmp_path: Path, balancer: Text) -> None:
    (site / "acme_installed.py").write_text(balancer("acme-loss"))
    registry = load_plugins(["acme_installed", "acme_installed"], tmp_path, entry_points=False)
    assert registry.names("balancer").count("acme-loss") == 1
    assert registry.resolved_plugins == ("acme_installed",)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("acme_gone", "no module 'acme_gone' is installed, and none lies beside the config"),
        ("./acme_gone.py", "there is no {folder}/acme_gone.py"),
        ("./acme.txt", "it is not a Python module"),
        ("acme loss", "it is neither a module name nor a path"),
        ("./project", "it is a folder without __init__.py; did you mean 'project/acme_inside'?"),
        ("./empty", "it is a folder without __init__.py"),
    ],
)
def test_listed_plugins_that_are_not_there(tmp_path: Path, listed: str, reason: str) -> None:
    (tmp_path / "acme.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "project" / "acme_inside").mkdir(parents=True)
    (tmp_path / "project" / "acme_inside" / "__init__.py").touch()
    assert only_problem(tmp_path, listed).reason == reason.format(folder=tmp_path)


NO_REGISTRATION = "from mtlbalance.plugins import *\n@hookimpl\ndef register_balancers():\n"
REGISTRATION = "    return [BalancerRegistration({}, {}, {}, {})]\n"


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("import acme_missing_part\n", "ModuleNotFoundError: No module named 'acme_missing_part'", 1),
        ("x = 1\nx +\n", "SyntaxError: invalid syntax", 2),
        ("def deep():\n    return {}['key']\n\ndeep()\n", "KeyError: 'key'", 2),
        ("import sys\nsys.exit('no licence')\n", "SystemExit: no licence", 2),
        ("x = 1\n", "it implements no hook; decorate its functions with mtlbalance.plugins.hookimpl", 0),
        (NO_REGISTRATION + "    raise ValueError('no GPU')\n", "ValueError: no GPU", 4),
        (
            NO_REGISTRATION + "    pass\n",
            "register_balancers returned None, but must return a list of BalancerRegistration objects",
            0,
        ),
        (
            NO_REGISTRATION + "    return ['gaba']\n",
            "register_balancers gave an object of type str, but must give BalancerRegistration objects",
            0,
        ),
        (
            NO_REGISTRATION + REGISTRATION.format("'My Loss'", "'text'", "PluginConfig", "print"),
            "balancer 'My Loss': a name is in kebab case, such as 'my-balancer'",
            0,
        ),
        (
            NO_REGISTRATION + REGISTRATION.format("'x'", "''", "PluginConfig", "print"),
            "balancer 'x': summary must be one line of text",
            0,
        ),
        (
            NO_REGISTRATION + REGISTRATION.format("'x'", "'text'", "dict", "print"),
            "balancer 'x': config must be a subclass of mtlbalance.plugins.PluginConfig",
            0,
        ),
        (
            NO_REGISTRATION + REGISTRATION.format("'x'", "'text'", "PluginConfig", "'acme.Loss'"),
            "balancer 'x': build 'acme.Loss' is not of the form 'module:attribute'",
            0,
        ),
        (
            NO_REGISTRATION + REGISTRATION.format("'x'", "'text'", "PluginConfig", "3"),
            "balancer 'x': build must be a callable or 'module:attribute', not an object of type int",
            0,
        ),
        (
            NO_REGISTRATION + "    one = BalancerRegistration('x', 'text', PluginConfig, print)\n"
            "    yield one\n    yield one\n",
            "register_balancers gave the balancer 'x' twice",
            0,
        ),
        (
            "from mtlbalance.plugins import hookimpl\n\n@hookimpl\ndef register_balancerz():\n    return []\n",
            "unknown hook 'register_balancerz'; did you mean 'register_balancers'? (at {file}:3)",
            0,
        ),
    ],
)
def test_listed_plugins_that_fail(tmp_path: Path, text: str, reason: str, line: int) -> None:
    file = tmp_path / "acme.py"
    file.write_text(text)
    broken = only_problem(tmp_path, "acme")
    assert broken.reason == reason.format(file=file)
    assert broken.place == (f"{file}:{line}" if line else "")
    assert load_plugins(["acme"], tmp_path, entry_points=False).broken == [broken]  # and again


def test_hook_with_an_argument_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "acme.py").write_text(
        "from mtlbalance.plugins import hookimpl\n@hookimpl\ndef on_epoch_end(epoch, loss): ...\n"
    )
    assert "Argument(s) {'loss'}" in only_problem(tmp_path, "acme").reason


def test_two_modules_of_one_name(tmp_path: Path, balancer: Text) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "acme.py").write_text(balancer(f"acme-{folder}"))
    first = load_plugins(["acme"], tmp_path / "one", entry_points=False)
    assert first.broken == []
    reason = only_problem(tmp_path / "two", "acme").reason
    assert reason == (
        f"module 'acme' is already imported from {tmp_path}/one/acme.py, "
        f"so {tmp_path}/two/acme.py cannot be imported beside it; rename one of them"
    )


def test_one_broken_plugin_costs_only_itself(tmp_path: Path, balancer: Text) -> None:
    (tmp_path / "acme_bad.py").write_text("1 / 0\n")
    (tmp_path / "acme_good.py").write_text(balancer("acme-loss"))
    registry = load_plugins(["acme_bad", "acme_good"], tmp_path, entry_points=False)
    assert [broken.name for broken in registry.broken] == ["acme_bad"]
    assert registry.resolved_plugins == (str(tmp_path / "acme_good.py"),)
    assert {"gaba", "acme-loss"} <= set(registry.names("balancer"))


def test_a_name_that_two_plugins_bring(tmp_path: Path, balancer: Text) -> None:
    (tmp_path / "acme.py").write_text(balancer("gaba"))
    with pytest.warns(UserWarning, match="the balancer 'gaba' is registered by plugin 'built-in"):
        registry = load_plugins(["acme"], tmp_path, entry_points=False)
    with pytest.raises(PluginError) as caught:
        registry.get("balancer", "gaba")
    assert "by plugin 'built-in 0.1.0' and plugin 'acme'; uninstall or no longer list one" in str(
        caught.value
    )
    assert [row.status for row in registry.rows() if row.name == "gaba"] == ["duplicate", "duplicate"]
    assert registry.get("balancer", "fixed")


def test_observers_are_called_through_the_relay(tmp_path: Path) -> None:
    (tmp_path / "acme.py").write_text(
        dedent("""\
        from mtlbalance.plugins import hookimpl
        seen = []

        @hookimpl
        def on_epoch_end(epoch, metrics):
            seen.append((epoch, metrics))
        """)
    )
    registry = load_plugins(["acme"], tmp_path, entry_points=False)
    registry.hook.on_epoch_end(run_dir=tmp_path, epoch=3, metrics={"rmse": 1.0})
    assert sys.modules["acme"].seen == [(3, {"rmse": 1.0})]
    assert [row.name for row in registry.rows() if row.slot == "observer"] == ["acme"]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ("acme_nothing:build", "cannot import 'acme_nothing' for 'acme_nothing:build': No module named"),
        ("math:sqrtt", "'math:sqrtt': there is no 'sqrtt'; did you mean 'sqrt'?"),
        ("math:pi", "'math:pi' is not callable"),
    ],
)
def test_import_strings_that_lead_nowhere(tmp_path: Path, balancer: Text, build: str, reason: str) -> None:
    text = balancer("acme-loss").replace('FromClass("acme_math:Loss")', repr(build))
    (tmp_path / "acme.py").write_text(text)
    registration = load_plugins(["acme"], tmp_path, entry_points=False).get("balancer", "acme-loss")
    with pytest.raises(PluginError) as caught:
        resolve_build(registration)
    assert str(caught.value).startswith("balancer 'acme-loss' cannot be built: ")
    assert reason in str(caught.value)


def test_class_that_is_not_there() -> None:
    with pytest.raises(PluginError, match="cannot import 'acme_nothing'"):
        FromClass("acme_nothing:Loss")(PluginConfig(), [])
