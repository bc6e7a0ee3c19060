"""Installed plugins: each behind its own boundary, found through real distribution metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mtlbalance.plugins import PluginWarning, load_plugins

Install = Callable[..., None]
Text = Callable[[str], str]

MISSPELT = """\
from mtlbalance.plugins import hookimpl

@hookimpl
def register_balancerz():
    return []
"""


def test_good_beside_broken(install: Install, site: Path, balancer: Text) -> None:
    install("acme-bad", "acme_bad", "import acme_nowhere\n")
    install("acme-dup", "acme_dup", balancer("gaba"))
    install("acme-good", "acme_good", balancer("acme-loss"), version="2.1")
    install("acme-misspelt", "acme_misspelt", MISSPELT)
    with pytest.warns(PluginWarning) as caught:
        registry = load_plugins()
    warned = sorted(str(warning.message) for warning in caught if "acme" in str(warning.message))
    assert warned == [
        "plugin 'acme-bad-0' of distribution acme-bad 1.0 cannot be used: "
        f"ModuleNotFoundError: No module named 'acme_nowhere' (at {site}/acme_bad.py:1)",
        "plugin 'acme-misspelt-0' of distribution acme-misspelt 1.0 cannot be used: unknown hook "
        f"'register_balancerz'; did you mean 'register_balancers'? (at {site}/acme_misspelt.py:3)",
        "the balancer 'gaba' is registered by plugin 'built-in 0.1.0' and plugin 'acme-dup 1.0'; "
        "uninstall or no longer list one of them",
    ]
    rows = {
        (row.slot, row.name, row.plugin, row.version, row.status)
        for row in registry.rows()
        if "acme" in row.plugin
    }
    assert rows == {
        ("", "acme-bad-0", "acme-bad", "1.0", "broken"),
        ("", "acme-misspelt-0", "acme-misspelt", "1.0", "broken"),
        ("balancer", "gaba", "acme-dup", "1.0", "duplicate"),
        ("balancer", "acme-loss", "acme-good", "2.1", "ok"),
    }
    assert all(broken.listed_index is None for broken in registry.broken)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("acme_none", "ModuleNotFoundError: No module named 'acme_none'"),
        ("acme:missing", "AttributeError: module 'acme' has no attribute 'missing'"),
        ("no value!", "its entry point 'no value!' is not of the form 'module' or 'module:object'"),
    ],
)
def test_entry_points_that_lead_nowhere(install: Install, balancer: Text, value: str, reason: str) -> None:
    install("acme-plugin", "acme", balancer("acme-loss"), value)
    with pytest.warns(PluginWarning) as caught:
        registry = load_plugins()
    expected = f"plugin 'acme-plugin-0' of distribution acme-plugin 1.0 cannot be used: {reason}"
    assert expected in [str(warning.message) for warning in caught]
    assert "acme-plugin-0" in [broken.name for broken in registry.broken]


def test_two_objects_of_one_module(install: Install, balancer: Text) -> None:
    text = balancer("acme-loss") + (
        "\nclass Other:\n    @hookimpl\n    def register_balancers(self):\n"
        "        return [BalancerRegistration('acme-other', 'other', Options, print)]\n\nother = Other()\n"
    )
    install("acme-two", "acme", text, "acme", "acme:other")
    assert {"acme-loss", "acme-other"} <= set(load_plugins().names("balancer"))


def test_listed_and_installed_is_registered_once(install: Install, site: Path, balancer: Text) -> None:
    install("acme-plugin", "acme", balancer("acme-loss"))
    for listed in ("acme", str(site / "acme.py")):
        registry = load_plugins([listed], site.parent)
        assert registry.broken == []
        rows = [row for row in registry.rows() if row.name == "acme-loss"]
        assert [(row.plugin, row.version, row.status) for row in rows] == [("acme-plugin", "1.0", "ok")]


def test_a_copy_beside_the_config_replaces_the_installed_one(
    install: Install, tmp_path: Path, balancer: Text
) -> None:
    install("acme-plugin", "acme", balancer("acme-loss"))
    (tmp_path / "acme.py").write_text(balancer("acme-newer"))
    registry = load_plugins(["acme"], tmp_path)
    names = registry.names("balancer")
    assert "acme-newer" in names
    assert "acme-loss" not in names
    assert str(registry.origin("balancer", "acme-newer")) == "acme"  # not the installed version
    assert registry.resolved_plugins == (str(tmp_path / "acme.py"),)


def test_listing_the_module_of_an_entry_point_takes_its_object(install: Install, tmp_path: Path) -> None:
    text = (
        "from mtlbalance.plugins import *\n\nclass Plugin:\n    @hookimpl\n    def register_balancers(self):\n"
        "        return [BalancerRegistration('acme-loss', 'text', PluginConfig, print)]\n\nplugin = Plugin()\n"
    )
    install("acme-plugin", "acme", text, "acme:plugin")
    registry = load_plugins(["acme"], tmp_path)
    assert registry.broken == []
    assert "acme-loss" in registry.names("balancer")
