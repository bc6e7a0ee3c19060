"""``mtlbalance predict``: what it writes, what it reads, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtlbalance.cli.main import main
from mtlbalance.errors import DataError
from mtlbalance.inference import LoadedRun
from mtlbalance.inference.chunks import dataset_chunks
from mtlbalance.inference.input_files import read_chunks
from mtlbalance.inference.predicting import PredictedChunk
from mtlbalance.inference.table import write_predictions

Rows = list[dict[str, str]]
Call = Callable[..., tuple[int, str, str]]


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


def read(path: str = "out.csv") -> Rows:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Rows, name: str) -> np.ndarray[Any, Any]:
    return np.array([float(row[name]) for row in rows])


def test_a_split_gives_the_metrics_in_the_results(call: Call, folder: Path) -> None:
    code, out, err = call("predict", folder, "--split", "test", "--out", "new/out.csv", "--batch-size", "7")
    assert code == 0
    assert err == "notice: these data are made up\n"
    assert out.splitlines()[0].startswith("30 predictions of trial, averaged weights of epoch ")
    rows = read("new/out.csv")
    assert list(rows[0]) == [
        "row", "predicted_level", "predicted_kind", "probability_kind_0", "probability_kind_1",
        "probability_kind_2", "target_level", "target_kind",
    ]  # fmt: skip
    assert [int(row["row"]) for row in rows] == list(range(30))
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    error = column(rows, "predicted_level") - column(rows, "target_level")
    assert math.sqrt((error**2).mean()) == pytest.approx(metrics["level_rmse"], rel=1e-6)
    assert (column(rows, "predicted_kind") == column(rows, "target_kind")).mean() == pytest.approx(
        metrics["kind_accuracy"]
    )
    likely = np.stack([column(rows, f"probability_kind_{index}") for index in range(3)], axis=1)
    np.testing.assert_allclose(likely.sum(axis=1), 1, rtol=1e-6)
    assert (likely.argmax(axis=1) == column(rows, "predicted_kind")).all()


def test_json_and_logits(call: Call, folder: Path, loaded: LoadedRun) -> None:
    code, out, _ = call("predict", folder, "--split", "validation", "--out", "out.csv", "--json", "--logits")
    document = json.loads(out)
    assert code == 0
    assert (document["samples"], document["source"], document["written_to"]) == (24, "validation", "out.csv")
    assert document["columns"] == list(read()[0])
    assert (document["notices"], document["non_finite"]) == (["these data are made up"], {})
    logits = loaded.predict(loaded.split("validation"), logits=True)["kind"]
    assert column(read(), "logit_kind_2").tolist() == logits[:, 2].tolist()  # every digit is there


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def save_csv(path: Path, inputs: Tensor, header: str = "") -> None:
    np.savetxt(path, inputs.numpy(), delimiter=",", fmt="%.9g", header=header, comments="")


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("x.npy", lambda path, x: np.save(path, x.numpy())),
        ("x.NPY", lambda path, x: path.write_bytes(npy(x.numpy().astype(np.float64)))),
        ("x.npz", lambda path, x: np.savez(path, anything=x.numpy())),
        ("y.npz", lambda path, x: np.savez(path, other=np.zeros(3), inputs=x.numpy())),
        ("x.pt", lambda path, x: torch.save(x, path)),
        ("y.pt", lambda path, x: torch.save({"inputs": x, "labels": torch.zeros(1)}, path)),
        ("x.csv", save_csv),
        ("named.csv", lambda path, x: save_csv(path, x, "a,b,c,d")),
        ("pandas.csv", lambda path, x: save_csv(path, x, "0,1,2,3")),
    ],
)
@pytest.mark.filterwarnings("default:.* is taken for a header")
def test_files_of_inputs(call: Call, folder: Path, loaded: LoadedRun, name: str, save: Any) -> None:
    inputs = loaded.data.test.inputs  # type: ignore[attr-defined]
    save(Path(name), inputs)
    code, _, err = call(
        "predict", folder, "--input", name, "--out", "out.csv", "--batch-size", 8, "--device", "cpu"
    )
    warning = "warning: pandas.csv:1: this row, which counts columns, is taken for a header; if it is an input, put "
    said = err.removeprefix("notice: these data are made up\n")
    assert (code, said.partition("a row")[0]) == (0, warning if name == "pandas.csv" else "")
    expected = loaded.predict(inputs)
    rows = read()
    assert list(rows[0])[:2] == ["predicted_level", "predicted_kind"]
    np.testing.assert_allclose(column(rows, "predicted_level"), expected["level"], rtol=0, atol=1e-5)
    assert column(rows, "predicted_kind").tolist() == expected["kind"].argmax(dim=1).tolist()


class Hidden:
    pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npy", None, "gone.npy: no such file"),
        ("x.npy", b"", "x.npy: cannot be read as a NumPy file"),
        ("x.npy", lambda path: np.save(path, np.zeros((3, 5))), "x.npy: expected the shape (N, 4) (4 features), found"),
        ("x.npy", lambda path: np.save(path, np.array([{}])), "x.npy: cannot be read as a NumPy file of numbers"),
        ("x.npz", lambda path: np.savez(path, a=np.zeros(1), b=np.zeros(1)), "holds a, b; call the array to predict"),
        ("x.npz", b"PK\x03\x04 torn", "x.npz: cannot be read as a NumPy file"),
        ("x.pt", b"torn", "x.pt: cannot be read as a file of tensors"),
        ("x.pt", lambda path: torch.save(Hidden(), path), "x.pt: cannot be read as a file of tensors"),
        ("x.pt", lambda path: torch.save([1], path), "x.pt: holds list, not a tensor"),
        ("x.pt", lambda path: torch.save(1j * torch.ones(3, 4), path), "needed, but the tensor is complex"),
        ("x.pt", lambda path: torch.save(torch.ones(3, 4).to_sparse(), path), "x.pt: real numbers, each of them"),
        ("x.csv", b"", "x.csv: there is nothing to predict on: the file has no rows of numbers"),
        ("x.csv", b"a,b,c,d\n", "x.csv: there is nothing to predict on"),
        ("x.csv", b"1,2,3,4\n\n1,2,3\n", "x.csv:3: expected 4 columns, one flattened input of shape (4,) a row"),
        ("x.csv", b"1,2,3,4\n1,2,,4\n", "x.csv:2: column 3 holds '', not a number"),
        ("x.csv", b"a,b,c,d\n1,2,3,4\ne,f,g,h\n", "x.csv:3: column 1 holds 'e', not a number"),
        ("x.csv", b"\xff\xfe\x00", "x.csv: cannot be read as CSV"),
        ("x.txt", b"1 2 3 4\n", "x.txt: dataset 'pairs' reads no files of its own; give finished inputs in .npy,"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(call: Call, folder: Path, name: str, content: Any, message: str) -> None:
    if callable(content):
        content(Path(name))
    elif content is not None:
        Path(name).write_bytes(content)
    Path("out.csv").write_text("of an earlier call")
    # Batches of one: what comes before the fault has been written already, but not to out.csv.
    code, out, err = call("predict", folder, "--input", name, "--out", "out.csv", "--batch-size", 1)
    assert (code, out) == (2, "")
    assert message in err
    assert Path("out.csv").read_text() == "of an earlier call"
    assert {path.name for path in Path().iterdir()} <= {"out.csv", name}  # no temporary file is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out.csv"], "give either --input FILE or --split"),
        (["--out", "out.csv", "--split", "test", "--input", "x.npy"], "give either --input FILE or --split"),
        (["--split", "test"], "Missing option '--out'"),
        (["--split", "test", "--out", "RUN/results.json"], "is one of the run's own files"),
        (["--split", "test", "--out", "RUN/checkpoints/x.csv"], "is one of the run's own files"),
        (["--split", "test", "--out", "."], "is a folder; name a file"),
        (["--input", "x.npy", "--out", "./x.npy"], "is the file to be read"),
        (["--split", "test", "--out", "out.csv", "--device", "tpu"], "--device = 'tpu' is no device"),
        (["--split", "test", "--out", "out.csv", "--weights", "best"], "'best' is not one of"),
        (["--split", "test", "--out", "out.csv", "dataset.samples=9"], "was trained with other options"),
    ],
)
def test_calls_that_cannot_work(call: Call, folder: Path, arguments: list[str], message: str) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = call(
        "predict", folder, *(argument.replace("RUN", str(folder)) for argument in arguments)
    )
    assert (code, out) == (2, "")
    assert message in err
    code, out, _ = call("predict", folder, *(a.replace("RUN", str(folder)) for a in arguments), "--json")
    assert code == json.loads(out)["error"]["exit_code"] == 2
    assert sorted(folder.rglob("*")) == before
    assert not Path("out.csv").exists()


def test_what_is_no_file_is_not_replaced_by_one(call: Call, folder: Path) -> None:
    os.mkfifo("out.csv")  # as /dev/null is none, which root would lose
    code, _, err = call("predict", folder, "--split", "test", "--out", "out.csv")
    assert (code, err) == (2, "error: out.csv is no ordinary file; name a file\n")
    code, _, err = call("export", folder, "--format", "safetensors", "--out", "out.csv")
    assert code == 2
    assert err.endswith("error: out.csv is no ordinary file; name a file\n")
    assert Path("out.csv").is_fifo()


def test_a_folder_that_is_no_run(call: Call) -> None:
    code, out, err = call("predict", "gone", "--split", "test", "--out", "out.csv")
    assert (code, out, err) == (2, "", "error: there is no run folder gone\n")


def test_a_call_that_is_stopped_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.lib.format.open_memmap(
        "x.npy", mode="w+", dtype=np.float32, shape=(3_000_000, 4)
    ).flush()  # of zeros: a hole
    process = subprocess.Popen(
        [sys.executable, "-m", "mtlbalance", "predict", str(folder), "--input", "x.npy", "--out", "out.csv"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob(".out.csv.tmp-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in err
    assert err.endswith("pre-empted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_predictions_that_are_not_finite_are_counted(call: Call, folder: Path) -> None:
    inputs = np.zeros((5, 4), dtype=np.float32)
    inputs[3, 1] = math.nan
    np.save("x.npy", inputs)
    code, out, err = call(
        "predict", folder, "--input", "x.npy", "--out", "out.csv", "--json", "--batch-size", 2
    )
    assert code == 0
    assert json.loads(out)["non_finite"] == {"level": 1, "kind": 1}
    assert "warning: 1 of 5 predictions of task 'level' are NaN or infinite" in err
    assert [row["predicted_level"] == "nan" for row in read()] == [False, False, False, True, False]


class Counted(Dataset[Any]):
    """Samples that know how many of them are alive."""

    def __init__(self, length: int) -> None:
        self.length, self.most_alive = length, 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        inputs = torch.full((4,), float(index))
        self.alive.add(inputs)
        self.most_alive = max(self.most_alive, len(self.alive))
        return inputs, {}, {"index": torch.tensor(index)}


def test_a_chunk_of_samples_is_in_memory_and_no_more(loaded: LoadedRun, tmp_path: Path) -> None:
    dataset = Counted(400)
    chunks = dataset_chunks(dataset, 10, name="counted")
    table = write_predictions(tmp_path / "out.csv", loaded.predict_chunks(chunks, logits=True), loaded.tasks)
    assert table.samples == 400
    assert dataset.most_alive <= 20


def test_a_file_is_read_as_its_predictions_are_written(loaded: LoadedRun, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2,3,4\n" * 6 + "broken\n")
    predicted = loaded.predict_chunks(read_chunks(tmp_path / "x.csv", loaded, 2))
    for _ in range(3):
        assert len(next(predicted).outputs["level"]) == 2  # before the fault is even read
    with pytest.raises(DataError, match=r"x\.csv:7: expected 4 columns"):
        next(predicted)


def test_columns_of_one_name_are_refused(loaded: LoadedRun, tmp_path: Path) -> None:
    outputs = {"level": torch.zeros(2), "kind": torch.zeros(2, 3)}
    chunk = PredictedChunk(outputs, {}, {"predicted_level": torch.zeros(2)})
    with pytest.raises(DataError, match="two columns would be called 'predicted_level'"):
        write_predictions(tmp_path / "out.csv", [chunk], loaded.tasks)
    assert not (tmp_path / "out.csv").exists()
