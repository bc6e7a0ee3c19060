"""Files that are not what was written: noticed, never believed, never executed."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlbalance.errors import CheckpointError, RunFolderError
from mtlbalance.training import run_training


class Payload:
    """Unpickled by anything but a loader that refuses code, it touches a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def replace_state(manifest: Path, content: bytes) -> None:
    """Put ``content`` in place of a checkpoint's ``.pt``, its sum included, as an attacker would."""
    manifest.with_suffix(".pt").write_bytes(content)
    document = json.loads(manifest.read_text())
    document["sha256"][manifest.with_suffix(".pt").name] = hashlib.sha256(content).hexdigest()
    manifest.write_text(json.dumps(document))


@pytest.mark.parametrize("form", ["torch.save", "legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, form: str
) -> None:
    whole = run_training(configure(), out=tmp_path / "whole", quiet=True).run_dir
    plugin.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "run", quiet=True)
    plugin.interrupt_after = None
    manifest, touched = tmp_path / "run" / "checkpoints" / "epoch_00003.json", tmp_path / "touched"
    bad = tmp_path / "bad.pt"
    if form == "plain pickle":
        bad.write_bytes(pickle.dumps({"epoch": Payload(touched)}, protocol=2))
    else:
        torch.save({"epoch": Payload(touched)}, bad, _use_new_zipfile_serialization=form == "torch.save")
    assert zipfile.is_zipfile(bad) == (form == "torch.save")
    torch.load(bad, weights_only=False) if form != "plain pickle" else pickle.loads(bad.read_bytes())
    assert touched.exists()  # the payload works
    touched.unlink()
    replace_state(manifest, bad.read_bytes())
    with pytest.warns(RuntimeWarning, match=r"epoch_00003\.pt is damaged .*neither tensors nor plain values"):
        run_training(configure(), out=tmp_path / "run", quiet=True)
    assert not touched.exists()
    assert_same(whole, tmp_path / "run")


def test_only_damaged_checkpoints_end_with_exit_code_1_and_change_nothing(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    plugin.interrupt_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=tmp_path / "run", quiet=True)
    plugin.interrupt_after = None
    for path in (tmp_path / "run" / "checkpoints").glob("epoch_*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()}
    with (
        pytest.warns(RuntimeWarning, match="damaged"),
        pytest.raises(CheckpointError, match="--fresh") as caught,
    ):
        run_training(configure(), out=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 1
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()} == before


BEST = ("dataset.constant_metric=true", "training.epochs=4")  # the best epoch is the first


@pytest.mark.parametrize("when", ["in the same process", "between two"])
def test_damaged_best_weights_are_made_again_from_the_checkpoint_of_their_epoch(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, when: str
) -> None:
    whole = run_training(configure(*BEST), out=tmp_path / "whole", quiet=True).run_dir
    plugin.damage_after = (2, "best_00000.safetensors")
    if when == "between two":
        plugin.interrupt_after = 2
        with pytest.raises(KeyboardInterrupt):
            run_training(configure(*BEST), out=tmp_path / "run", quiet=True)
        plugin.interrupt_after = plugin.damage_after = None
    with pytest.warns(
        RuntimeWarning, match=r"best_00000\.safetensors were damaged; .* from epoch_00000\.safetensors"
    ):
        run_training(configure(*BEST), out=tmp_path / "run", quiet=True)
    assert_same(whole, tmp_path / "run")
    best = [folder / "checkpoints" / "best_00000.safetensors" for folder in (whole, tmp_path / "run")]
    assert best[0].read_bytes() == best[1].read_bytes()


def test_best_weights_that_are_nowhere_as_they_were_are_not_handed_out(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    plugin.damage_after = (2, "best_00000.safetensors", "epoch_00000.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"best_00000\.safetensors are not those that were written, and epoch_00000\.safetensors",
    ):
        run_training(configure(*BEST), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    "name", ["results.json", "model.safetensors", "metrics.csv", "gradient_stats.csv", "sums.json"]
)
def test_a_finished_run_that_was_damaged_is_made_again(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, name: str
) -> None:
    config = configure("training.epochs=3")
    run = run_training(config, out=tmp_path / "run", quiet=True).run_dir
    shutil.copytree(run, tmp_path / "whole")
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:40] + bytes([content[40] ^ 2]) + content[41:])
    with pytest.warns(
        RuntimeWarning, match=f"what sums.json says .*{name}" if name != "sums.json" else "made again"
    ):
        assert run_training(config, out=run, quiet=True).status == "finished"
    assert_same(tmp_path / "whole", run)
    assert run_training(config, out=run, quiet=True).status == "already-finished"
    (run / name).write_bytes(content[:-3])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunFolderError, match="no checkpoint to make them again from"):
        run_training(config, out=run, quiet=True)


def test_leftovers_of_a_kill_are_removed_and_a_torn_log_goes_on(
    configure: Any, plugin: Any, stop_after: Any, tmp_path: Path
) -> None:
    config = configure("training.epochs=2")
    stop_after(3, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_training(config, out=tmp_path / "run", quiet=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        (folder / ".results.json.tmp-99").write_bytes(b"{")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    run_training(config, out=tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run").rglob("*.tmp-*"))
    events = []
    for line in log.read_text().splitlines():
        try:
            events.append(json.loads(line)["event"])
        except ValueError:
            events.append("torn")
    assert events == ["started", "torn", "resumed", "finished"]
