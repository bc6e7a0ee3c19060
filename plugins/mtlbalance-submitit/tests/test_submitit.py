"""A sweep through submitit's local executor: real jobs, the same results as the local engine's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("submitit") is None:
    pytest.skip("needs submitit: pip install './plugins/mtlbalance-submitit[test]'", allow_module_level=True)

PLUGIN = Path(__file__).parents[1]
ROOT = Path(__file__).parents[3]
OBSERVER = """\
import os, signal
from pathlib import Path
from mtlbalance.plugins import hookimpl

@hookimpl
def on_epoch_end(run_dir, epoch, metrics):
    trace = Path(os.environ["TRACES"]) / run_dir.name
    if run_dir.name == "seed_2" and epoch == 0 and not trace.exists():
        trace.touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
BASE = f"""\
plugins = ["{PLUGIN / "mtlbalance_submitit"}", "./kills_once.py"]
dataset = {{ name = "toy", samples = 60 }}
backbone = {{ name = "mlp", hidden_sizes = [4] }}
balancer.name = "gaba"
training = {{ epochs = 2, warmup_epochs = 0 }}
run.device = "cpu"
"""
SWEEP = 'base = "study.toml"\naxes.seed = [{ run.seed = 1 }, { run.seed = 2 }, { run.seed = 3 }]\n'


def sweep(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    before = os.environ.get("PYTHONPATH")
    python_path = [str(ROOT), str(PLUGIN), *([before] if before else [])]
    paths = {"PYTHONPATH": os.pathsep.join(python_path), "TRACES": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "mtlbalance", "sweep", "run", "sweep.toml", "--json", *arguments],
        cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def results(folder: Path) -> list[dict[str, Any]]:
    documents = [json.loads((folder / f"seed_{seed}" / "results.json").read_text()) for seed in (1, 2, 3)]
    return [{key: value for key, value in found.items() if key != "wall_seconds"} for found in documents]


def test_the_same_as_the_local_engine(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(BASE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    (tmp_path / "kills_once.py").write_text(OBSERVER)
    submitted, err = sweep(
        tmp_path, "--engine", "submitit", "engine.cluster=local", "engine.at_once=2", "--out", "submitted"
    )
    assert (sorted(submitted["finished"]), submitted["failed"]) == (["seed_1", "seed_2", "seed_3"], {})
    assert "retry    seed_2" in err
    assert "killed by SIGKILL" in err
    sweep(tmp_path, "--out", "local", "--per-device", "2")
    assert results(tmp_path / "submitted") == results(tmp_path / "local")
    assert list((tmp_path / "submitted" / "logs" / "submitit").glob("*_result.pkl"))
    again, err = sweep(tmp_path, "--engine", "submitit", "engine.cluster=local", "--out", "submitted")
    assert again["skipped"] == ["seed_1", "seed_2", "seed_3"]
    assert "started" not in err
