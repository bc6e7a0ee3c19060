"""What a person sees of a run."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mtlbalance.training import run_training
from mtlbalance.training.progress import Bar, PlainLines, ProgressReport, RunShape, UntilItFails


def test_a_line_an_epoch_where_there_is_no_terminal(
    configure: Any, plugin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(configure("training.epochs=3"))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "these data are made up"
    assert len(lines) == 4
    assert lines[1].startswith("epoch 0 (1 of 3)  loss level ")
    for part in ("kind", "weight level 0.", "level_rmse", "best", "at epoch", "left at most 0:0"):
        assert part in lines[2]
    assert "\x1b" not in captured.err


def test_nothing_when_quiet(configure: Any, plugin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(configure("training.epochs=1"), quiet=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_bar_shows_epoch_losses_weights_and_key_metric() -> None:
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=100))
    bar.start(RunShape("trial", ("rul", "health"), "rmse", epochs=4, steps=10, first_epoch=1))
    bar.step(1, 3, lambda: pytest.fail("the losses were read from the device although it is not yet time"))
    row = {"epoch": 1, "train_loss_rul": 412.3, "train_loss_health": 0.51, "rmse": 18.25}
    bar.epoch(row, {"rul": 0.0477, "health": 0.9523}, "best 18.25 at epoch 1")
    bar.notice("something to know")
    bar.stop()
    shown = screen.getvalue()
    for part in (
        "epoch 1 (2 of 4)", "loss rul 412.3  health 0.51", "weight rul 0.0477  health 0.9523", "rmse 18.25",
        "best 18.25 at epoch 1", "something to know", "left",
    ):  # fmt: skip
        assert part in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("form", ["lines", "bar"])
def test_what_cannot_be_shown_does_not_end_a_run(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as raw:
        full = io.TextIOWrapper(raw, write_through=True)
        monkeypatch.setattr(sys, "stderr", full)
        bar = Bar(Console(file=full, force_terminal=True, width=100))
        inner: ProgressReport = bar if form == "bar" else PlainLines()
        with pytest.raises(OSError, match="No space left"):
            inner.notice("lost")
        report = UntilItFails(inner)
        report.notice("lost")
        report.start(RunShape("trial", ("rul",), "rmse", epochs=4, steps=10, first_epoch=0))
        report.step(0, 3, dict)
        report.epoch({"epoch": 0, "rmse": 1.0}, {"rul": 1.0}, "best")
        report.stop()
        full.detach()
