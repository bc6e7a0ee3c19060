"""``training.matmul_precision``: in force while batches are trained on, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mtlbalance.errors import NonFiniteError, TrainingError
from mtlbalance.training import run_training
from mtlbalance.training.environment import describe_environment

SHORT = ("training.epochs=2", "balancer.name=fixed", "training.gradient_stats_every=0")


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Each test finds, and leaves, the process as torch starts."""
    assert torch.get_float32_matmul_precision() == "highest"
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def seen() -> Iterator[dict[bool, set[str]]]:
    """By whether the model was training: the precisions that its linear layers met."""
    found: dict[bool, set[str]] = {True: set(), False: set()}

    def note(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Linear):
            found[module.training].add(torch.get_float32_matmul_precision())

    handle = register_module_forward_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("wanted", ["high", "medium"])
def test_it_holds_in_training_alone(configure: Any, plugin: Any, seen: Any, wanted: str) -> None:
    run_training(configure(*SHORT, f"training.matmul_precision={wanted}"), quiet=True)
    assert seen == {True: {wanted}, False: {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"


def test_unset_it_is_what_the_process_has_and_that_is_noted(configure: Any, plugin: Any, seen: Any) -> None:
    torch.set_float32_matmul_precision("high")
    outcome = run_training(configure(*SHORT), quiet=True)
    assert seen == {True: {"high"}, False: {"high"}}
    assert torch.get_float32_matmul_precision() == "high"
    environment = json.loads((outcome.run_dir / "environment.json").read_text())
    assert environment["matmul_precision"] == "high"


@pytest.mark.filterwarnings("ignore:Fixed.*NaN or infinite")
def test_a_run_that_fails_gives_it_back(configure: Any, plugin: Any, seen: Any) -> None:
    with pytest.raises(NonFiniteError):
        run_training(
            configure(*SHORT, "dataset.nan_loss_in_epoch=1", "training.matmul_precision=medium"), quiet=True
        )
    assert seen[True] == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_it_decides_the_result(configure: Any, plugin: Any) -> None:
    hashes = [
        configure(*more).result_hash()
        for more in ([], ["training.matmul_precision=high"], ["training.matmul_precision=highest"])
    ]
    assert len(set(hashes)) == 3
    assert "matmul_precision" not in configure().to_toml()  # runs made before it was there go on


def test_switches_that_could_not_be_given_back_are_not_touched(configure: Any, plugin: Any) -> None:
    switches: Any = torch.backends.cuda.matmul
    if not hasattr(switches, "fp32_precision"):
        pytest.skip("this torch has one switch alone")
    switches.fp32_precision = "tf32"
    assert describe_environment(torch.device("cpu"))["matmul_precision"] == "mixed"
    with pytest.raises(TrainingError, match=r"'high' cannot be set: .* leave one of the two out"):
        run_training(configure(*SHORT, "training.matmul_precision=high"), quiet=True)
    assert switches.fp32_precision == "tf32"
    run_training(configure(*SHORT), quiet=True)  # unset, it is left alone
