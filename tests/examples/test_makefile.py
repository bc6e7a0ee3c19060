"""``make run``: where its results go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make_run(folder: Path, *variables: str) -> None:
    """Train with the Makefile's rule, in ``folder`` and without installing anything."""
    installed = f"{sys.prefix}/.installed"
    done = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "-o", installed, f"VENV={sys.prefix}", "run", *variables],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def run_folders(folder: Path) -> set[str]:
    return {str(path.parent.relative_to(folder)) for path in folder.glob("runs/*/*/results.json")}


@pytest.mark.skipif(
    not (Path(sys.prefix) / "bin" / "mtlbalance").exists(), reason="needs mtlbalance installed"
)
def test_runs_with_other_settings_get_other_folders(tmp_path: Path) -> None:
    toy = ROOT / "examples" / "toy.toml"
    other = tmp_path / "other.toml"
    shutil.copy(toy, other)
    short = "OVERRIDES=training.epochs=1 training.warmup_epochs=$(WARMUP_EPOCHS)"
    make_run(tmp_path, f"CONFIG={toy}", short)
    make_run(tmp_path, f"CONFIG={toy}", short, "WARMUP_EPOCHS=1")
    make_run(tmp_path, f"CONFIG={other}", short)
    assert run_folders(tmp_path) == {
        "runs/toy-epochs-1-warmup_epochs-2/seed_42",
        "runs/toy-epochs-1-warmup_epochs-1/seed_42",
        "runs/other-epochs-1-warmup_epochs-2/seed_42",
    }
