"""Ranks that share every batch give the run of one process: every balancer, uneven shares, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from filelock import FileLock

from mtlbalance.plugins.manager import load_plugins
from mtlbalance.training import run_training
from mtlbalance.training.batches import ShuffleOrder
from mtlbalance.training.run_folder import open_run_folder
from mtlbalance.training.team import Team

WORKER = Path(__file__).with_name("ranks_worker.py")
BALANCERS = load_plugins(entry_points=False).names("balancer")
REQUIRED = {"biased_task": "level", "target_cap": 10.0}
# No BatchNorm and no dropout, float64; batches of 15 and a last one of 7, which two ranks cannot share evenly.
EXACT = ("backbone.normalise=false", "backbone.dropout=0.0", "backbone.float64=true", "dataset.float64=true",
         "dataset.samples=37", "training.batch_size=15", "training.epochs=2", "training.warmup_epochs=1")  # fmt: skip
pytestmark = pytest.mark.xdist_group("training-ranks")


def options_of(method: str) -> list[str]:
    config = load_plugins(entry_points=False).get("balancer", method).config
    required = [name for name, option in config.model_fields.items() if option.is_required()]
    given = {name: REQUIRED[name] for name in required} | (
        {"warmup_steps": 2} if "warmup_steps" in config.model_fields else {}
    )
    return [*EXACT, f"balancer.name={method}", *(f"balancer.{name}={value}" for name, value in given.items())]


def in_ranks(config_path: Path, folder: Path, runs: dict[str, list[str]], world: int) -> None:
    shutil.copy(config_path, folder / "trial.toml")
    (folder / "runs.json").write_text(json.dumps(runs))
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any, config_text: str) -> Path:
    """Every balancer's run by two ranks, two more by three, and one through a DataLoader."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "training-ranks"
    with FileLock(f"{folder}.lock"):  # one for all test processes
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _run_everything(folder, config_text)
            (folder / "done").touch()
    return folder


def _run_everything(folder: Path, config_text: str) -> None:
    path = folder / "trial.toml"
    path.write_text(config_text.replace("OUTPUT", str(folder / "runs")))
    runs = {method: options_of(method) for method in BALANCERS}
    runs["loaded"] = [*options_of("gaba"), "dataset.storage=items", "dataset.noise=0.1"]
    runs["unmeasured"] = [*options_of("gaba"), "balancer.sync=none"]
    for name in ("noisy", "stopped"):  # BatchNorm and dropout
        runs[name] = ["training.epochs=2", "dataset.samples=41", "balancer.name=rgw"]
    for name in ("augmented", "unreadable"):
        runs[name] = [*runs["noisy"], "dataset.storage=items", "dataset.noise=0.1"]
    runs["locked"] = []
    with open_run_folder(folder / "two" / "locked") as locked:
        locked.config_path.write_text("")
        in_ranks(path, folder / "two", runs, 2)


def assert_close(found: Path, expected: Path, read_csv: Any) -> None:
    first, second = (safetensors.torch.load_file(path / "model.safetensors") for path in (found, expected))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=1e-6, atol=1e-7, msg=name
        )  # task weights are float32
    for name in ("metrics.csv", "gradient_stats.csv"):
        rows = [read_csv(path / name, ("seconds",)) for path in (found, expected)]
        assert len(rows[0]) == len(rows[1]) > 0
        for ours, theirs in zip(*rows, strict=True):
            assert ours.keys() == theirs.keys()
            for column, value in ours.items():
                assert (value == "") == (theirs[column] == ""), column
                if value:
                    assert float(value) == pytest.approx(float(theirs[column]), rel=2e-6), column


@pytest.mark.parametrize("method", BALANCERS)
def test_two_ranks_give_the_run_of_one(
    configure: Any, plugin: Any, ranks: Path, read_csv: Any, tmp_path: Path, method: str
) -> None:
    alone = run_training(configure(*options_of(method)), out=tmp_path / "alone", quiet=True)
    assert_close(ranks / "two" / method, alone.run_dir, read_csv)
    found = json.loads((ranks / "two" / method / "results.json").read_text())
    assert found["best_epoch"] == alone.results["best_epoch"]
    assert found["metrics"] == pytest.approx(alone.results["metrics"], rel=1e-7)
    expected = alone.results["weights"]  # None where a method has no task weights
    assert found["weights"] == (expected if None in expected.values() else pytest.approx(expected, rel=1e-6))
    environment = json.loads((ranks / "two" / method / "environment.json").read_text())
    assert environment["ranks"] == 2


