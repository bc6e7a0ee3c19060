"""What fails underneath a run is told as what it is, and costs no more than it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtlbalance.errors import DataError, TrainingError
from mtlbalance.training import run_training
from mtlbalance.training.checkpoints import Checkpoints


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_that_cannot_be_read_is_named_and_the_run_goes_on_from_there(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path, num_workers: int
) -> None:
    options = ("dataset.storage=items", "training.epochs=2")
    whole = run_training(configure(*options), out=tmp_path / "whole", quiet=True).run_dir
    plugin.reads.clear()
    plugin.unreadable_after = 1 + 16 * 2 + 5  # in the third batch
    broken = configure(*options, f"training.num_workers={num_workers}")
    with pytest.raises(
        DataError, match=r"dataset 'pairs' could not read its training set: OSError"
    ) as caught:
        run_training(broken, out=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 2
    assert "shard-7" in str(caught.value)
    saved = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert saved is not None
    assert saved.state["unfinished"]["batches"] == 2
    plugin.unreadable_after = None
    run_training(configure(*options), out=tmp_path / "run", quiet=True)
    assert_same(whole, tmp_path / "run")


def test_an_epoch_that_cannot_be_evaluated_is_not_trained_again(
    configure: Any, plugin: Any, assert_same: Any, tmp_path: Path
) -> None:
    config = configure("dataset.storage=items", "training.epochs=2")
    whole = run_training(config, out=tmp_path / "whole", quiet=True).run_dir
    plugin.reads.clear()
    plugin.unreadable_set, plugin.unreadable_after = "validation", 10
    with pytest.raises(DataError, match=r"could not read its validation set"):
        run_training(config, out=tmp_path / "run", quiet=True)
    plugin.unreadable_after = None
    plugin.reads.clear()
    run_training(config, out=tmp_path / "run", quiet=True)
    assert plugin.reads["train"] == 1 + 60  # one to see that its targets fit, and the second epoch
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "phase", "lower"),
    [
        ("dataset.huge=loss", "the loss of task 'level'", "training.batch_size"),
        ("dataset.huge=evaluation", "the evaluation", "training.eval_batch_size"),
        ("backbone.huge=forward", "the forward pass", "training.batch_size"),
        ("backbone.huge=backward", "the backward pass", "training.batch_size"),
    ],
)
def test_out_of_memory_names_the_phase_and_what_to_lower(
    configure: Any, plugin: Any, override: str, phase: str, lower: str
) -> None:
    config = configure(override, "balancer.name=fixed", "training.gradient_stats_every=0")
    with pytest.raises(TrainingError, match=rf"out of memory in {phase} \(.*; lower .*{lower}") as caught:
        run_training(config, quiet=True)
    assert caught.value.exit_code == 1
    log = config.run.output_dir / "trial" / "seed_3" / "log.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "failed"


def test_one_sample_left_for_a_normalisation_over_the_batch(configure: Any, plugin: Any) -> None:
    with pytest.raises(
        TrainingError, match=r"cannot over a batch of one sample; set training\.drop_last = true"
    ):
        run_training(configure("dataset.samples=17"), quiet=True)
    assert (
        run_training(configure("dataset.samples=17", "training.drop_last=true"), quiet=True).status
        == "finished"
    )


def test_out_of_memory_while_balancing(configure: Any, plugin: Any) -> None:
    """A balancer that reads gradients runs the backward pass of each task itself."""
    with pytest.raises(
        TrainingError, match=r"out of memory in balancing by GABA .* no gradients of each task"
    ):
        run_training(configure("backbone.huge=backward", "balancer.warmup_steps=0"), quiet=True)


@pytest.mark.parametrize("event", ["on_run_start", "on_run_end"])
def test_an_observer_may_fail_at_any_event(configure: Any, plugin: Any, event: str) -> None:
    plugin.observer_fails_in = event
    with pytest.warns(RuntimeWarning, match=rf"training_plugin.*failed in {event} and is disabled"):
        assert run_training(configure("training.epochs=1"), quiet=True).status == "finished"
