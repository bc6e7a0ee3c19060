"""A real cluster on this machine: a head and two nodes, a node lost, a driver killed, and every result once."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install './plugins/mtlbalance-ray[test]'", allow_module_level=True)

# Ray reads these when it is imported.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

PLUGIN = Path(__file__).parents[1]
ROOT = Path(__file__).parents[3]
SEEDS = range(1, 9)
BASE = f"""\
plugins = ["{PLUGIN / "mtlbalance_ray"}", "{Path(__file__).with_name("held_plugin.py")}"]
dataset = {{ name = "toy", samples = 60 }}
backbone = {{ name = "mlp", hidden_sizes = [4] }}
balancer.name = "gaba"
training = {{ epochs = 3, warmup_epochs = 0 }}
run.device = "cpu"
"""
SWEEP = 'base = "study.toml"\naxes.seed = [' + ", ".join(f"{{ run.seed = {seed} }}" for seed in SEEDS) + "]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "study.toml").write_text(BASE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(PLUGIN), *([before] if before else [])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def cluster(folder: Path) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found.nodes = [found.add_node(num_cpus=2), found.add_node(num_cpus=2)]
    found.wait_for_nodes()
    yield found
    found.shutdown()


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mtlbalance", "sweep", "run", "sweep.toml", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=600)
    print(err)
    assert process.returncode == 0, err
    return json.loads(out), err


def wait_for(condition: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def results(sweep: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for seed in SEEDS:
        document = json.loads((sweep / f"seed_{seed}" / "results.json").read_text())
        found[seed] = {key: value for key, value in document.items() if key != "wall_seconds"}
    return found


def events(sweep: Path, seed: int) -> list[str]:
    lines = (sweep / f"seed_{seed}" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def at_work(sweep: Path) -> list[Path]:
    """The runs that have a checkpoint and no results."""
    folders = {path.parents[1] for path in sweep.glob("seed_*/checkpoints/epoch_*.json")}
    return [folder for folder in folders if not (folder / "results.json").exists()]


def check_each_was_started_once(sweep: Path) -> None:
    for seed in SEEDS:
        assert events(sweep, seed).count("started") == 1
        assert events(sweep, seed).count("finished") == 1
        rows = (sweep / f"seed_{seed}" / "metrics.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2"]


def test_a_node_is_lost_and_then_the_driver(folder: Path, cluster: Any) -> None:
    local, _ = finish(start(folder, "--per-device", "2", "--out", "local", "--json"))
    assert len(local["finished"]) == 8
    expected = results(folder / "local")
    on_ray = ("--engine", "ray", "--address", cluster.address, "--json")

    # A node is killed while two runs are at work on it. One that comes to its end before it notices that its
    # worker is gone has done its work; any other goes on elsewhere.
    (folder / "hold").touch()
    lost = folder / "lost-node"
    driver = start(folder, *on_ray, "--out", str(lost))
    wait_for(lambda: len(at_work(lost)) == 4)
    cluster.remove_node(cluster.nodes[1], allow_graceful=False)
    (folder / "hold").unlink()
    document, err = finish(driver)
    assert err.count("its worker was lost") == 2
    assert (sorted(document["finished"]), document["failed"]) == ([f"seed_{seed}" for seed in SEEDS], {})
    assert results(lost) == expected
    check_each_was_started_once(lost)

    # The driver is killed, after some runs have finished and while others are at work.
    (folder / "hold").touch()
    killed = folder / "killed-driver"
    driver = start(folder, *on_ray, "--out", str(killed))
    wait_for(lambda: len(at_work(killed)) == 2 and len(list(killed.glob("*/results.json"))) == 2)
    before = {path: path.stat().st_mtime_ns for path in killed.glob("*/results.json")}
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    (folder / "hold").unlink()
    document, _ = finish(start(folder, *on_ray, "--out", str(killed)))
    assert len(document["skipped"]) + len(document["finished"]) == 8
    assert set(document["skipped"]) >= {"seed_1", "seed_2"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert results(killed) == expected
    check_each_was_started_once(killed)


def test_without_a_shared_folder(folder: Path, cluster: Any) -> None:
    finish(start(folder, "--per-device", "2", "--out", "local", "--json"))
    document, _ = finish(
        start(folder, "--engine", "ray", "--address", cluster.address, "engine.shared_folder=false",
              "--out", "returned", "--json")
    )  # fmt: skip
    assert len(document["finished"]) == 8
    assert results(folder / "returned") == results(folder / "local")
    check_each_was_started_once(folder / "returned")
    model = (folder / "returned" / "seed_3" / "model.safetensors").read_bytes()
    assert model == (folder / "local" / "seed_3" / "model.safetensors").read_bytes()
    assert "epoch 2" in (folder / "returned" / "logs" / "seed_3.log").read_text()


def test_a_ray_of_its_own(folder: Path) -> None:
    (folder / "sweep.toml").write_text(
        'base = "study.toml"\naxes.seed = [{ run.seed = 1 }, { run.seed = 2 }]\n'
    )
    document, _ = finish(start(folder, "--engine", "ray", "--out", "own", "--json"))
    assert sorted(document["finished"]) == ["seed_1", "seed_2"]
    assert all((folder / "own" / name / "results.json").exists() for name in document["finished"])


@pytest.mark.parametrize("shared", ["true", "false"])
def test_a_sweep_that_is_stopped_keeps_what_was_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shared: str
) -> None:
    (folder / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # its sockets need a short path
    endless = ("training.epochs=100000", "training.patience=100000")
    driver = start(folder, "--engine", "ray", f"engine.shared_folder={shared}", "--out", "stopped", *endless)
    wait_for(lambda: list(folder.glob("[st]*/**/checkpoints/epoch_*.json")))
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=240)
    assert driver.returncode == 75, err
    assert "asked to leave their folders in order" in err
    kept = [path.parent.name for path in (folder / "stopped").glob("*/checkpoints")]
    assert kept
    assert {events(folder / "stopped", int(name.removeprefix("seed_")))[-1] for name in kept} == {
        "interrupted"
    }


def test_a_folder_that_was_half_replaced_is_found_again(tmp_path: Path) -> None:
    from mtlbalance_ray.artefacts import pack, unpack

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("kept")
    files = pack(tmp_path / "run")
    assert files is not None
    (tmp_path / "run").rename(tmp_path / ".run.old")  # and killed
    assert pack(tmp_path / "run") == files
    unpack(files, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "file").read_text() == "kept"


def test_a_cluster_that_is_not_there(folder: Path) -> None:
    process = start(folder, "--engine", "ray", "--address", "127.0.0.1:1")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "error: engine 'ray': cannot use the cluster at '127.0.0.1:1'" in err
    assert "Traceback" not in err
