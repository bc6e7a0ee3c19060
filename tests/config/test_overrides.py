"""Overrides on the command line: how they are read, what they replace, and where their faults are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtlbalance.config import load_config
from mtlbalance.config.document import parse_value

Problems = Callable[..., str]
Write = Callable[[str], Path]

CONFIG = """\
dataset.name = "toy"
backbone = { name = "mlp", hidden_sizes = [8] }
[balancer]
name = "gaba"
beta = 0.5
[training]
epochs = 3
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.9", 0.9),
        ("3", 3),
        ("true", True),
        ("True", "True"),
        ("FD001", "FD001"),
        ('"FD001"', "FD001"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("", ""),
        ("a=b", "a=b"),
        ("1\nother = 2", "1\nother = 2"),
        ("/data/x y", "/data/x y"),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_overrides_reach_every_section(write: Write) -> None:
    config = load_config(
        write(CONFIG),
        [
            "run.device=cpu",
            "balancer.beta=0",
            "backbone.hidden_sizes=[4, 4]",
            "training.lr=1",
            "run.name=x-1",
        ],
    )
    found = config.to_dict()
    assert (found["run"]["device"], found["run"]["name"], found["training"]["lr"]) == ("cpu", "x-1", 1.0)
    assert (found["balancer"]["beta"], found["backbone"]["hidden_sizes"]) == (0.0, [4, 4])
    assert found["training"]["epochs"] == 3


def test_the_last_of_two_overrides_holds(write: Write) -> None:
    assert load_config(write(CONFIG), ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_an_override_that_names_nothing(problems: Problems) -> None:
    assert problems(CONFIG, "balancer.bata=0.9", "trainig.epochs=1", "training.lr.x=1", "epochs=1") == (
        "error: unknown section [trainig]\n  --> command line: trainig.epochs=1\nhelp: did you mean 'training'?\n\n"
        "error: unknown key 'epochs'\n  --> command line: epochs=1\nhelp: it belongs in [training]\n\n"
        "error: 'lr' in [training] must be a number above 0, not the table {\"x\": 1}\n"
        "  --> command line: training.lr.x=1\nhelp: lr: learning rate after warm-up\n\n"
        "error: unknown key 'bata' in [balancer] (gaba)\n  --> command line: balancer.bata=0.9\n"
        "help: did you mean 'beta'?"
    )


def test_an_override_below_a_value(problems: Problems) -> None:
    assert problems(CONFIG, "training.epochs.x=1") == (
        "error: 'training.epochs' is not a table, so it has no 'x'\n  --> command line: training.epochs.x=1"
    )


@pytest.mark.parametrize("text", ["epochs", "=3", "a b=3", "training.=3", "[x]=3", "a=1\nb=2 = 3"])
def test_what_is_no_override(problems: Problems, text: str) -> None:
    found = problems(CONFIG, text)
    assert f"--> command line: {text}" in found


def test_a_bad_value_is_told_where_it_was_given(problems: Problems) -> None:
    assert problems(CONFIG, "balancer.beta=high") == (
        "error: 'beta' in [balancer] (gaba) must be a number at least 0 and below 1, not the text 'high'\n"
        "  --> command line: balancer.beta=high\nhelp: beta: smoothing of the weights: the share kept at each step"
    )
    assert problems(CONFIG, "balancer.beta=.9").endswith("help: write it without quotes: 0.9")


def test_text_that_looks_like_a_number(problems: Problems, write: Write) -> None:
    assert problems(CONFIG, "run.name=2024") == (
        "error: 'name' in [run] must be text, not 2024\n  --> command line: run.name=2024\n"
        """help: quote it to give text: 'run.name="2024"'"""
    )
    assert load_config(write(CONFIG), ['run.name="2024"']).run.name == "2024"


def test_another_plugin_leaves_out_the_options_of_the_old_one(write: Write) -> None:
    overrides = ["balancer.max_weight=3", "balancer.name=grace", "balancer.biased_task=large"]
    config = load_config(write(CONFIG), [*overrides, "balancer.target_cap=60"])
    assert config.notices == (
        "balancer.name=grace replaces 'gaba': its options in study.toml are left out (beta)",
    )
    options = config.balancer.to_dict()
    assert (options["name"], options["beta"], options["max_weight"]) == ("grace", 0.99, 3.0)


def test_naming_the_same_plugin_keeps_its_options(write: Write) -> None:
    config = load_config(write(CONFIG), ["balancer.name=gaba"])
    assert config.notices == ()
    assert config.balancer.to_dict()["beta"] == 0.5


def test_a_missing_option_of_the_new_plugin_is_told_at_the_override(problems: Problems) -> None:
    found = problems(CONFIG, "balancer.name=amnl", "balancer.biased_task=large")
    assert found.startswith(
        "error: missing key 'target_cap' in [balancer] (amnl)\n  --> command line: balancer.name=amnl\n"
    )


def test_a_whole_section_can_be_given(write: Write) -> None:
    config = load_config(write(CONFIG), ['balancer={name="fixed", weights=[1, 3]}'])
    assert config.balancer.to_dict() == {"name": "fixed", "weights": [1.0, 3.0], "sync": "gradients"}
