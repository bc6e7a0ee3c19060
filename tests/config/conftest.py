from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from mtlbalance.config import InvalidConfigError, load_config


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    """Forget the modules that a test's plugins brought, so that tests may reuse names."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("acme", "broken", "clash", "other"):
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write ``study.toml`` into an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def write_config(text: str) -> Path:
        path = Path("study.toml")
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write_config


@pytest.fixture
def problems(write: Callable[[str], Path]) -> Callable[..., str]:
    """Return what a user reads for ``study.toml`` with this text and these overrides."""

    def read_problems(text: str, *overrides: str) -> str:
        with pytest.raises(InvalidConfigError) as caught:
            load_config(write(text), overrides)
        assert caught.value.exit_code == 2
        return str(caught.value)

    return read_problems
