"""The 14 stages happen in the study's order, seen from outside: global optimizer hooks, traces, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mtlbalance.training import run_training
from mtlbalance.training.checkpoints import Checkpoints


@pytest.fixture
def optimizer_trace(plugin: Any) -> Iterator[list[Any]]:
    """Adds every AdamW step to the plugin's trace, with what holds at that moment."""

    def before(optimizer: Optimizer, *_: Any) -> None:
        group = optimizer.param_groups[0]
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        plugin.trace.append(("step", round(group["lr"], 6), group["weight_decay"], float(norm)))

    def after(optimizer: Optimizer, *_: Any) -> None:
        plugin.trace.append(("stepped",))

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield plugin.trace
    for handle in handles:
        handle.remove()


STUDY_LIKE = (
    "balancer.name=traced", "dataset.storage=items", "training.gradient_stats_every=0", "training.grad_clip=0.01",
    "training.weight_decay=0.1", "training.weight_decay_late=0.05", "training.weight_decay_late_epoch=2",
    "training.epochs=9", "dataset.constant_metric=true", "training.scheduler_patience=1", "training.patience=7",
)  # fmt: skip


def test_the_stages_of_a_batch_and_of_an_epoch_come_in_order(
    configure: Any, optimizer_trace: list[Any]
) -> None:
    run_training(configure(*STUDY_LIKE, "training.epochs=1"), quiet=True)
    names = [entry[0] for entry in optimizer_trace]
    start = names.index("on_run_start") + 1
    batch = ["fetch"] * 16 + ["forward", "balancer", "backward", "step", "stepped"]
    last_batch = ["fetch"] * 12 + batch[16:]
    evaluation = ["fetch"] * 24 + ["forward-eval", "evaluate"]
    end = start + 3 * len(batch) + len(last_batch)
    assert names[start:end] == batch * 3 + last_batch
    assert names[end : end + 1 + len(evaluation) + 1] == ["end_epoch", *evaluation, "on_epoch_end"]


def test_the_balancer_gets_per_sample_losses_and_what_it_may_need(configure: Any, plugin: Any) -> None:
    run_training(configure(*STUDY_LIKE), quiet=True)
    call = next(entry for entry in plugin.trace if entry[0] == "balancer")
    assert call[1] == {"level": (16,), "kind": (16,)}
    assert call[2] == ["model", "shared_params", "targets"]


def test_rates_decay_clipping_plateau_and_early_stop(
    configure: Any, optimizer_trace: list[Any], read_csv: Any
) -> None:
    outcome = run_training(configure(*STUDY_LIKE), quiet=True)
    steps = [entry for entry in optimizer_trace if entry[0] == "step"]
    by_epoch = [steps[4 * epoch : 4 * epoch + 4] for epoch in range(len(steps) // 4)]
    # The key metric is constant: epoch 0 is best for ever. The plateau schedule first looks after epoch 2 (the
    # first after warm-up), notes that as its best, and halves the rate after each two more without a gain.
    rates = [0.002, 0.011, 0.02, 0.02, 0.02, 0.01, 0.01, 0.005]
    assert [{step[1] for step in epoch} for epoch in by_epoch] == [{rate} for rate in rates]
    decays = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05]
    assert [{step[2] for step in epoch} for epoch in by_epoch] == [{decay} for decay in decays]
    assert all(step[3] <= 0.01 * (1 + 1e-4) for step in steps)  # clipped before the step
    # Patience 7: epochs 1 to 7 bring nothing, so epoch 7 is the last, and it is complete.
    assert outcome.results["stopped"] == "early-stop"
    assert outcome.results["epochs_run"] == 8
    assert outcome.results["best_epoch"] == 0
    rows = read_csv(outcome.run_dir / "metrics.csv")
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    assert [float(row["weight_decay"]) for row in rows] == decays


def test_the_checkpoint_holds_the_plateau_step_and_comes_before_the_early_stop(
    configure: Any, plugin: Any
) -> None:
    outcome = run_training(configure(*STUDY_LIKE), quiet=True)
    last = load_checkpoint(outcome.run_dir, 7)
    assert last["plateau"]["last_epoch"] == 6  # epochs 2 to 7
    assert last["early_stopping"] == {"epoch": 0, "value": 1.0}
    assert last["epoch"] == 7
    assert last["step"] == 32


def test_the_shadow_follows_the_step_and_is_what_is_evaluated(
    configure: Any, optimizer_trace: list[Any]
) -> None:
    outcome = run_training(configure(*STUDY_LIKE, "training.ema_decay=0"), quiet=True)
    state = load_checkpoint(outcome.run_dir, 7)
    weights = state["weights"]
    live = [name.removeprefix("model.") for name in weights if name.startswith("model.")]
    assert live
    for name in live:  # decay 0: the shadow is the live model after its last step
        assert torch.equal(weights[f"ema.module.{name}"], weights[f"model.{name}"]), name
    names = [entry[0] for entry in optimizer_trace]
    assert names.count("forward-eval") == 8 + 2  # a validation batch an epoch; the test set for best and last


def test_buffers_of_the_shadow_are_the_live_ones(configure: Any, plugin: Any) -> None:
    outcome = run_training(configure("training.ema_decay=0.99"), quiet=True)
    state = load_checkpoint(outcome.run_dir, 5)
    saved = state["weights"]
    live = [name.removeprefix("model.") for name in saved if name.startswith("model.")]
    buffers = [name for name in live if "running" in name or "num_batches" in name]
    assert len(buffers) == 3
    assert all(torch.equal(saved[f"ema.module.{name}"], saved[f"model.{name}"]) for name in buffers)
    weights = [name for name in live if name not in buffers]
    assert not any(torch.equal(saved[f"ema.module.{name}"], saved[f"model.{name}"]) for name in weights)


def test_learned_task_weights_are_trained_without_decay(configure: Any, plugin: Any) -> None:
    config = configure(
        "balancer.name=learned", "training.weight_decay=0.5", "training.weight_decay_late=0.9",
        "training.weight_decay_late_epoch=1", "training.gradient_stats_every=0",
    )  # fmt: skip
    outcome = run_training(config, quiet=True)
    state = load_checkpoint(outcome.run_dir, 5)
    assert state["balancer"]["idle"].item() == 1.0  # a zero gradient: only decay could move it
    assert (state["balancer"]["log_variances"] != 2.0).all()
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.9, 0.0]


def load_checkpoint(run_dir: Path, epoch: int) -> Any:
    saved = Checkpoints(run_dir / "checkpoints").end_of_epoch(epoch)
    assert saved is not None
    return saved.state | {"weights": saved.weights}
