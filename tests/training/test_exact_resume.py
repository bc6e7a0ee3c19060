"""Stopped inside an epoch and resumed, a run equals one that never was, bit for bit, for every balancer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlbalance.plugins.manager import load_plugins
from mtlbalance.training import run_training

BALANCERS = load_plugins(entry_points=False).names("balancer")
REQUIRED = {"biased_task": "level", "target_cap": 10.0}
SHORT = ("training.epochs=2", "training.lr=0.1", "training.scheduler_patience=0", "training.warmup_epochs=1")


def options_of(method: str) -> list[str]:
    config = load_plugins(entry_points=False).get("balancer", method).config
    required = [name for name, option in config.model_fields.items() if option.is_required()]
    small = {"warmup_steps": 2, "update_every": 2}
    return [f"balancer.name={method}"] + [
        f"balancer.{name}={REQUIRED.get(name, small.get(name))}" for name in config.model_fields
        if name in required or name in small
    ]  # fmt: skip


@pytest.mark.parametrize("method", BALANCERS)
def test_every_balancer_resumes_inside_an_epoch(
    configure: Any, plugin: Any, assert_same: Any, stop_after: Any, tmp_path: Path, method: str
) -> None:
    """Both batch paths: the whole run indexes tensors, the one in parts goes through a DataLoader."""
    options = [*options_of(method), *SHORT]
    whole = run_training(configure(*options), out=tmp_path / "whole", quiet=True).run_dir
    parts = configure(*options, "dataset.storage=items")
    for steps in (2, 2, 1):  # inside an epoch, at the end of its batches, inside the last one
        stop_after(steps, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            run_training(parts, out=tmp_path / "parts", quiet=True)
        assert stopped.value.code == 75
        torch.rand(3)
    assert run_training(parts, out=tmp_path / "parts", quiet=True).status == "finished"
    assert_same(whole, tmp_path / "parts", ("config_hash",))
    starts = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["after_step"] for line in starts if line["event"] == "resumed"] == [2, 4, 5]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["fixed", "gaba", "uncertainty", "upgrad"])
def test_low_precision_resumes_inside_an_epoch(
    configure: Any,
    plugin: Any,
    assert_same: Any,
    stop_after: Any,
    tmp_path: Path,
    precision: str,
    method: str,
) -> None:
    config = configure(*options_of(method), *SHORT, "training.epochs=4", f"training.precision={precision}")
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    stop_after(2, signal.SIGINT)  # in fp16 the scaler leaves out the steps before
    with pytest.raises(KeyboardInterrupt):
        run_training(config, out=tmp_path / "parts", quiet=True)
    run_training(config, out=tmp_path / "parts", quiet=True)
    assert_same(whole, tmp_path / "parts")


def test_random_samples_are_the_same_however_they_are_loaded(
    configure: Any, plugin: Any, assert_same: Any, stop_after: Any, tmp_path: Path
) -> None:
    """Samples that draw from Python, NumPy and torch: in this process, in two others, and after a stop."""
    config = configure(*SHORT, "dataset.storage=items", "dataset.noise=0.1")
    elsewhere = configure(*SHORT, "dataset.storage=items", "dataset.noise=0.1", "training.num_workers=2")
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    stop_after(6, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_training(elsewhere, out=tmp_path / "parts", quiet=True)
    run_training(elsewhere, out=tmp_path / "parts", quiet=True)
    assert_same(whole, tmp_path / "parts")
    quiet = run_training(configure(*SHORT, "dataset.storage=items"), out=tmp_path / "quiet", quiet=True)
    assert quiet.results["metrics"] != json.loads((whole / "results.json").read_text())["metrics"]


def test_a_long_epoch_is_saved_inside(configure: Any, plugin: Any, assert_same: Any, tmp_path: Path) -> None:
    """Killed for good at some step: the run goes on from a checkpoint of that epoch."""
    config = configure("training.epochs=2", "dataset.samples=960", "training.checkpoint_minutes=1e-9")
    whole = run_training(
        configure("training.epochs=2", "dataset.samples=960"), out=tmp_path / "whole", quiet=True
    )
    command = ["run", str(config.source), "training.epochs=2", "dataset.samples=960",
               "training.checkpoint_minutes=1e-9", "--out", str(tmp_path / "killed")]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "mtlbalance", *command, "--quiet"], env=os.environ, stderr=subprocess.PIPE
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("epoch_00001_at_*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    run_training(config, out=tmp_path / "killed", quiet=True)
    assert_same(whole.run_dir, tmp_path / "killed")
    events = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    [resumed] = [event for event in events if event["event"] == "resumed"]
    assert resumed["after_step"] > 60  # inside the second epoch of 60 steps
    assert sorted(
        path.name for path in checkpoints.iterdir() if "_at_" in path.name and path.suffix == ".json"
    )