def test_a_signal_to_one_rank_stops_all_and_they_go_on_exactly(ranks: Path, assert_same: Any) -> None:
    """With BatchNorm and dropout: every rank's generators are saved."""
    assert_same(ranks / "two" / "noisy", ranks / "two" / "stopped")
    log = (ranks / "two" / "stopped" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in log] == ["started", "interrupted", "resumed", "finished"]
    assert json.loads(log[2])["after_step"] == 2


def test_a_sample_that_one_rank_cannot_read_ends_all_of_them_and_what_was_trained_is_saved(
    ranks: Path, assert_same: Any
) -> None:
    """With random samples and dropout: reading one to look at its shape must not move the generators either."""
    messages = [(ranks / "two" / f"unreadable.rank{rank}").read_text() for rank in range(2)]
    assert messages[0] == "2 OtherRankError another rank cannot read its batch; see its message"
    assert messages[1].startswith("2 DataError dataset 'pairs' could not read its training set: OSError")
    log = [json.loads(line) for line in (ranks / "two" / "unreadable" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in log] == ["started", "failed", "resumed", "finished"]
    assert (log[1]["exit_code"], log[2]["after_step"]) == (2, 2)
    assert_same(ranks / "two" / "augmented", ranks / "two" / "unreadable")


def test_so_does_a_data_loader_with_random_samples(
    configure: Any, plugin: Any, ranks: Path, read_csv: Any, tmp_path: Path
) -> None:
    config = configure(*options_of("gaba"), "dataset.storage=items", "dataset.noise=0.1")
    assert_close(
        ranks / "two" / "loaded", run_training(config, out=tmp_path / "alone", quiet=True).run_dir, read_csv
    )


def test_without_agreement_ranks_give_another_run(
    configure: Any, plugin: Any, ranks: Path, read_csv: Any, tmp_path: Path
) -> None:
    """A comparison that could not fail would show nothing."""
    alone = run_training(configure(*options_of("gaba")), out=tmp_path / "alone", quiet=True)
    with pytest.raises(AssertionError):
        assert_close(ranks / "two" / "unmeasured", alone.run_dir, read_csv)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_shares_weigh_every_sample_alike(size: int, batch_size: int) -> None:
    values = torch.arange(10.0, dtype=torch.float64) ** 2
    means: dict[int, list[float]] = {}
    for rank in range(size):
        team = Team()
        team.rank, team.size = rank, size  # type: ignore[misc]
        order = ShuffleOrder(10, batch_size, drop_last=False, seed=1)
        numbers, _ = order.draw()
        for position, (own, whole, weight) in enumerate(order.shares(numbers, team)):
            assert whole == len(numbers[position * batch_size :][:batch_size])
            found = values[own] if weight is None else values[own] * weight
            means.setdefault(position, []).append(float(found.mean()))
    numbers, _ = ShuffleOrder(10, batch_size, drop_last=False, seed=1).draw()
    expected = [float(values[batch].mean()) for batch in torch.split(numbers, batch_size)]
    assert [np.mean(found) for found in means.values()] == pytest.approx(expected, rel=1e-12)


def torchrun(config: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "mtlbalance", "run", str(config), *overrides, "--out", str(out), "--json",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_torchrun_stopped_by_a_signal_and_finished_by_one_process(
    configure: Any, plugin: Any, read_csv: Any, tmp_path: Path
) -> None:
    overrides = [*options_of("gaba"), "dataset.samples=400", "training.batch_size=11", "training.epochs=20"]
    config = configure(*overrides)
    out = tmp_path / "run"
    process = torchrun(config.source, out, *overrides)
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert not (out / "results.json").exists(), "too fast to be stopped"
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "interrupted"], err
    run_training(config, out=out, quiet=True)
    assert_close(out, run_training(config, out=tmp_path / "alone", quiet=True).run_dir, read_csv)


def test_what_rank_0_cannot_do_ends_all_of_them(ranks: Path) -> None:
    """Its folder is in use: it says so, and the others say where to look, with the same exit code."""
    messages = [(ranks / "two" / f"locked.rank{rank}").read_text() for rank in range(2)]
    assert messages[0].startswith("2 RunFolderError")
    assert "is in use by another process" in messages[0]
    assert messages[1] == "2 OtherRankError rank 0 could not go on; see its message"
