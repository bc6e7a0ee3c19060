"""The command as a process: exit codes, pipes, broken plugins and what is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = 'dataset.name = "toy"\nbackbone.name = "mlp"\nbalancer.name = "gaba"\n'


def mtlbalance(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mtlbalance", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [["validate", "study.toml"], ["config", "show", "study.toml"], ["plugins", "list"]]
)
def test_looking_needs_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "study.toml").write_text(CONFIG)
    code = (
        "import sys; from mtlbalance.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or [name for name in ('torch', 'pandas') if name in sys.modules] or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_file(tmp_path: Path) -> None:
    done = mtlbalance("validate", "gone.toml", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no such config file\n  --> gone.toml\n"


def test_a_broken_installed_plugin_is_a_warning_and_a_row(tmp_path: Path) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mtlbalance]\nacme = acme\n")
    (tmp_path / "acme.py").write_text("raise RuntimeError('[no] licence')\n")
    place = {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    reason = f"RuntimeError: [no] licence (at {tmp_path}/acme.py:1)"
    for extra in ({}, {"PYTHONWARNINGS": "error"}):
        done = mtlbalance("plugins", "list", "--json", folder=tmp_path, **place, **extra)
        assert done.returncode == 0
        assert done.stderr == (
            "warning: plugin 'acme' of distribution acme 1.0 cannot be used: "
            f"RuntimeError: [no] licence (at {tmp_path}/acme.py:1)\n"
        )
        [row] = [row for row in json.loads(done.stdout) if row["status"] == "broken"]
        assert (row["name"], row["plugin"], row["version"]) == ("acme", "acme", "1.0")
        assert row["summary"] == reason
    done = mtlbalance("plugins", "describe", "acme", folder=tmp_path, **place)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: plugin 'acme' of distribution acme 1.0 cannot be used: {reason}\n")


def test_a_pipe_that_closes_early(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(CONFIG)
    command = f"'{sys.executable}' -m mtlbalance config show study.toml | true"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
