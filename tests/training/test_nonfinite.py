"""What is not finite: float16 overflows, bad losses under each policy, and what neither may reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mtlbalance.errors import NonFiniteError
from mtlbalance.training import run_training
from mtlbalance.training.checkpoints import Checkpoints, SavedRun

BAD = ("dataset.nan_loss_in_epoch=2", "balancer.name=fixed")
quiet_balancer = pytest.mark.filterwarnings("ignore:Fixed.*NaN or infinite")


def saved_run(folder: Path, epoch: int) -> SavedRun:
    saved = Checkpoints(folder / "checkpoints").end_of_epoch(epoch)
    assert saved is not None
    return saved


def all_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in weights.values())


@pytest.mark.parametrize("method", ["fixed", "gaba", "uncertainty"])
def test_fp16_leaves_out_overflows_and_learns(configure: Any, plugin: Any, method: str) -> None:
    config = configure("training.precision=fp16", f"balancer.name={method}", "training.epochs=30")
    outcome = run_training(config, quiet=True)
    saved = saved_run(outcome.run_dir, 29)
    assert all_finite(saved.weights)
    taken = int(saved.state["optimizer"]["state"][0]["step"])
    overflows = 120 - taken
    assert overflows < 30
    assert overflows > 0 or method == "gaba"  # whose probes have a scale of their own
    assert saved.state["scaler"]["scale"] == 2.0 ** (
        16 - overflows
    )  # it halves at each; no growth in so few steps
    assert saved.weights["ema.n_averaged"] == taken + 1  # the shadow moved with the weights, never alone
    assert outcome.results["skipped_steps"] == 0
    fine = run_training(
        configure(f"balancer.name={method}", "training.epochs=30", "run.name=fine"), quiet=True
    )
    assert outcome.results["metrics"]["level_rmse"] == pytest.approx(
        fine.results["metrics"]["level_rmse"], rel=0.2
    )


def test_an_overflow_at_every_scale_is_an_error(configure: Any, plugin: Any) -> None:
    config = configure(
        "training.precision=fp16", "dataset.huge_gradient=true", "balancer.name=fixed", "training.epochs=40"
    )
    with pytest.raises(NonFiniteError, match=r"overflow float16 even .* training.precision=bf16"):
        run_training(config, quiet=True)


@quiet_balancer
def test_skip_leaves_the_step_out_of_everything(configure: Any, plugin: Any, read_csv: Any) -> None:
    outcome = run_training(configure(*BAD, "training.on_nonfinite=skip"), quiet=True)
    assert outcome.results["skipped_steps"] == 1
    saved = saved_run(outcome.run_dir, 5)
    assert all_finite(saved.weights)
    assert saved.state["step"] == 24
    assert int(saved.state["optimizer"]["state"][0]["step"]) == 23
    assert saved.weights["ema.n_averaged"] == 24
    assert saved.weights["model.trunk.1.num_batches_tracked"] == 23  # BatchNorm did not see the batch either
    assert len(read_csv(outcome.run_dir / "metrics.csv")) == 6
    events = [json.loads(line) for line in (outcome.run_dir / "log.jsonl").read_text().splitlines()]
    [skipped] = [event for event in events if event["event"] == "step_skipped"]
    assert (skipped["epoch"], skipped["batch"]) == (2, 1)
    assert "'level' is nan" in skipped["reason"]


@quiet_balancer
def test_what_was_left_out_and_how_long_it_took_is_known_after_a_resume(
    configure: Any, plugin: Any, assert_same: Any, read_csv: Any, tmp_path: Path
) -> None:
    config = configure(*BAD, "training.on_nonfinite=skip")
    whole = run_training(config, out=tmp_path / "whole", quiet=True)
    plugin.interrupt_after = 3  # the bad batch is in epoch 2
    with pytest.raises(KeyboardInterrupt):
        run_training(config, out=tmp_path / "parts", quiet=True)
    plugin.interrupt_after = None
    parts = run_training(config, out=tmp_path / "parts", quiet=True)
    assert whole.results["skipped_steps"] == 1
    assert_same(whole.run_dir, parts.run_dir)
    seconds = [float(row["seconds"]) for row in read_csv(tmp_path / "parts" / "metrics.csv")]
    assert parts.results["wall_seconds"] >= sum(seconds)


@quiet_balancer
def test_fp16_leaves_out_a_bad_loss_and_goes_on(configure: Any, plugin: Any) -> None:
    outcome = run_training(
        configure(*BAD, "training.on_nonfinite=skip", "training.precision=fp16"), quiet=True
    )
    assert outcome.results["skipped_steps"] == 1
    assert all_finite(saved_run(outcome.run_dir, 5).weights)


@quiet_balancer
def test_bad_inputs_do_not_reach_the_running_statistics(configure: Any, plugin: Any) -> None:
    outcome = run_training(
        configure("dataset.nan_input_at=3", "balancer.name=fixed", "training.on_nonfinite=skip"), quiet=True
    )
    assert outcome.results["skipped_steps"] == 6  # the batch with that sample, once an epoch
    assert all_finite(safetensors.torch.load_file(outcome.run_dir / "model.safetensors"))


@quiet_balancer
def test_the_budget_for_skipping(configure: Any, plugin: Any) -> None:
    config = configure(
        "dataset.nan_target_at=41",
        "balancer.name=fixed",
        "training.on_nonfinite=skip",
        "training.max_skipped_steps=2",
    )
    with pytest.raises(NonFiniteError, match=r"'level' is nan .* more than the 2 steps") as caught:
        run_training(config, quiet=True)
    assert caught.value.exit_code == 1
    folder = config.run.output_dir / "trial" / "seed_3"
    assert all_finite(saved_run(folder, 1).weights)


@quiet_balancer
def test_stop_ends_the_run_with_the_epochs_before(
    configure: Any, plugin: Any, read_csv: Any, tmp_path: Path
) -> None:
    outcome = run_training(
        configure(*BAD, "training.on_nonfinite=stop"), out=tmp_path / "stopped", quiet=True
    )
    assert (outcome.results["stopped"], outcome.results["epochs_run"]) == ("non-finite", 2)
    short = run_training(
        configure("balancer.name=fixed", "training.epochs=2"), out=tmp_path / "short", quiet=True
    )
    for name in ("metrics", "final_metrics", "validation_metrics", "best_epoch"):
        assert outcome.results[name] == short.results[name]
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "stopped", tmp_path / "short")
    ]
    assert weights[0] == weights[1]
    assert len(read_csv(outcome.run_dir / "metrics.csv")) == 2


@quiet_balancer
def test_stop_without_an_epoch_is_the_error(configure: Any, plugin: Any) -> None:
    with pytest.raises(NonFiniteError, match="'level' is nan in epoch 0"):
        run_training(
            configure("dataset.nan_target_at=41", "balancer.name=fixed", "training.on_nonfinite=stop"),
            quiet=True,
        )
