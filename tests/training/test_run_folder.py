"""Who may use a run folder."""

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

import pytest

from mtlbalance.errors import DeviceError, PluginError, RunFolderError
from mtlbalance.training import run_training
from mtlbalance.training.lock import FolderLock
from mtlbalance.training.run_folder import open_run_folder
from mtlbalance.training.stopping import stops_on_signals

ROOT = Path(__file__).parents[2]
HOLD = """
import os
import sys
from pathlib import Path
from mtlbalance.training.run_folder import open_run_folder
with open_run_folder(Path(sys.argv[1])):
    if hasattr(os, "fork") and os.fork() == 0:  # as a process that loads samples; it lives a little longer
        os.close(1)
        os.read(0, 1)
        os._exit(0)
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_another_config_is_refused_and_the_keys_are_listed(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_training(configure(), out=out, quiet=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError) as caught:
        run_training(configure("training.lr=0.01", "balancer.beta=0.5", "run.seed=4"), out=out, quiet=True)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    for line in ("training.lr: 0.02 -> 0.01", "balancer.beta: 0.99 -> 0.5", "run.seed: 3 -> 4"):
        assert line in text
    assert "training.epochs" not in text
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_names_and_places_may_differ(configure: Any, plugin: Any, tmp_path: Path) -> None:
    run_training(configure(), out=tmp_path / "run", quiet=True)
    moved = configure("run.name=other", f"run.output_dir={tmp_path}/elsewhere", "run.device=auto")
    assert run_training(moved, out=tmp_path / "run", quiet=True).status == "already-finished"


def test_fresh_sets_the_old_run_aside(configure: Any, plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_training(configure("training.epochs=1"), out=out, quiet=True)
    old = (out / "results.json").read_bytes()
    for number in (1, 2):
        outcome = run_training(configure("training.epochs=2"), out=out, fresh=True, quiet=True)
        assert outcome.results["epochs_run"] == 2
        assert (tmp_path / f"run.old-{number}" / "results.json").exists()
    assert (tmp_path / "run.old-1" / "results.json").read_bytes() == old


def test_another_process_that_comes_first_while_fresh_renames_keeps_its_lock(
    configure: Any, plugin: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Between the renaming and the new lock there is no folder, and so no lock."""
    out = run_training(configure("training.epochs=1"), out=tmp_path / "run", quiet=True).run_dir
    rename, others = Path.rename, []

    def rename_and_be_late(path: Path, target: Path) -> None:
        rename(path, target)
        others.append(FolderLock(out))

    monkeypatch.setattr(Path, "rename", rename_and_be_late)
    with pytest.raises(RunFolderError, match="in use by another process"):
        run_training(configure("training.epochs=1"), out=out, fresh=True, quiet=True)
    assert {path.name for path in out.iterdir()} == {".lock", ".holder.json"}
    with pytest.raises(RunFolderError, match="in use by another process"):
        FolderLock(out)
    assert (tmp_path / "run.old-1" / "results.json").exists()
    others[0].release()


