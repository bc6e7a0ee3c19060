"""The floor of a step: what is counted is what the formulas say, and the page says which targets lie below it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Script = Callable[[str], ModuleType]
Figures = Callable[..., dict[str, Any]]
BATCH, INPUTS, WIDTH, HEAD, TASKS = 12, 32, 16, 6, 3  # of the small MLP


@pytest.fixture
def small(script: Script) -> Any:
    return script("workloads").mlp(TASKS, width=WIDTH, batch_size=BATCH, head_width=HEAD)


def test_flops_of_an_mlp_are_those_of_the_formula(script: Script, small: Any) -> None:
    counts = script("counting").count_step(small)
    layers = INPUTS * WIDTH + 2 * WIDTH * WIDTH
    trunk, heads = 2 * BATCH * layers, 2 * BATCH * TASKS * (WIDTH * HEAD + HEAD)
    backward = 2 * trunk - 2 * BATCH * INPUTS * WIDTH  # the batch itself needs no gradient
    assert script("floor").flops_of(counts) == {
        "trunk_forward": trunk,
        "heads_forward": heads,
        "heads_backward": 2 * heads,
        "trunk_backward": backward,
    }
    assert counts.passes.flops == 2 * heads + TASKS * backward
    assert counts.linear == ((BATCH, INPUTS, WIDTH), (BATCH, WIDTH, WIDTH), (BATCH, WIDTH, WIDTH))


def test_k_passes_move_the_trunk_k_times_and_spare_the_sums_at_the_features(
    script: Script, small: Any
) -> None:
    counts = script("counting").count_step(small)
    number, layer = 4, BATCH * WIDTH
    relus, biases = 3 * 3 * layer, 3 * (layer + WIDTH)  # gradient and mask read, gradient written; summed
    assert sum(counts.trunk_backward.moved.values()) == number * (relus + biases)
    extra = counts.passes.minus(counts.backward)
    assert extra.flops == (TASKS - 1) * counts.trunk_backward.flops
    spared = 3 * (TASKS - 1) * layer
    losses = number * 8 * TASKS  # the sum of the losses, a handful of numbers
    expected = number * ((TASKS - 1) * (relus + biases) - spared)
    assert sum(extra.moved.values()) == pytest.approx(expected, abs=losses)


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # torch's own, of the flags
def test_flops_of_a_fused_lstm_are_those_of_its_products_one_by_one(script: Script) -> None:
    lstm, inputs = nn.LSTM(5, 7), torch.randn(4, 3, 5, requires_grad=True)

    def step() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            outputs, _ = lstm(inputs)
            there = counter.get_total_flops()
            outputs.sum().backward()
            return there, counter.get_total_flops() - there

    with torch.backends.mkldnn.flags(enabled=False):
        one_by_one = step()
    layer = script("counting").LstmLayer
    assert tuple(layer(4, 3, 5, 7, backward).flops for backward in (False, True)) == one_by_one


def test_a_fused_lstm_is_counted_as_such(script: Script) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    counting, lstm, inputs = script("counting"), nn.LSTM(5, 7, 2), torch.randn(4, 3, 5, requires_grad=True)
    with counting.counted() as counts:
        torch.autograd.grad(lstm(inputs)[0].sum(), [inputs, *lstm.parameters()])
    layer = counting.LstmLayer
    assert counts.products == {layer(4, 3, size, 7, back): 1 for size in (5, 7) for back in (False, True)}


def test_counts_take_the_seconds_of_their_products_and_bytes(script: Script) -> None:
    """Two rounds; the second twice as slow. oneDNN is faster for one product and slower for the large one."""
    ceilings, counting = script("ceilings"), script("counting")
    product = counting.Product(10, 10, 10, "NN")
    seconds = {str(ceilings.SQUARE): 1.0, f"{ceilings.SQUARE} by oneDNN": 1.5}
    seconds |= {str(product): 1e-3, f"{product} by oneDNN": 4e-4}
    seconds |= {ceilings.copy_name(size): size / 1e9 for size in ceilings.COPIED_BYTES[:-1]}
    seconds[ceilings.copy_name(ceilings.COPIED_BYTES[-1])] = ceilings.COPIED_BYTES[-1] / 1e8
    found = ceilings.Ceilings({name: np.array([1.0, 2.0]) * value for name, value in seconds.items()})
    counts = counting.Counts(other_flops=ceilings.SQUARE.flops // 2)
    counts.products[product] = 3
    assert np.allclose(found.multiplying(counts), [0.503, 1.006])
    assert np.allclose(
        replace(found, any_kernel=True).multiplying(counts),
        [0.5012, 1.0024],
    )
    largest = ceilings.COPIED_BYTES[-1]
    assert np.allclose(found.moving({100: 5e8, largest - 1: 5e8, largest: 1e8}), [2.0, 4.0])


def test_floors_of_a_small_model_are_measured_and_shown(
    script: Script, figures: Figures, tmp_path: Path
) -> None:
    sizes = ["--models", "mlp-heads", "wide", "--tasks", "2", "--width", "8", "--batch-size", "4"]
    wide = ["--wide-width", "8", "--wide-batch-sizes", "2"]
    found = figures("floor", *sizes, *wide, "--rounds", "2", "--slice-seconds", "0.0001")
    for result in found["results"]:
        by_form = {floor["form"]: floor for floor in result["floors"]}
        assert {"", "every 10th step", "features"} <= set(by_form)
        assert by_form[""]["products"]["median"] > 1.0
        assert by_form["features"]["products"]["median"] == 1.0
        tenth = 1 + (by_form[""]["products"]["median"] - 1) / 10
        assert by_form["every 10th step"]["products"]["median"] == pytest.approx(tenth)
        assert len(result["seconds"]["plain sum"]) == 2
    text = "\n\n".join(script("page_floor").floor_section(script("figures").Figures(tmp_path)))
    assert text.startswith("## What the floor is")
    assert text.count(f"| {found['results'][0]['workload']} |") == 4, "three forms, and the parts of the step"


def test_factors_are_taken_where_they_cost_less(script: Script) -> None:
    """Seconds made up: R costs 1, R·D 2 for each of three tasks, the product that each of two others spares 5."""
    ceilings, forms = script("ceilings"), script("floor_forms")
    workload = script("workloads").wide(TASKS, width=64, batch_size=8)
    counts = script("counting").count_step(workload)
    wide = counts.linear[1]
    assert wide == (8, 64, 64)
    seconds = dict.fromkeys(ceilings.entries(counts.passes.products, counts.linear, torch.device("cpu")), 0.0)
    seconds |= {forms.PLAIN: 100.0, str(ceilings.SQUARE): 1.0}
    seconds |= {ceilings.copy_name(size): size * 1e-20 for size in ceilings.COPIED_BYTES}
    seconds |= {ceilings.triangle_name(wide): 1.0, str(ceilings.reduced_product(wide)): 2.0}
    seconds[str(ceilings.weight_product(wide))] = 5.0
    seconds = {name: value or 1e-12 for name, value in seconds.items()}
    measured = ceilings.Ceilings({name: np.full(2, value) for name, value in seconds.items()})
    factored = [layer for layer in forms.factored_layers(counts, TASKS, measured) if layer == wide]
    assert factored == [wide, wide], "two of the layers are alike"
    found = forms.forms(counts, workload, measured, factored)
    assert np.allclose(found[forms.EXACT].products, 2 * 2 * 5)
    assert np.allclose(found[forms.FACTORS].products, 2 * (1 + TASKS * 2))
    assert np.allclose(found[forms.OUTPUTS].products, 0, atol=1e-9)
    assert np.allclose(found[forms.EVERY].products, 2 * (1 + TASKS * 2) / 10)


def test_the_page_says_which_targets_lie_below_the_floor(script: Script, tmp_path: Path) -> None:
    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "low": median, "high": median}

    def result(tasks: int, **floor: float) -> dict[str, Any]:
        return {
            "workload": f"mlp {tasks}", "family": "mlp-heads", "tasks": tasks, "batch_size": 4,
            "plain_seconds": 1e-3, "plain_products": ratio(0.5), "plain_moving": ratio(0.125),
            "flops": dict.fromkeys(("trunk_forward", "heads_forward", "heads_backward", "trunk_backward"), 10**6),
            "bare_passes": ratio(1.55), "square": "square", "copies": [{"bytes": 2**20, "bytes_per_second": 1e9}],
            "products": [{"product": "square", "flops": 1, "of_a_pass": 0, "flops_per_second": 1e9,
                          "flops_per_second_any_kernel": tasks * 1e9}],
            "floors": [{"form": "", **{name: ratio(value) for name, value in floor.items()}}],
        }  # fmt: skip

    factored = result(4, any_kernel=1.6, products=1.7, products_and_bytes=1.8) | {
        "workload": "wide", "family": "wide"
    }  # fmt: skip
    factored["floors"].append(factored["floors"][0] | {"form": "factors", "any_kernel": ratio(1.5)})
    (tmp_path / "floor.json").write_text(
        json.dumps(
            {
                "machine": {},
                "results": [
                    result(2, any_kernel=1.2, products=1.3, products_and_bytes=1.4),
                    result(4, any_kernel=1.5, products=2.3, products_and_bytes=2.4),
                    result(8, any_kernel=2.8, products=2.9, products_and_bytes=3.0),
                    result(16, any_kernel=2.0, products=3.2, products_and_bytes=3.31),
                    factored,
                ],
            }
        )
    )
    text = "\n\n".join(script("page_floor").floor_section(script("figures").Figures(tmp_path)))
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if "| exact |" in line}
    assert lines["| wide"].endswith("| (see factors) |")
    (line,) = (line for line in text.splitlines() if "| factors |" in line)
    assert line.startswith("| wide | factors | 1.5 |")
    assert line.endswith("| at what the machine can |")
    assert lines["| mlp 2"].endswith("| above by 0.10, but below K bare passes |")
    assert "| exact | 1.5 | 1.30 (1.30-1.30) |" in lines["| mlp 2"]
    assert "| **2.1** |" in lines["| mlp 4"]
    assert lines["| mlp 4"].endswith("| below torch's products by 0.20 |")
    assert lines["| mlp 8"].endswith("| below what the machine can by 0.10 |")
    assert lines["| mlp 16"].endswith("| below torch's products and bytes by 0.01 |")
    assert "| mlp 2 | 1.00 | 1 | 2 | 1 | 50 % | 12 % | 38 % |" in text
    assert "| square | 1 | 2 to 16 |" in text
    assert "| 1 MiB | 1 |" in text
