"""The step and memory benchmarks run on every model and method; none of our figures is judged here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

Script = Callable[[str], ModuleType]
Figures = Callable[..., dict[str, Any]]
TINY = ["--rounds", "2", "2", "--slice-seconds", "0.0001", "--batch-size", "4"]


def test_every_method_takes_steps(script: Script, figures: Figures) -> None:
    result = figures("balancer_step", "--models", "mlp", "--tasks", "3", "--width", "8", *TINY)["results"][0]
    variants = {row["name"]: row for row in result["variants"]}
    every = {f"mtlbalance {method}" for method in script("methods").METHODS}
    assert len(every) >= 36
    assert every < set(variants)
    assert {"plain sum", "plain sum (fused AdamW)", "K backward passes", "mtlbalance gaba (features)"} < set(
        variants
    )
    assert variants["plain sum"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for row in variants.values():
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        (seconds,) = row["seconds_per_step"]  # of the one process
        assert len(seconds) == 2
        assert min(seconds) > 0


def test_every_model_is_measured_with_torchjd_beside(figures: Figures) -> None:
    pytest.importorskip("torchjd")
    sizes = ["--wide-width", "16", "--wide-batch-sizes", "2", "4", "--channels", "2", "--hidden-size", "8"]
    chosen = ["--models", "wide", "resnet", "study", "--methods", "gaba", "pcgrad", "--peers", "torchjd"]
    results = figures("balancer_step", *chosen, *sizes, *TINY)["results"]
    assert [(result["family"], result["tasks"], result["batch_size"]) for result in results] == [
        ("wide", 4, 2), ("wide", 4, 4), ("resnet", 3, 4), ("study", 2, 4),
    ]  # fmt: skip
    for result in results:
        forms = {row["form"]: row for row in result["variants"] if row["source"] == "torchjd"}
        assert set(forms) == {"", "sequential", "autogram"}
        assert not any("failure" in row for row in forms.values())


def test_a_checkout_of_libmtl_must_be_one(script: Script, tmp_path, capsys) -> None:
    for extra, expected in (
        ([], "--libmtl PATH"),
        (["--libmtl", str(tmp_path)], "abstract_weighting.py is missing"),
    ):
        with pytest.raises(SystemExit):
            script("balancer_step").parse_arguments(["--peers", "libmtl", *extra])
        assert expected in capsys.readouterr().err


def test_memory_is_counted_in_copies_of_the_trunks_gradients(script: Script) -> None:
    """A step written here that holds each task's gradients until the end has K - 1 copies more than the plain sum's."""
    variants, memory = script("variants"), script("balancer_memory")
    workload = script("workloads").wide(4, width=64, batch_size=1)

    def holds_all(workload: Any, optimizer: Any) -> Iterator[None]:
        training = variants.Training(workload, optimizer)
        while True:
            training.optimizer.zero_grad()
            rows: list[Any] = []
            _, losses = training.forward()
            rows += [
                torch.autograd.grad(loss, training.shared, retain_graph=True) for loss in losses.values()
            ]
            for parameter, gradient in zip(training.shared, rows[0], strict=True):
                parameter.grad = gradient
            del gradient, losses
            training.optimizer.step()
            yield

    def keeps_two(workload: Any, optimizer: Any) -> Iterator[None]:
        kept = [torch.zeros(2 * workload.trunk_numbers)]
        yield from variants.plain_steps(workload, optimizer)
        kept.clear()

    chosen = [
        *variants.FLOORS,
        variants.Variant("floor", "holds all", "", holds_all),
        variants.Variant("floor", "keeps two", "", keeps_two),
    ]
    rows = {row["name"]: row for row in memory.measure_workload(workload, chosen)["variants"]}
    assert rows["plain sum"]["peak_copies"] == 0.0
    assert rows["holds all"]["peak_copies"] == pytest.approx(3.0, abs=0.1)
    assert rows["holds all"]["kept_copies"] == pytest.approx(3.0, abs=0.1)
    assert rows["keeps two"]["kept_copies"] == pytest.approx(2.0, abs=1e-3)
    assert rows["keeps two"]["peak_copies"] == pytest.approx(2.0, abs=1e-3)


def test_the_memory_of_every_method_is_measured(script: Script, figures: Figures) -> None:
    result = figures("balancer_memory", "--tasks", "3", "--width", "16")["results"][0]
    names = {row["name"] for row in result["variants"]}
    assert {f"mtlbalance {method}" for method in script("methods").METHODS} < names
    assert result["copy_bytes"] == 4 * result["trunk_numbers"]
