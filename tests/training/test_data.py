"""Data that does not fit the tasks, or is not what the run started on, is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtlbalance.datasets import InMemoryDataset
from mtlbalance.errors import DataError, PluginError, RunFolderError
from mtlbalance.training import run_training
from mtlbalance.training.record import CsvTable, json_bytes


@pytest.mark.parametrize("ended", ["interrupted", "finished"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_source": "nasa"}, "data_source: 'made-up' -> 'nasa'"),
        ({"input_shift": 1.0}, "sha256.training: "),
    ],
)
def test_other_data_is_never_mixed_into_a_run(
    configure: Any, plugin: Any, tmp_path: Path, ended: str, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    plugin.interrupt_after = 1 if ended == "interrupted" else None
    try:
        run_training(configure(), out=out, quiet=True)
    except KeyboardInterrupt:
        plugin.interrupt_after = None
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, value in change.items():
        setattr(plugin, name, value)
    with pytest.raises(RunFolderError, match="holds a run on other data") as caught:
        run_training(configure(), out=out, quiet=True)
    assert caught.value.exit_code == 2
    assert message in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    outcome = run_training(configure(), out=out, fresh=True, quiet=True)
    plugin.data_source, plugin.input_shift = "made-up", 0.0
    other = run_training(configure(), out=tmp_path / "other", quiet=True)
    same_hash = outcome.results["config_hash"] == other.results["config_hash"]
    assert same_hash == ("data_source" not in change)


def test_sets_that_are_not_in_memory_are_told_by_their_size(configure: Any, plugin: Any) -> None:
    outcome = run_training(configure("dataset.storage=items", "training.epochs=1"), quiet=True)
    described = json.loads((outcome.run_dir / "data.json").read_text())
    assert described["samples"] == {"training": 60, "validation": 24, "test": 30}
    assert described["sha256"] == {}
    assert described["facts"] == {"engines": 3}


def test_every_tensor_counts(configure: Any, plugin: Any) -> None:
    from mtlbalance.training.fingerprint import _sha256

    def one(**changed: torch.Tensor) -> str:
        columns = {"inputs": torch.arange(8.0).view(4, 2), "level": torch.arange(4.0), "row": torch.arange(4)}
        columns |= changed
        return _sha256(
            InMemoryDataset(columns["inputs"], {"level": columns["level"]}, {"row": columns["row"]})
        )

    same = one(inputs=torch.arange(8.0).view(4, 2).t().contiguous().t())
    others = [
        one(inputs=torch.ones(4, 2)),
        one(level=torch.ones(4)),
        one(row=torch.ones(4, dtype=torch.bool)),
    ]
    assert one() == same
    assert len({same, *others}) == 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("train misspelt", r"training set has targets for 'levle', which is no task; did you mean 'level'\?"),
        ("validation misspelt", "validation set has targets for 'levle'"),
        ("train without kind", "training set has no targets for task 'kind', which would never be trained"),
        ("test without kind", "test set has no targets for task 'kind'"),
        ("train class", "training set's targets of task 'kind' go from 1 to 3, .* classes are 0 to 2"),
    ],
)
def test_targets_must_fit_the_tasks(configure: Any, plugin: Any, spoil: str, message: str) -> None:
    config = configure(f'dataset.spoil="{spoil}"')
    with pytest.raises(DataError, match=message):
        run_training(config, quiet=True)
    assert not config.run.output_dir.exists()  # no folder is left behind, nor its parents


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("train misspelt", "training set has targets for 'levle'"),
        ("train class", "a target of task 'kind' cannot be used: Target 3 is out of bounds"),
    ],
)
def test_targets_of_sets_that_are_not_in_memory(
    configure: Any, plugin: Any, spoil: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run_training(configure(f'dataset.spoil="{spoil}"', "dataset.storage=items"), quiet=True)


@pytest.mark.parametrize("spoil", ["order", "outputs"])
def test_the_built_tasks_must_be_the_registered_ones(configure: Any, plugin: Any, spoil: str) -> None:
    with pytest.raises(PluginError, match=r"'pairs' is registered with .* but its build gives .*'kind'"):
        run_training(configure(f"dataset.spoil={spoil}"), quiet=True)


def test_a_build_that_fails_is_named_with_its_line(configure: Any, plugin: Any) -> None:
    with pytest.raises(
        PluginError,
        match=r"dataset 'pairs' cannot be built: KeyError: 'no such sensor' \(at .*training_plugin\.py:\d+\)",
    ):
        run_training(configure("dataset.spoil=build"), quiet=True)


def test_nan_is_an_empty_field(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "metrics.csv", [])
    table.append({"epoch": 0, "count": 259, "loss": float("nan"), "ratio": None})
    assert (tmp_path / "metrics.csv").read_text() == "epoch,count,loss,ratio\n0,259,,\n"


def test_a_metric_need_not_be_there_in_every_epoch(
    configure: Any, plugin: Any, read_csv: Any, assert_same: Any, tmp_path: Path
) -> None:
    def gives() -> dict[str, Any]:
        done = sum(entry[0] == "evaluate" for entry in plugin.trace) % 4
        return {"odd": np.float32(done)} if done % 2 else {"even": torch.tensor(float(done))}

    config = configure("training.epochs=4", "training.ema_decay=0", "dataset.validation=false")
    plugin.gives = gives
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    rows = read_csv(whole / "metrics.csv")
    assert [(row["odd"], row["even"]) for row in rows] == [("1.0", ""), ("", "2.0"), ("3.0", ""), ("", "0.0")]
    plugin.trace.clear()
    plugin.interrupt_after = 1
    with pytest.raises(KeyboardInterrupt):
        run_training(config, out=tmp_path / "parts", quiet=True)
    plugin.interrupt_after = None
    run_training(config, out=tmp_path / "parts", quiet=True)
    assert_same(whole, tmp_path / "parts")
    assert list(read_csv(tmp_path / "parts" / "metrics.csv")[0]) == list(rows[0])


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda: None, "must return numbers by name; it returned None"),
        (lambda: {"mark": "good"}, "metric 'mark' is no number but 'good'"),
        (lambda: {"curve": torch.ones(2)}, "metric 'curve' is no number but tensor"),
    ],
)
def test_an_evaluator_that_gives_no_numbers_is_told_so(
    configure: Any, plugin: Any, gives: Any, message: str
) -> None:
    plugin.gives = gives
    with pytest.raises(PluginError, match=message):
        run_training(configure(), quiet=True)


def test_what_json_cannot_hold_costs_no_result() -> None:
    facts = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "on": np.bool_(1),
        "lost": np.float64("nan"),
        "at": Path("a/b"),
    }
    told = json.loads(json_bytes({"facts": facts, "shape": list(np.array([30, 17])), "t": torch.tensor(2)}))
    expected = {"n": 3, "x": 0.5, "on": True, "lost": None, "at": str(Path("a/b"))}
    assert told == {"facts": expected, "shape": [30, 17], "t": 2}