def test_a_plugin_that_goes_to_another_folder(
    configure: Any, plugin: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    outcome = run_training(
        configure("training.epochs=1", "dataset.spoil=folder"), out=Path("run"), quiet=True
    )
    assert outcome.run_dir == Path("run")
    assert (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_fresh_keeps_the_old_run_if_the_new_one_cannot_start(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_training(configure("training.epochs=1"), out=out, quiet=True)
    with pytest.raises(Exception, match="empty"):
        run_training(configure("dataset.empty=true"), out=out, fresh=True, quiet=True)
    assert (out / "results.json").exists()
    assert not (tmp_path / "run.old-1").exists()


def test_a_folder_with_other_things_is_left_alone(configure: Any, plugin: Any, tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match=r"not a run folder \(it has thesis.tex\)"):
        run_training(configure(), out=tmp_path / "papers", quiet=True)
    assert [path.name for path in (tmp_path / "papers").iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_an_error(configure: Any, plugin: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write to the run folder"):
        run_training(configure(), out=tmp_path / "file" / "run", quiet=True)
    with pytest.raises(RunFolderError, match="cannot write to the run folder"):
        run_training(configure(), out=tmp_path / "file", quiet=True)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error(configure: Any, plugin: Any, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunFolderError, match="cannot write"):
        run_training(configure(), out=tmp_path / "locked" / "run", quiet=True)


def test_two_processes_cannot_share_a_folder(configure: Any, plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    for fresh in (False, True):
        held_by = rf"in use by another process \(pid {holder.pid} on \S+, since 20\d\d-\S+\); wait for it"
        with pytest.raises(RunFolderError, match=held_by) as caught:
            run_training(configure(), out=out, fresh=fresh, quiet=True)
        assert caught.value.exit_code == 2
    holder.communicate("")
    assert holder.returncode == 0
    assert run_training(configure("training.epochs=1"), out=out, quiet=True).status == "finished"
    assert not (out / ".holder.json").exists()


def test_a_killed_holder_leaves_no_lock(configure: Any, plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    assert (out / ".holder.json").exists()  # a note of the dead, which nobody believes
    assert run_training(configure("training.epochs=1"), out=out, quiet=True).status == "finished"
    holder.communicate()  # what it had forked ends with this


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
    assert not (tmp_path / "runs" / "one").exists()


@pytest.mark.parametrize("where", ["papers", ".", "papers/.."])
def test_fresh_sets_only_runs_aside(
    configure: Any, plugin: Any, tmp_path: Path, monkeypatch: Any, where: str
) -> None:
    config = configure()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("precious")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match="not a run folder") as caught:
        run_training(config, out=Path(where), fresh=True, quiet=True)
    assert "--fresh" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["papers", "trial.toml"]


@pytest.mark.parametrize("where", [".", "checkpoints/.."])
@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_fresh_never_moves_the_folder_one_stands_in(
    configure: Any, plugin: Any, tmp_path: Path, monkeypatch: Any, where: str, inside: str
) -> None:
    out = run_training(configure("training.epochs=1"), quiet=True).run_dir
    monkeypatch.chdir(out / inside)
    path = Path(where) if inside == "" else out
    with pytest.raises(RunFolderError, match="the current folder, so it cannot be set aside"):
        run_training(configure("training.epochs=1"), out=path, fresh=True, quiet=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out))
    with pytest.raises(RunFolderError, match="the home folder"):
        run_training(configure("training.epochs=1"), out=out, fresh=True, quiet=True)
    assert (out / "results.json").exists()


def test_a_run_that_failed_before_its_first_checkpoint_leaves_room_for_a_corrected_config(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(PluginError, match="levle"):
        run_training(configure("dataset.key_metric=levle"), out=out, quiet=True)
    assert not list(out.glob("*.csv"))
    plugin.data_source = "other"  # nothing was trained, so the data may change as well
    outcome = run_training(configure("training.lr=0.01"), out=out, quiet=True)
    assert outcome.status == "finished"
    assert "lr = 0.01" in (out / "config.resolved.toml").read_text()
    assert json.loads((out / "data.json").read_text())["data_source"] == "other"


def test_how_data_is_loaded_and_measured_may_change(configure: Any, plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plugin.interrupt_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=out, quiet=True)
    plugin.interrupt_after = None
    options = ("training.num_workers=1", "training.eval_batch_size=7", "training.gradient_stats_every=2")
    assert run_training(configure(*options), out=out, quiet=True).status == "finished"


def test_lost_checkpoints_are_said(configure: Any, plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plugin.interrupt_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_training(configure(), out=out, quiet=True)
    plugin.interrupt_after = None
    shutil.rmtree(out / "checkpoints")
    with pytest.warns(RuntimeWarning, match="no checkpoint, so the run starts again at epoch 0"):
        outcome = run_training(configure(), out=out, quiet=True)
    assert outcome.results["epochs_run"] == 6
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert events == ["started", "interrupted", "checkpoints_lost", "started", "finished"]


def test_no_empty_folders_are_left_behind(configure: Any, plugin: Any, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for out in (tmp_path / "a" / "b" / "c", tmp_path / "kept"):
        with pytest.raises(DeviceError):
            run_training(configure("run.device=cuda:99"), out=out, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "trial.toml"]
    assert not list((tmp_path / "kept").iterdir())


def test_a_file_in_place_of_the_checkpoints(configure: Any, plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.resolved.toml").write_text("")
    (out / "checkpoints").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*checkpoints: .*; what was written before"):
        run_training(configure(), out=out, quiet=True)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits")
def test_a_full_disk_names_the_file_and_the_run_goes_on_later(
    configure: Any, plugin: Any, tmp_path: Path
) -> None:
    config = configure("training.epochs=40")
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    # Checkpoints grow with the epochs: the first ones fit, the last one does not.
    limit = (whole / "checkpoints" / "epoch_00039.pt").stat().st_size - 2000
    code = (
        "import resource, sys; from mtlbalance.cli.main import main; size = int(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); sys.exit(main(sys.argv[2:]))"
    )
    command = ["run", str(config.source), "training.epochs=40", "--out", str(tmp_path / "full"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(limit), *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: cannot write {tmp_path / 'full'}" in done.stderr
    assert list((tmp_path / "full" / "checkpoints").glob("epoch_*.json"))
    run_training(config, out=tmp_path / "full", quiet=True)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, tmp_path / "full")]
    assert weights[0] == weights[1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_an_error_after_a_signal_is_that_signal(signum: int, raised: type[BaseException]) -> None:
    before = signal.getsignal(signum)

    def import_that_is_cut_short() -> None:
        try:
            os.kill(os.getpid(), signum)
            time.sleep(5)
        except BaseException:
            raise ImportError("numpy cannot be imported") from None

    with pytest.raises(raised), stops_on_signals():
        import_that_is_cut_short()
    assert signal.getsignal(signum) == before
    with pytest.raises(ImportError), stops_on_signals():
        raise ImportError("without a signal")
