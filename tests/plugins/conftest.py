from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

BALANCER = """\
from mtlbalance.plugins import BalancerRegistration, FromClass, PluginConfig, hookimpl

class Options(PluginConfig):
    share: float = 0.5

@hookimpl
def register_balancers():
    return [BalancerRegistration("{name}", "{name} of a test", Options, FromClass("acme_math:Loss"))]
"""


@pytest.fixture(autouse=True)
def _forget(clean_imports: None) -> None:
    """Every test here may reuse names."""


@pytest.fixture
def balancer() -> Callable[[str], str]:
    """Return the text of a plugin module that registers one balancer of that name."""
    return lambda name: BALANCER.format(name=name)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on ``sys.path``."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def install(site: Path) -> Callable[..., None]:
    """Install a distribution of one module into ``site``, with real metadata."""

    def install_distribution(name: str, module: str, text: str, *values: str, version: str = "1.0") -> None:
        if text:
            (site / f"{module}.py").write_text(dedent(text))
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = "".join(f"{name}-{n} = {value}\n" for n, value in enumerate(values or (module,)))
        (info / "entry_points.txt").write_text("[mtlbalance]\n" + lines)

    return install_distribution
