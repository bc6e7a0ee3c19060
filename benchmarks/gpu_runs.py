"""Runs and sweeps as parts of on_gpu.py: they save and stop when their time is up, and go on in their next turn."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from gpu_turns import EXAMPLE, ROOT, Setting, Turn, environment

SECONDS_TO_SAVE = 60.0  # for a run that was asked to stop
_STOPPED = (75, 128 + signal.SIGTERM, -signal.SIGTERM)
_TABLE = Path(__file__).with_name("gpu_table.toml")
_TOY = """\
[run]
name = "toy"
[dataset]
name = "toy"
samples = 200
[backbone]
name = "mlp"
[balancer]
name = "gaba"
[training]
epochs = 2
"""


def study_run(name: str, config: str) -> Callable[[Setting, float], Turn]:
    """Return a part that trains one run of the study, and goes on from its checkpoint in every turn."""

    def take(setting: Setting, seconds: float) -> Turn:
        folder = setting.out / name
        words = [
            "run",
            str(EXAMPLE / config),
            f"run.device={setting.device}",
            "--out",
            str(folder),
            "--quiet",
        ]
        if setting.quick:
            toy = setting.out / "toy.toml"
            toy.write_text(_TOY, encoding="utf-8")
            words[1] = str(toy)
        elif not _has_data():
            words.append("dataset.source=simulated")
        code = _mtlbalance(setting, name, words, seconds)
        said = run_line(folder) if (folder / "metrics.csv").exists() else "no epoch has ended yet"
        return _turn_of(code, (f"{config}, seed 42", said), f"{name}.log")

    return take


def _turn_of(code: int, line: tuple[str, str], log: str) -> Turn:
    """Return the turn of a command that ended with this exit code."""
    if code == 0:
        return Turn("done", [line])
    if code in _STOPPED:
        return Turn("going on", [line], "call again to go on")
    return Turn("failed", [line], f"exit code {code}, see {log}")


def run_line(folder: Path) -> str:
    """Say how far a run is, how long an epoch takes, and how good it is."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = sorted(float(row["seconds"]) for row in rows[1:] or rows)  # the first one has the warm-up
    parts = [f"{len(rows)} epochs", f"{seconds[len(seconds) // 2]:.2f} s an epoch"]
    if "rmse_last" in rows[0]:
        best = min(rows, key=lambda row: float(row["rmse_last"]))
        parts.append(f"best RMSE {float(best['rmse_last']):.2f} at epoch {best['epoch']}")
    results = folder / "results.json"
    if results.exists():
        found = json.loads(results.read_text(encoding="utf-8"))
        parts.append(f"finished ({found['stopped']}), data: {found['data_source']}")
    elif not _has_data():
        parts.append("data: simulated")
    return ", ".join(parts)


def study_table(setting: Setting, seconds: float) -> Turn:
    """Train the runs of gpu_table.toml by a sweep, four at a time; finished ones stay as they are."""
    if not _has_data():
        return Turn("skipped", [], "needs NASA's files: set MTLBALANCE_CMAPSS_DIR")
    folder = setting.out / "table"
    words = [
        "sweep",
        "run",
        str(_TABLE),
        "--out",
        str(folder),
        "--per-device",
        "4",
        "--quiet",
    ]
    code = _mtlbalance(setting, "table", words, seconds)
    axes = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["axes"]
    planned = 1
    for points in axes.values():
        planned *= len(points)
    finished = len(list(folder.rglob("results.json")))
    said = f"{finished} of {planned} finished; mtlbalance sweep report {folder.name}"
    return _turn_of(code, ("runs of the table", said), "table.log")


def _mtlbalance(setting: Setting, name: str, words: Sequence[str], seconds: float) -> int:
    """Run a command of ours, which saves and stops when its time is up; return its exit code."""
    with (setting.out / f"{name}.log").open("a", encoding="utf-8") as log:
        if not setting.on_cuda:
            with redirect_stdout(log), redirect_stderr(log):
                return importlib.import_module("mtlbalance.cli.main").main(words)  # type: ignore[no-any-return]
        command = [sys.executable, "-m", "mtlbalance", *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            return process.wait(max(1.0, seconds - SECONDS_TO_SAVE / 2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _has_data() -> bool:
    return bool(os.environ.get("MTLBALANCE_CMAPSS_DIR"))
