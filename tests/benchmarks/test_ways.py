"""Steps in other ways: what is measured is what the name says, and what a machine lacks is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own

Script = Callable[[str], ModuleType]
Figures = Callable[..., dict[str, Any]]
TINY = ["--rounds", "2", "2", "--slice-seconds", "0.0001", "--batch-size", "4", "--methods", "gaba"]


def test_every_variant_is_measured_in_every_way_beside_the_plain_sum_made_so(
    script: Script, tmp_path: Path
) -> None:
    sizes = ["--models", "mlp-heads", "--tasks", "2", "--width", "8"]
    out = tmp_path / "steps_bf16.json"
    with torch.compiler.set_stance("force_eager"):  # the same modules, but no C++ compiler is asked
        script("balancer_step").main(
            [*TINY, *sizes, "--ways", "fused", "compiled+fused", "math", "--out", str(out)]
        )
    page = script("page")
    figures = script("figures").Figures(tmp_path)
    (result,) = figures.workloads("steps_bf16")
    rows = {row["name"]: row for row in result["variants"]}
    assert len(rows) == len(result["variants"])
    missing = script("ways").parse_way("compiled").missing(torch.device("cpu"))
    for way in ("fused AdamW", *([] if missing else ["compiled, fused AdamW"]), "MATH attention"):
        assert rows[f"plain sum ({way})"]["to_plain_alike"]["median"] == 1.0
        for form in ("", "every 10th step, ", "features, "):
            row = rows[f"mtlbalance gaba ({form}{way})"]
            assert row["to_plain_alike"]["low"] <= row["to_plain_alike"]["median"]
        assert f"mtlbalance gaba (low memory, {way})" not in rows
    page.main([str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "## Fused AdamW, compiled modules, bfloat16" in text
    assert "| fused AdamW | " in text


def test_a_way_changes_what_is_trained_as_its_name_says(script: Script) -> None:
    variants, ways = script("variants"), script("ways")
    plain = script("workloads").mlp(2, width=8, batch_size=4)
    half = ways.WORDS["bf16"].change(plain)
    assert variants.Training(half, "adamw").forward()[0].dtype == torch.bfloat16
    assert variants.Training(plain, "adamw").forward()[0].dtype == torch.float32
    compiled = ways.WORDS["compiled"].change(plain)
    trunk, heads, model = compiled.fresh_model()
    kinds = (torch._dynamo.OptimizedModule,) * 3
    assert all(isinstance(module, kinds) for module in (trunk, *heads.values()))
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for module in (trunk, heads) for p in module.parameters()} == own
    trunk, heads, _ = ways.WORDS["compiled-trunk"].change(plain).fresh_model()
    assert isinstance(trunk, kinds)
    assert all(type(head) is nn.Linear for head in heads.values())


def test_a_way_that_this_machine_lacks_is_left_out_and_said(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where no compiler lies
    out = tmp_path / "steps_compiled.json"
    script("balancer_step").main([*TINY, "--models", "mlp", "--ways", "compiled", "--out", str(out)])
    said = capsys.readouterr().out
    assert "left out: compiled: no C++ compiler is installed" in said
    assert "nothing is left to measure" in said
    assert not out.exists()


def test_an_unknown_way_names_those_that_there_are(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("balancer_step").parse_arguments(["--ways", "fused+quick"])
    assert "'quick' is none of fused, compiled, compiled-trunk, bf16, math" in capsys.readouterr().err


def test_the_ways_to_compute_attention_are_compared(figures: Figures) -> None:
    sizes = ["--widths", "8", "--lengths", "2", "4", "--positions", "8"]
    results = figures("attention_path", *sizes, "--rounds", "2", "2")["results"]
    assert [(r["length"], r["samples"]) for r in results] == [(2, 4), (4, 2)]
    for result in results:
        assert len(result["ratios"]) == 4
        assert result["ratios"]["fp32, PyTorch's choice"]["median"] == 1.0


def test_bfloat16_is_compared_in_pairs_of_runs_and_on_the_same_weights(
    script: Script, figures: Figures, tmp_path: Path
) -> None:
    """Tiny runs on the simulated fleet: gradients in bfloat16 are off by its rounding, those in float32 by far less."""
    small = ["dataset.source=simulated", "dataset.simulated_engines=4", "backbone.cnn_channels=[4]"]
    lengths = ["--seeds", "1", "--epochs", "1", "--hidden-size", "8", "--runs", str(tmp_path)]
    found = figures("bf16_effect", *small, *lengths)
    assert [len(runs) for runs in found["runs"].values()] == [1, 1, 1]
    for row in found["gradients"]:
        low, high = (0.0, 1e-4) if row["precision"] == "fp32" else (1e-5, 0.2)
        for task in ("rul", "health"):
            assert low <= row[task]["norm_error_most"] <= high
    effect = script("bf16_effect")
    exact = effect.difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    half = 4.302652729911275 * math.sqrt(1 / 3)  # Student's t for 2 degrees of freedom
    assert exact == pytest.approx({"mean": 2.0, "low": 2.0 - half, "high": 2.0 + half})
