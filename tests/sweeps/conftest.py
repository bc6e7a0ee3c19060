from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

PLUGIN = Path(__file__).parent / "sweep_plugin.py"
BASE = f"""\
plugins = ["{PLUGIN}"]
dataset.name = "behaves"
backbone = {{ name = "mlp", hidden_sizes = [4] }}
balancer.name = "gaba"
training = {{ epochs = 2, warmup_epochs = 0 }}
run.device = "cpu"
"""

Write = Callable[[str], Path]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write ``study.toml`` and, with the text given, ``sweep.toml`` into an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def write_sweep(text: str) -> Path:
        Path("study.toml").write_text(BASE)
        path = Path("sweep.toml")
        path.write_text(dedent(text))
        return path

    return write_sweep


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start ``mtlbalance`` as a process in the current folder of the test."""

    def start_command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "mtlbalance", *arguments],
            cwd=tmp_path, env={**os.environ, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start_command
