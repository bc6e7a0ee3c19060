"""The command as a process: exit codes, pipes, broken plugins and what is imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


def test_streams_that_are_closed_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(CONFIG)
    command = f"exec '{sys.executable}' -m mtlbalance config show study.toml >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def catches(pid: int, signum: int) -> bool:
    """Return whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.0, 0.15, 0.5, 1.0, 2.0])
def test_a_signal_at_any_moment(tmp_path: Path, signum: int, seconds: float) -> None:
    (tmp_path / "study.toml").write_text(CONFIG)
    endless = ["training.epochs=100000", "training.patience=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtlbalance", "run", "study.toml", "--json", *endless],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not catches(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    expected, word = (75, "pre-empted") if signum == signal.SIGTERM else (130, "interrupted")
    assert process.returncode == expected, err
    assert f"{word}; the run goes on when it is started again" in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["exit_code"] == expected


def test_other_commands_speak_of_no_run(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, mtlbalance.cli.main as m; sys.argv = ['mtlbalance', 'validate', 'x'];"
        "m.main = lambda: os.kill(os.getpid(), signal.SIGINT); m.run_cli()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
