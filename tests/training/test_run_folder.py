"""Who may use a run folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtlbalance.errors import RunFolderError
from mtlbalance.training import run_training
from mtlbalance.training.run_folder import open_run_folder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from mtlbalance.training.run_folder import open_run_folder
with open_run_folder(Path(sys.argv[1])):
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
        with pytest.raises(RunFolderError, match="in use by another process") as caught:
            run_training(configure(), out=out, fresh=fresh, quiet=True)
        assert caught.value.exit_code == 2
    holder.communicate("")
    assert holder.returncode == 0
    assert run_training(configure("training.epochs=1"), out=out, quiet=True).status == "finished"


def test_a_killed_holder_leaves_no_lock(configure: Any, plugin: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.communicate()
    assert run_training(configure("training.epochs=1"), out=out, quiet=True).status == "finished"


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
    assert not (tmp_path / "runs" / "one").exists()
