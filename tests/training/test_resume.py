"""A run that is interrupted and resumed equals one that never was, bit for bit on the CPU."""

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

from mtlbalance.errors import RunFolderError
from mtlbalance.training import run_training

ROOT = Path(__file__).parents[2]
RUN = "import sys; from mtlbalance.config import load_config; from mtlbalance.training import run_training\n"


@pytest.mark.parametrize("method", ["fixed", "gaba", "learned"])
@pytest.mark.parametrize("storage", ["memory", "items"])
def test_resuming_is_bit_exact(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, method: str, storage: str
) -> None:
    options = (
        f"balancer.name={method}", f"dataset.storage={storage}", "training.epochs=9", "training.scheduler_patience=0",
        "training.lr=0.2", "training.weight_decay_late=0.1", "training.weight_decay_late_epoch=4",
    )  # fmt: skip
    whole = run_training(configure(*options), out=tmp_path / "whole", quiet=True).run_dir
    for last in (1, 4):
        plugin.interrupt_after = last
        with pytest.raises(KeyboardInterrupt):
            run_training(configure(*options), out=tmp_path / "parts", quiet=True)
        torch.rand(5)  # another process would be anywhere
    plugin.interrupt_after = None
    outcome = run_training(configure(*options), out=tmp_path / "parts", quiet=True)
    assert outcome.status == "finished"
    assert_same(whole, outcome.run_dir)
    events = [json.loads(line)["event"] for line in (outcome.run_dir / "log.jsonl").read_text().splitlines()]
    assert events == ["started", "interrupted", "resumed", "interrupted", "resumed", "finished"]


def test_another_environment_is_said(configure: Any, plugin: Any, assert_same: Any, tmp_path: Path) -> None:
    whole = run_training(configure(), out=tmp_path / "whole", quiet=True).run_dir
    plugin.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "parts", quiet=True)
    plugin.interrupt_after = None
    path = tmp_path / "parts" / "environment.json"
    environment = json.loads(path.read_text())
    assert list(environment["plugins"]) == [plugin.__file__]
    environment |= {"torch": "1.0", "num_cpus": 999}  # how many there are changes nothing
    environment["plugins"][plugin.__file__] = "another sum"
    environment["packages"]["numpy"] = "0.9"
    path.write_text(json.dumps(environment))
    with pytest.warns(RuntimeWarning, match=r"in another environment .*to the last digit") as caught:
        run_training(configure(), out=tmp_path / "parts", quiet=True)
    assert_same(whole, tmp_path / "parts")
    [log] = [
        line for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines() if "resumed" in line
    ]
    changed = json.loads(log)["changed"]
    assert [line.split(":")[0] for line in changed] == ["torch", "numpy", "training_plugin.py"]
    assert all(line in str(caught[0].message) for line in changed)


def test_what_an_observer_draws_at_random_changes_nothing(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path
) -> None:
    """It is told of an epoch after that epoch's checkpoint; a network with dropout would see its draws."""
    whole = run_training(configure(), out=tmp_path / "whole", quiet=True).run_dir
    plugin.observer_draws, plugin.interrupt_after = True, 3
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "parts", quiet=True)
    plugin.interrupt_after = None
    assert_same(whole, run_training(configure(), out=tmp_path / "parts", quiet=True).run_dir)


def test_rows_beyond_the_checkpoint_are_cut_back(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path
) -> None:
    whole = run_training(configure(), out=tmp_path / "whole", quiet=True).run_dir
    plugin.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "cut", quiet=True)
    plugin.interrupt_after = None
    for path in (tmp_path / "cut" / "checkpoints").glob(
        "epoch_00003*"
    ):  # killed after the rows, before the checkpoint
        path.unlink()
    assert len((tmp_path / "cut" / "metrics.csv").read_text().splitlines()) == 1 + 4
    assert_same(whole, run_training(configure(), out=tmp_path / "cut", quiet=True).run_dir)


def test_a_run_stopped_before_its_results_only_writes_them(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path
) -> None:
    options = ("training.patience=3", "dataset.constant_metric=true", "training.epochs=50")
    whole = run_training(configure(*options), out=tmp_path / "whole", quiet=True)
    assert whole.results["epochs_run"] == 4
    plugin.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(*options), out=tmp_path / "late", quiet=True)
    plugin.interrupt_after = None
    late = run_training(configure(*options), out=tmp_path / "late", quiet=True)
    assert late.results["stopped"] == "early-stop"
    assert_same(whole.run_dir, late.run_dir)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, damage: str
) -> None:
    whole = run_training(configure(), out=tmp_path / "whole", quiet=True).run_dir
    plugin.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "damaged", quiet=True)
    plugin.interrupt_after = None
    folder = tmp_path / "damaged" / "checkpoints"
    target = folder / "epoch_00003.pt"
    if damage == "manifest":
        target = folder / "epoch_00003.json"
    content = target.read_bytes()
    if damage == "missing":
        target.unlink()
    elif damage == "flipped":
        target.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    else:
        target.write_bytes(content[: len(content) // 2])
    with pytest.warns(RuntimeWarning, match=r"epoch_00003\.pt is damaged .*falling back"):
        resumed = run_training(configure(), out=tmp_path / "damaged", quiet=True)
    assert_same(whole, resumed.run_dir)


def test_only_damaged_checkpoints_are_an_error_and_fresh_starts_again(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    plugin.interrupt_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "run", quiet=True)
    plugin.interrupt_after = None
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with (
        pytest.warns(RuntimeWarning, match="damaged"),
        pytest.raises(RunFolderError, match="every checkpoint"),
    ):
        run_training(configure(), out=tmp_path / "run", quiet=True)
    assert run_training(configure(), out=tmp_path / "run", fresh=True, quiet=True).status == "finished"
    assert (tmp_path / "run.old-1" / "checkpoints").is_dir()


def test_the_last_two_checkpoints_and_the_best_weights_are_kept(configure: Any, plugin: Any) -> None:
    outcome = run_training(configure("dataset.constant_metric=true"), quiet=True)
    names = sorted(path.name for path in (outcome.run_dir / "checkpoints").iterdir())
    assert names == [
        "best_00000.safetensors", "epoch_00000.safetensors",
        "epoch_00004.json", "epoch_00004.pt", "epoch_00004.safetensors",
        "epoch_00005.json", "epoch_00005.pt", "epoch_00005.safetensors",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_and_ctrl_c_leave_a_run_that_resumes_bit_exactly(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path
) -> None:
    config = configure("training.epochs=12", "dataset.samples=600")
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    out = tmp_path / "killed"
    overrides = ("training.epochs=12", "dataset.samples=600")
    for signum, expected in ((signal.SIGTERM, 75), (signal.SIGINT, -signal.SIGINT)):
        finished = len(list(out.glob("checkpoints/*.json"))) and last_epoch(out)
        code = f"{RUN}run_training(load_config({str(config.source)!r}, {overrides!r}), out={'O'})"
        code = "from pathlib import Path\n" + code.replace("out=O", f"out=Path({str(out)!r})")
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while last_epoch(out) < finished + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signum)
        assert process.wait(timeout=30) == expected
        assert not (out / "results.json").exists()
    assert_same(whole, run_training(config, out=out, quiet=True).run_dir)


def last_epoch(folder: Path) -> int:
    return max((int(path.stem[6:11]) for path in folder.glob("checkpoints/epoch_*.json")), default=-1)
