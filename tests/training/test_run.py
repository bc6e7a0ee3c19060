"""A run's files and results, and what ends a run early."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mtlbalance.errors import DataError, DeviceError, PluginError, TrainingError
from mtlbalance.training import run_training


def test_a_run_leaves_every_file_of_the_contract(configure: Any, plugin: Any, read_csv: Any) -> None:
    config = configure()
    outcome = run_training(config, quiet=True)
    folder = outcome.run_dir
    assert folder == config.run.output_dir / "trial" / "seed_3"
    assert outcome.status == "finished"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.resolved.toml", "environment.json", "metrics.csv", "gradient_stats.csv", "checkpoints",
        "model.safetensors", "log.jsonl", "results.json", "data.json",
    }  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert results == outcome.results
    required = {
        "schema", "run", "dataset", "backbone", "method", "seed", "protocol", "data_source", "best_epoch",
        "epochs_run", "metrics", "final_metrics", "config_hash", "wall_seconds",
    }  # fmt: skip
    assert required <= results.keys()
    assert (results["run"], results["dataset"], results["backbone"]) == ("trial", "pairs", "net")
    assert (results["method"], results["method_name"], results["seed"]) == ("gaba", "GABA", 3)
    assert results["config_hash"] == config.result_hash("made-up", "honest")
    assert results["facts"] == {"engines": 3}
    assert results["notices"] == ["these data are made up"]
    assert results["parameters"] == {"total": 92, "trainable": 92, "shared": 56, "heads": 36}
    assert '"samples": 30,' in (folder / "results.json").read_text()  # a count stays a count
    assert results["metrics"].keys() == {
        "level_rmse", "level_mae", "level_r2", "kind_accuracy", "kind_f1", "samples", "in_order", "constant",
    }  # fmt: skip
    rows = read_csv(folder / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    assert list(rows[0])[:7] == [
        "epoch", "step", "lr", "weight_decay", "train_loss", "train_loss_level", "train_loss_kind",
    ]  # fmt: skip
    assert list(rows[0])[-1] == "seconds"
    best = min(rows, key=lambda row: float(row["level_rmse"]))
    assert results["best_epoch"] == int(best["epoch"])
    assert results["validation_metrics"]["level_rmse"] == float(best["level_rmse"])
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert events == ["started", "finished"]
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    again = run_training(config, quiet=True)
    assert again.status == "already-finished"
    assert again.results == results


def test_training_learns(configure: Any, plugin: Any, read_csv: Any) -> None:
    outcome = run_training(
        configure("training.epochs=60", "balancer.name=fixed", "backbone.normalise=false"), quiet=True
    )
    rows = read_csv(outcome.run_dir / "metrics.csv")
    assert outcome.results["metrics"]["level_rmse"] < 0.7 * float(rows[0]["level_rmse"])
    assert outcome.results["metrics"]["kind_accuracy"] > 0.6


def test_identical_runs_write_identical_weights(configure: Any, plugin: Any, tmp_path: Path) -> None:
    first = run_training(configure(), out=tmp_path / "first", quiet=True).run_dir
    random.random(), np.random.random(), torch.rand(3)  # a used process must not change a run
    second = run_training(configure(), out=tmp_path / "second", quiet=True).run_dir
    other = run_training(configure("run.seed=4"), out=tmp_path / "other", quiet=True).run_dir
    drawn = run_training(configure("dataset.spoil=draws"), out=tmp_path / "drawn", quiet=True).run_dir
    weights = (first / "model.safetensors").read_bytes()
    assert weights == (second / "model.safetensors").read_bytes()
    assert weights != (other / "model.safetensors").read_bytes()
    assert (
        weights == (drawn / "model.safetensors").read_bytes()
    )  # data that is prepared draws, kept data does not
    assert (first / "gradient_stats.csv").read_bytes() == (second / "gradient_stats.csv").read_bytes()


def test_the_best_weights_give_the_best_metrics(configure: Any, plugin: Any) -> None:
    config = configure("dataset.validation=false", "training.lr=0.2", "training.epochs=12")
    outcome = run_training(config, quiet=True)
    model = plugin.Net(config.backbone.options)
    model.heads = torch.nn.ModuleDict({"level": torch.nn.Linear(8, 1), "kind": torch.nn.Linear(8, 3)})
    weights = safetensors.torch.load_file(outcome.run_dir / "model.safetensors")
    model.load_state_dict(weights)
    model.eval()
    test = plugin.build_pairs(config.dataset.options).test
    with torch.no_grad():
        predicted = model.heads["level"](model.trunk(test.inputs)).squeeze(-1)
    rmse = float((predicted - test.targets["level"]).double().square().mean().sqrt())
    assert rmse == pytest.approx(outcome.results["metrics"]["level_rmse"], rel=1e-6)
    assert outcome.results["metrics"]["in_order"] == 1.0


def test_with_a_validation_set_the_test_set_is_read_once(configure: Any, plugin: Any, read_csv: Any) -> None:
    config = configure("dataset.storage=items", "training.epochs=4", "training.lr=0.3")
    outcome = run_training(config, quiet=True)
    assert plugin.reads["test"] == 30
    assert (
        plugin.reads["validation"] == 1 + 4 * 24 + 1
    )  # one to see that its targets fit, one to record the dtype
    results = outcome.results
    assert results["metrics"]["samples"] == results["final_metrics"]["samples"] == 30
    assert results["validation_metrics"]["samples"] == 24
    first_test_read = plugin.trace.index(("fetch", "test"))
    assert ("on_epoch_end", 3) in [entry[:2] for entry in plugin.trace[:first_test_read]]


def test_without_one_the_test_set_is_watched(configure: Any, plugin: Any, read_csv: Any) -> None:
    config = configure("dataset.storage=items", "dataset.validation=false", "training.epochs=3")
    outcome = run_training(config, quiet=True)
    rows = read_csv(outcome.run_dir / "metrics.csv")
    assert plugin.reads["test"] == 1 + 3 * 30 + 1
    assert "validation_metrics" not in outcome.results
    best, last = rows[outcome.results["best_epoch"]], rows[-1]
    assert outcome.results["metrics"]["level_rmse"] == float(best["level_rmse"])
    assert outcome.results["final_metrics"]["level_rmse"] == float(last["level_rmse"])


def test_the_process_gets_its_generators_and_flags_back(configure: Any, plugin: Any) -> None:
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(3).tolist(), np.random.random(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    run_training(configure("training.epochs=1"), quiet=True)
    assert (torch.rand(3).tolist(), np.random.random(), random.random()) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_nan_loss_names_task_epoch_and_step_and_keeps_the_checkpoints(
    configure: Any, plugin: Any, read_csv: Any
) -> None:
    config = configure("dataset.nan_loss_in_epoch=2", "balancer.name=fixed")
    with pytest.warns(UserWarning, match="NaN or infinite"), pytest.raises(TrainingError) as caught:
        run_training(config, quiet=True)
    assert caught.value.exit_code == 1
    assert "'level' is nan in epoch 2, step 1" in str(caught.value)
    folder = config.run.output_dir / "trial" / "seed_3"
    assert {path.name for path in (folder / "checkpoints").glob("*.pt")} == {
        "epoch_00000.pt",
        "epoch_00001.pt",
    }
    assert len(read_csv(folder / "metrics.csv")) == 2
    assert not (folder / "results.json").exists()
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["event"] == "failed"


@pytest.mark.filterwarnings("ignore:Fixed.*NaN or infinite")
def test_a_nan_target_is_found_at_its_batch(configure: Any, plugin: Any) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    step = int((order == 41).nonzero()) // 16
    with pytest.raises(TrainingError, match=rf"'level' is nan in epoch 0, step {step} "):
        run_training(configure("dataset.nan_target_at=41", "balancer.name=fixed"), quiet=True)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("dataset.empty=true", DataError, "the training set is empty"),
        ("backbone.frozen=true", PluginError, "no trainable parameters"),
        ("dataset.key_metric=levle", PluginError, "the key metric 'levle' is not computed"),
        ("training.batch_size=61", DataError, "less than one batch"),
        pytest.param(
            "run.device=cuda", DeviceError, "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said(
    configure: Any, plugin: Any, override: str, error: type[Exception], message: str
) -> None:
    config = configure(override, "training.drop_last=true")
    with pytest.raises(error, match=message):
        run_training(config, quiet=True)
    if "key_metric" not in override:  # nothing was written
        assert not (config.run.output_dir / "trial" / "seed_3").exists()


def test_bf16_trains_fp32_weights(configure: Any, plugin: Any) -> None:
    coarse = run_training(configure("training.precision=bf16", "run.name=coarse"), quiet=True)
    fine = run_training(configure(), quiet=True)
    weights = safetensors.torch.load_file(coarse.run_dir / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if "num_batches" not in name} == {torch.float32}
    assert coarse.results["metrics"] != fine.results["metrics"]
    assert coarse.results["metrics"]["level_rmse"] == pytest.approx(
        fine.results["metrics"]["level_rmse"], rel=0.05
    )


def test_a_failing_observer_is_disabled_once(configure: Any, plugin: Any) -> None:
    plugin.observer_fails_in = "on_epoch_end"
    with pytest.warns(
        RuntimeWarning, match=r"training_plugin.*on_epoch_end.*ValueError: the tracker is away"
    ):
        outcome = run_training(configure(), quiet=True)
    assert outcome.results["epochs_run"] == 6
    calls = [entry[0] for entry in plugin.trace if entry[0].startswith("on_")]
    assert calls == ["on_run_start", "on_epoch_end"]


def test_observers_see_the_run(configure: Any, plugin: Any) -> None:
    outcome = run_training(configure("training.epochs=2"), quiet=True)
    calls = [entry for entry in plugin.trace if entry[0].startswith("on_")]
    assert calls[0] == ("on_run_start", "trial")
    assert [call[1] for call in calls[1:-1]] == [0, 1]
    assert calls[-1] == ("on_run_end", outcome.results["best_epoch"], True)
