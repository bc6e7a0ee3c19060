"""``mtlbalance export``: files that give the model's numbers elsewhere, or no file at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from mtlbalance import load_run
from mtlbalance.cli.main import main
from mtlbalance.inference import LoadedRun
from mtlbalance.inference.exporting import export_run
from mtlbalance.inference.parity import compare

from .conftest import CONFIG

Call = Callable[..., tuple[int, str, str]]
BATCH_SIZES = (1, 2, 7, 30)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run ``mtlbalance`` in an empty folder and return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call_command(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call_command


def test_safetensors(call: Call, folder: Path, loaded: LoadedRun) -> None:
    code, out, err = call(
        "export", folder, "--format", "safetensors", "--out", "new/model.safetensors", "--json"
    )
    assert (code, err) == (0, "notice: these data are made up\n")
    document = json.loads(out)
    assert (document["format"], document["weights"], document["batch_sizes"]) == (
        "safetensors",
        "ema",
        [1, 7],
    )
    assert [(task["task"], task["max_difference"]) for task in document["parity"]] == [
        ("level", 0),
        ("kind", 0),
    ]
    assert document["bytes"] == Path("new/model.safetensors").stat().st_size
    weights = safetensors.torch.load_file("new/model.safetensors")
    assert weights.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in loaded.model.state_dict().items())
    with safetensors.safe_open("new/model.safetensors", "pt") as file:
        manifest = json.loads(file.metadata()["mtlbalance"])
    assert (manifest["run"], manifest["epoch"], manifest["inputs"]["shape"]) == (
        "trial",
        loaded.epoch,
        ["batch", 4],
    )
    assert manifest["inputs"]["dtype"] == "float32"
    assert [(task["name"], task["gives"]) for task in manifest["tasks"]] == [
        ("level", "values"),
        ("kind", "logits"),
    ]
    assert manifest["config"]["backbone"] == {"name": "net", "width": 8, "normalise": True, "dropout": 0.2,
                                              "float64": False, "frozen": False, "huge": ""}  # fmt: skip
    assert str(folder.parent) not in json.dumps(manifest)  # what is handed on names no folder of this machine
    before = Path("new/model.safetensors").read_bytes()
    call("export", folder, "--format", "safetensors", "--out", "new/model.safetensors")
    assert Path("new/model.safetensors").read_bytes() == before


def test_a_program_runs_where_mtlbalance_is_not(call: Call, own_folder: Path) -> None:
    code, out, _ = call("export", own_folder, "--format", "pt2", "--weights", "live")
    run = load_run(own_folder, weights="live")
    assert code == 0
    assert out.splitlines()[:2] == [
        "trial, live weights of epoch 3, as pt2",
        "compared with the model on the validation set, in batches of 1 and 7:",
    ]
    assert "  level        largest difference 0, allowed " in out
    inputs = run.data.test.inputs  # type: ignore[attr-defined]
    np.save("x.npy", inputs.numpy())
    program = (
        "import json, sys, numpy, torch\n"
        "extra = {'mtlbalance.json': ''}\n"
        "model = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
        "x = torch.from_numpy(numpy.load('x.npy'))\n"
        f"y = {{n: {{k: v.tolist() for k, v in model(x[:n]).items()}} for n in {BATCH_SIZES}}}\n"
        "assert not any(name.startswith(('mtlbalance', 'training_plugin')) for name in sys.modules)\n"
        "print(json.dumps([json.loads(extra['mtlbalance.json'])['run'], y]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-I", "-c", program, str(own_folder / "exports" / "live.pt2")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, outputs = json.loads(done.stdout)
    assert name == "trial"
    for size in BATCH_SIZES:
        expected = run.predict(inputs[:size], logits=True)
        for task, values in outputs[str(size)].items():
            np.testing.assert_allclose(values, expected[task], rtol=1e-6, atol=1e-6)


def check_onnx(path: Path, run: LoadedRun, inputs: torch.Tensor, atol: float) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    assert (given.name, given.shape) == ("inputs", ["batch", *run.inputs.shape])
    assert [output.name for output in session.get_outputs()] == [task.name for task in run.tasks]
    assert json.loads(session.get_modelmeta().custom_metadata_map["mtlbalance"])["run"] == run.results["run"]
    for size in BATCH_SIZES:
        outputs = session.run(None, {"inputs": inputs[:size].numpy()})
        expected = run.predict(inputs[:size], logits=True)
        for task, values in zip(run.tasks, outputs, strict=True):
            np.testing.assert_allclose(values, expected[task.name], rtol=1e-5, atol=atol)


def test_onnx(call: Call, folder: Path, loaded: LoadedRun) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    code, out, err = call("export", folder, "--format", "onnx", "--out", "model.onnx")
    assert (code, err) == (0, "notice: these data are made up\n")
    assert out.splitlines()[-1].startswith("written to   model.onnx (")
    check_onnx(Path("model.onnx"), loaded, loaded.data.test.inputs, atol=1e-5)  # type: ignore[attr-defined]


def test_onnx_is_optional(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    code, out, err = call("export", folder, "--format", "onnx", "--out", "model.onnx")
    assert (code, out) == (2, "")
    assert err == (
        "error: the format 'onnx' needs onnxruntime, which is not installed; pip install 'mtlbalance[onnx]'\n"
    )


def odd(how: str) -> str:
    beside = Path(__file__).with_name("odd_backbones.py")
    text = CONFIG.replace('backbone.name = "net"', f'backbone = {{ name = "odd", how = "{how}" }}')
    return text.replace('plugins = ["', f'plugins = ["{beside}", "').replace("epochs = 4", "epochs = 1")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("branches", "the model cannot be traced by torch.export: "),
        ("fixes the batch", "the model cannot be traced by torch.export: "),
        ("two-faced", "the exported pt2 differs from the model by more than is allowed (level: "),
        ("nan", "the exported pt2 differs from the model by more than is allowed (level: nan"),
    ],
)
def test_no_file_without_parity(call: Call, train: Any, how: str, message: str) -> None:
    folder = train(text=odd(how))
    code, out, err = call("export", folder, "--format", "pt2", "--out", "new/model.pt2", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (1, "ExportError")
    assert message in err
    assert "f32[" not in err  # torch's own report of a failed trace stays inside
    assert not Path("new").exists()
    if how == "two-faced":
        assert call("export", folder, "--format", "pt2", "--out", "model.pt2", "--tolerance", "0.1")[0] == 0


def test_what_is_compared(loaded: LoadedRun) -> None:
    tasks = ["level", "kind"]
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))

    def shifted(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = loaded.model(batch)
        return outputs | {"kind": outputs["kind"] + (3e-3 if len(batch) == 7 else 0)}

    level, kind = compare(loaded.model, shifted, inputs, tasks, 1e-4)
    largest = {task: float(values.abs().max()) for task, values in loaded.model(inputs).items()}
    assert (level.max_difference, level.holds) == (0, True)
    assert kind.max_difference == pytest.approx(3e-3, rel=1e-3)
    assert not kind.holds
    assert kind.allowed == pytest.approx(1e-4 * largest["kind"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "'tflite' is not one of 'safetensors', 'pt2', 'onnx'"),
        ([], "Missing option '--format'"),
        (["--format", "safetensors", "--out", "RUN/model.safetensors"], "is one of the run's own files"),
    ],
)
def test_calls_that_cannot_work(call: Call, folder: Path, arguments: list[str], message: str) -> None:
    code, out, err = call("export", folder, *(argument.replace("RUN", str(folder)) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err


def test_parity_needs_the_data_of_the_run(call: Call, folder: Path, plugin: Any) -> None:
    plugin.data_source = "another"
    code, out, err = call("export", folder, "--format", "safetensors", "--out", "model.safetensors")
    assert (code, out) == (2, "")
    assert "was trained on other data than there is here" in err
    assert not Path("model.safetensors").exists()


def test_models_in_double_precision(train: Any, tmp_path: Path) -> None:
    folder = train("dataset.float64=true", "backbone.float64=true", "dataset.storage=items")
    run = load_run(folder)
    assert run.input_dtype == torch.float64
    exported = export_run(run, "pt2", tmp_path / "model.pt2")
    assert [task.max_difference for task in exported.parity] == [0, 0]
    program: Any = torch.export.load(tmp_path / "model.pt2").module()
    assert program(torch.zeros(3, 4, dtype=torch.float64))["level"].dtype == torch.float64
