"""Whole runs beside the bare loop, growth with tasks, parameters and ranks, the allocator: all run, none judged."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Script = Callable[[str], ModuleType]
Figures = Callable[..., dict[str, Any]]
TINY_RUNS = [
    "--rounds",
    "1",
    "--epochs",
    "2",
    "--steps",
    "2",
    "--batch-size",
    "8",
    "--watched",
    "5",
    "--width",
    "8",
]


def test_a_run_is_compared_with_the_bare_loop_and_taken_apart(script: Script, figures: Figures) -> None:
    small = ["--models", "mlp", "--checkpoint-hidden-size", "8"]
    found = figures("end_to_end", *small, *TINY_RUNS)
    (result,) = found["results"]
    assert result["speed"]["bare loop"]["median"] == 1.0
    assert result["time_to_run"]["mtlbalance run"]["median"] == 1.0
    expected = {"bare loop", "mtlbalance run", "without evaluation", "through a DataLoader"}
    assert expected | {f"without {part}" for part in script("run_parts").WITHOUT} < set(result["speed"])
    assert sum(result["shares"].values()) == pytest.approx(1.0)
    assert min(result["shares"].values()) > -0.01
    assert {"forward", "balancer", "backward", "AdamW", "checkpoints", "evaluation", "all else"} < set(
        result["shares"]
    )
    assert found["checkpoint"]["parameters"] > 0
    assert found["checkpoint"]["wall_seconds"] > 0


@pytest.mark.parametrize("family", ["mlp", "study"])
def test_the_bare_loop_trains_what_the_run_trains(script: Script, tmp_path: Path, family: str) -> None:
    """From the same weights and in the same order of samples, both come to the same loss."""
    end_to_end = script("end_to_end")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "cmapss"))
    args = end_to_end.parse_arguments([*TINY_RUNS, "--hidden-size", "8"])
    setting = end_to_end.Setting(family, args)
    plain = ["backbone.dropout=0.0", "balancer.warmup_steps=0"]
    plain += ["backbone.attention_dropout=0.0"] if family == "study" else []
    config = setting.config(tmp_path, *plain, "training.warmup_epochs=0")
    batches, building, data = (
        script(f"mtlbalance.training.{name}") for name in ("batches", "building", "data")
    )
    built = data.build_data(config)
    torch.manual_seed(config.run.seed)
    state = building.build_state(config, built, torch.device("cpu"))
    run = script("mtlbalance.training.run").run_training(config, out=tmp_path / "run", quiet=True)
    assert run.status == "finished"

    bare_loop = script("bare_loop")
    scalar = {task.name: task.kind == "regression" for task in built.tasks}
    model = bare_loop.Model(state.model.trunk, state.model.heads, scalar)
    order = batches.ShuffleOrder(setting.samples, setting.batch_size, drop_last=False, seed=config.run.seed)
    drawn = [order.draw()[0] for _ in range(args.epochs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda *_, **__: drawn.pop(0))
        train, test = built.train, built.test
        loss = bare_loop.train(
            model, state.balancer, (train.inputs, train.targets), (test.inputs, test.targets),
            epochs=args.epochs, batch_size=setting.batch_size,
        )  # fmt: skip
    last = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = last[0].split(",").index("train_loss")
    assert loss == pytest.approx(float(last[-1].split(",")[column]), rel=1e-4)


def test_growth_is_measured_in_tasks_parameters_and_ranks(figures: Figures, capsys) -> None:
    sizes = [
        "--tasks",
        "2",
        "5",
        "--methods",
        "gaba",
        "pcgrad",
        "--width",
        "8",
        "--parameters",
        "1e3",
        "1e13",
    ]
    ranks = ["--ranks", "2", "--rank-tasks", "3", "--rank-rounds", "1", "--rank-batch-size", "2"]
    found = figures("scaling", *sizes, *ranks, "--rounds", "1", "1", "--batch-size", "2")
    assert [result["tasks"] for result in found["tasks"]] == [2, 5]
    assert [result["trunk_numbers"] for result in found["parameters"]] == [pytest.approx(1e3, rel=0.1)]
    assert "1e+13 parameters: left out" in capsys.readouterr().out
    (two,) = (result["ways"] for result in found["ranks"])
    assert two["plain sum"]["sent_copies"] == 0
    # Each task's gradients of the trunk are summed once a measured step, and a few numbers beside.
    for way in ("gaba", "pcgrad"):
        assert two[way]["sent_copies"] == pytest.approx(3.0, abs=0.4)
    assert two["gaba, every 10th step"]["sent_copies"] == pytest.approx(0.3, abs=0.2)
    assert two["gaba, norms"]["sent_copies"] < 0.5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_the_thresholds_of_the_allocator_are_raised_in_a_fresh_process(script: Script) -> None:
    allocator = script("allocator")
    found = allocator.in_fresh_process(allocator.BY_MALLOPT, ["mlp", "gaba", "1", "8", "4"])
    assert found["cpu_seconds"] > 0
    assert found["page_faults"] >= 0
    assert found["resident_megabytes"] > 50
