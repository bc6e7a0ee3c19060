"""Predicting on NASA's text files and exporting the study's network, on a simulated fleet."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtlbalance import load_run
from mtlbalance.cli.main import main
from mtlbalance.config import load_config
from mtlbalance.inference.exporting import export_run
from mtlbalance.training import run_training

CONFIG = """
plugins = ["mtlbalance_cmapss"]
run.device = "cpu"
[dataset]
name = "cmapss"
subset = "FD002"
source = "simulated"
simulated_engines = 4
[backbone]
name = "cnn-bilstm-attention"
hidden_size = 4
cnn_channels = [8]
num_attention_heads = 2
fc_dims = [8]
[balancer]
name = "gaba"
[training]
epochs = 1
warmup_epochs = 0
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cmapss")
    (folder / "fleet.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run_training(load_config(folder / "fleet.toml"), out=folder / "run", quiet=True)
    return folder / "run"


def predict(*arguments: object) -> list[dict[str, str]]:
    out = Path(str(arguments[-1]))
    assert main(["predict", *map(str, arguments[:-1]), "--out", str(out), "--device", "cpu"]) == 0
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def fleet_file(folder: Path, seed: int) -> Path:
    """The test file of a fleet, as a user would have it."""
    from mtlbalance_cmapss.simulate import Fleet, simulated_folder

    with simulated_folder(Fleet("FD002", 4, seed)) as fleet:
        return Path(shutil.copy(fleet / "test_FD002.txt", folder / f"fleet_{seed}.txt"))


def test_a_text_file_gives_what_the_test_set_gives(run_dir: Path, no_files: Path, tmp_path: Path) -> None:
    split = predict(run_dir, "--split", "test", tmp_path / "split.csv")
    raw = predict(run_dir, "--input", fleet_file(tmp_path, seed=0), tmp_path / "raw.csv")
    known = ["target_rul", "target_health"]
    assert list(raw[0]) == [name for name in split[0] if name not in known]
    assert list(raw[0])[:4] == ["unit", "cycle", "is_last", "predicted_rul"]
    assert raw == [{name: value for name, value in row.items() if name not in known} for row in split]
    metrics = json.loads((run_dir / "results.json").read_text())["metrics"]
    errors = [
        float(row["predicted_rul"]) - float(row["target_rul"]) for row in split if row["is_last"] == "True"
    ]
    assert len(errors) == 4
    assert math.sqrt(sum(error**2 for error in errors) / 4) == pytest.approx(metrics["rmse_last"], rel=1e-6)


def test_engines_that_the_run_has_never_seen(run_dir: Path, no_files: Path, tmp_path: Path) -> None:
    unseen = fleet_file(tmp_path, seed=9)
    rows = predict(run_dir, "--input", unseen, tmp_path / "unseen.csv")
    recorded = np.loadtxt(unseen)
    last = [(int(row["unit"]), int(row["cycle"])) for row in rows if row["is_last"] == "True"]
    assert last == [(unit, int((recorded[:, 0] == unit).sum())) for unit in (1, 2, 3, 4)]


def test_a_file_that_is_not_nasas(
    run_dir: Path, no_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = fleet_file(tmp_path, seed=0).read_text().splitlines()
    for name, text, message in [
        ("torn.txt", "\n".join([*lines[:9], lines[9][:40]]), "torn.txt:10: "),
        ("high.dat", lines[0].replace(lines[0].split()[2], "30.0", 1), "near none of the known altitudes"),
    ]:
        (tmp_path / name).write_text(text)
        out = tmp_path / "out.csv"
        assert main(["predict", str(run_dir), "--input", str(tmp_path / name), "--out", str(out)]) == 2
        assert message in capfd.readouterr().err
        assert not out.exists()


def test_the_studys_network_is_exported(run_dir: Path, no_files: Path, tmp_path: Path) -> None:
    run = load_run(run_dir)
    inputs: Any = run.data.test.inputs  # type: ignore[attr-defined]
    exported = export_run(run, "pt2", tmp_path / "model.pt2")
    assert all(task.holds for task in exported.parity)
    program: Any = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 3, 50):
        expected = run.predict(inputs[:size], logits=True)
        for task, values in program(inputs[:size]).items():
            np.testing.assert_allclose(values.numpy(), expected[task].numpy(), rtol=1e-5, atol=1e-5)


def test_the_studys_network_as_onnx(run_dir: Path, no_files: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    run = load_run(run_dir)
    exported = export_run(run, "onnx", tmp_path / "model.onnx")
    assert all(task.holds for task in exported.parity)
    session = pytest.importorskip("onnxruntime").InferenceSession(str(tmp_path / "model.onnx"))
    inputs: Any = run.data.test.inputs  # type: ignore[attr-defined]
    for size in (1, 3, 50):
        expected = run.predict(inputs[:size], logits=True)
        for task, values in zip(run.tasks, session.run(None, {"inputs": inputs[:size].numpy()}), strict=True):
            np.testing.assert_allclose(values, expected[task.name].numpy(), rtol=1e-5, atol=1e-5)
