"""A signal at every phase of a run: what is done is kept, what was asked for happens, and the run goes on exactly."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from mtlbalance.errors import TrainingError
from mtlbalance.training import run_training
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.stopping import StopRequest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def events_of(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, None), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_during_a_step(
    configure: Any,
    plugin: Any,
    assert_same: Any,
    stop_after: Any,
    tmp_path: Path,
    signum: int,
    code: int | None,
) -> None:
    config = configure("run.preempt_signal=USR1")
    whole = run_training(configure(), out=tmp_path / "whole", quiet=True).run_dir
    stop_after(6, signum)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        run_training(config, out=tmp_path / "parts", quiet=True)
    assert getattr(stopped.value, "code", None) == code
    saved = Checkpoints(tmp_path / "parts" / "checkpoints").latest()
    assert saved is not None
    assert (saved.state["epoch"], saved.state["step"], saved.state["unfinished"]["batches"]) == (0, 6, 2)
    assert run_training(config, out=tmp_path / "parts", quiet=True).status == "finished"
    assert_same(whole, tmp_path / "parts")


def test_during_evaluation_the_batches_are_not_trained_again(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path
) -> None:
    config = configure("training.eval_batch_size=8", "dataset.storage=items", "balancer.name=dwa")
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    plugin.signal_in["validation sample 9"] = signal.SIGTERM
    with pytest.raises(SystemExit):
        run_training(config, out=tmp_path / "parts", quiet=True)
    saved = Checkpoints(tmp_path / "parts" / "checkpoints").latest()
    assert saved is not None
    assert saved.state["unfinished"]["row"]["train_loss"] > 0
    plugin.reads.clear()
    run_training(config, out=tmp_path / "parts", quiet=True)
    assert plugin.reads["train"] == 1 + 5 * 60  # one to see that its targets fit; the first epoch was done
    assert_same(whole, tmp_path / "parts")


def test_during_a_checkpoint(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The signal comes between the files of one checkpoint: it is completed first."""
    whole = run_training(configure(), out=tmp_path / "whole", quiet=True).run_dir
    real, count = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if "checkpoints" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            count[0] += 1
            if count[0] == 8:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "parts", quiet=True)
    monkeypatch.undo()
    saved = Checkpoints(tmp_path / "parts" / "checkpoints").latest()
    assert saved is not None
    assert (saved.state["epoch"], saved.state["unfinished"]) == (1, None)
    run_training(configure(), out=tmp_path / "parts", quiet=True)
    assert_same(whole, tmp_path / "parts")


@pytest.mark.parametrize(("where", "left"), [("data", []), ("evaluation", None)])
def test_before_and_after_training_it_stops_at_once(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, where: str, left: list[str] | None
) -> None:
    config = configure("training.epochs=1")
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    if where == "evaluation":  # on the test set, after the last epoch
        plugin.signal_in["test set"] = signal.SIGINT
    else:
        plugin.signal_in["data"] = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        run_training(config, out=tmp_path / "parts", quiet=True)
    if left is not None:
        assert not (tmp_path / "parts").exists()
    run_training(config, out=tmp_path / "parts", quiet=True)
    assert_same(whole, tmp_path / "parts")


def test_a_second_ctrl_c_does_not_wait() -> None:
    request = StopRequest()
    with request.deferred():
        request.receive(signal.SIGTERM)
        request.receive(signal.SIGTERM)  # from a scheduler, and from torchrun as well
        assert request.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            request.receive(signal.SIGINT)
    with pytest.raises(SystemExit):
        StopRequest().receive(signal.SIGTERM)


def test_ctrl_c_twice_leaves_a_step_that_hangs(configure: Any, plugin: Any, tmp_path: Path) -> None:
    config = configure()
    command = [sys.executable, "-m", "mtlbalance", "run", str(config.source), "dataset.storage=items",
               "dataset.hangs_at=30", "--out", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for the step
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Ctrl-C stops at once" in err
    assert "Traceback" not in err


def test_ctrl_c_reaches_the_whole_group(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path
) -> None:
    """As from a terminal: the processes that load samples get it too, and the last step is finished all the same."""
    overrides = [
        "dataset.storage=items",
        "training.num_workers=1",
        "dataset.samples=400",
        "training.epochs=4",
    ]
    config = configure(*overrides)
    command = [sys.executable, "-m", "mtlbalance", "run", str(config.source), *overrides, "--quiet",
               "--out", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert events_of(tmp_path / "run")[-1] == "interrupted"
    run_training(config, out=tmp_path / "run", quiet=True)
    assert_same(run_training(config, out=tmp_path / "whole", quiet=True).run_dir, tmp_path / "run")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_loading_processes_that_die_in_the_middle_of_a_step(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, signum: int
) -> None:
    """SIGTERM to every process of a run, as from a scheduler; or SIGKILL to those that load, for want of memory."""
    config = configure(
        "dataset.storage=items", "training.num_workers=1", "dataset.samples=200", "training.epochs=2"
    )
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    steps = itertools.count(1)

    def hurt(*_: Any) -> None:
        if next(steps) != 3:
            return
        for child in multiprocessing.active_children():
            subprocess.run(["kill", f"-{signum:d}", str(child.pid)], check=True)  # not by its parent
            time.sleep(0.1)  # not joined: torch finds out by itself
        if signum == signal.SIGTERM:
            os.kill(os.getpid(), signum)

    handle = register_optimizer_step_post_hook(hurt)
    try:
        with pytest.raises((SystemExit, TrainingError), match=r"75|'pairs' has died, perhaps out of memory"):
            run_training(config, out=tmp_path / "parts", quiet=True)
    finally:
        handle.remove()
    saved = Checkpoints(tmp_path / "parts" / "checkpoints").latest()
    assert saved is not None
    assert saved.state["unfinished"]["batches"] >= 3  # of 13; what had been loaded by then is trained on
    run_training(config, out=tmp_path / "parts", quiet=True)
    assert_same(whole, tmp_path / "parts")


def test_a_signal_counts_although_nobody_reads_what_the_run_says(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    """As in ``mtlbalance run ... 2>&1 | tee log``, where Ctrl-C ends ``tee`` first."""
    config = configure("training.epochs=2000")
    command = [sys.executable, "-m", "mtlbalance", "run", str(config.source), "training.epochs=2000",
               "--out", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.stderr is not None
    process.stderr.close()
    time.sleep(0.1)  # epochs that cannot be shown
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert events_of(tmp_path / "run") == ["started", "interrupted"]
