"""``plugins check`` and ``plugins describe``: what they find, show and return, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtlbalance.cli.main import main
from mtlbalance.plugins import load_plugins

ACME = """\
import torch
from mtlbalance import FixedWeightLoss
from mtlbalance.plugins import BalancerRegistration, PluginConfig, hookimpl

class Options(PluginConfig):
    share: float = 2.0
    scheme: str

class Doubled(FixedWeightLoss):
    def forward(self, *losses, **context):
        return self.share * super().forward(*losses, **context)

def build(options, tasks):
    print("from the plugin")
    balancer = Doubled([task.name for task in tasks])
    balancer.share = options.share
    return balancer

@hookimpl
def register_balancers():
    return [BalancerRegistration("acme-loss", "a balancer of a test", Options, build)]
"""

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    sys.modules.pop("acme_check", None)
    Path("acme_check.py").write_text(ACME)

    def call_command(*arguments: str) -> tuple[int, str, str]:
        code = main(["plugins", *arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call_command


def test_a_dataset_that_passes(call: Call) -> None:
    code, out, err = call("check", "toy", "samples=40")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("dataset toy (built-in ")
    assert lines[1:3] == ["  ✓ can_be_built", "  ✓ tasks_are_as_registered"]
    assert lines[-1] == f"{len(lines) - 2} of {len(lines) - 2} checks passed"


def test_a_backbone_as_json(call: Call) -> None:
    code, out, err = call("check", "mlp", "hidden_sizes=[4]", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert (document["slot"], document["name"], document["passed"]) == ("backbone", "mlp", True)
    assert document["options"] == {"hidden_sizes": [4]}
    assert document["counts"]["kept"] == len(document["checks"])
    assert set(document["checks"][0]) == {"name", "promise", "status", "finding"}


def test_a_balancer_that_breaks_a_promise(call: Call) -> None:
    plugin = ("--plugin", "./acme_check.py")
    code, out, err = call("check", "acme-loss", "scheme=x", *plugin)
    assert code == 1
    assert set(err.splitlines()) == {"from the plugin"}
    assert "  ✗ value_is_what_it_minimises\n      promised: The value is 0-d and" in out
    assert "\n      but: the value of call 1: expected " in out
    assert "  - representations_may_be_shared: it reads no task gradients\n" in out
    assert " checks passed; 6 do not apply\n" in out
    code, out, _ = call("check", "acme-loss", "scheme=x", "share=1", *plugin, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)


def test_options_are_checked_as_a_config_is(call: Call) -> None:
    code, out, err = call("check", "acme-loss", "shar=1", "share=much", "nothing", "--plugin", "acme_check")
    assert (code, out) == (2, "")
    assert "error: 'nothing' is not an override\n  --> command line: nothing\n" in err
    assert "error: unknown key 'shar' in balancer 'acme-loss'\n  --> command line: shar=1\n" in err
    assert "error: 'share' in balancer 'acme-loss' must be a number, not" in err
    assert (
        "error: missing key 'scheme' in balancer 'acme-loss'\n  --> command line\nhelp: give it as KEY=VALUE"
        in err
    )
    error = json.loads(call("check", "gaba", "bata=1", "--json")[1])["error"]
    assert error["problems"][0]["help"] == "did you mean 'beta'?"


def test_checking_what_is_not_there(call: Call) -> None:
    assert call("check", "gabba")[2].startswith("error: no plugin is called 'gabba'; did you mean 'gaba'?")
    assert "unknown slot 'balancr'" in call("check", "gaba", "--slot", "balancr")[2]


@pytest.mark.parametrize("name", load_plugins(entry_points=False).names("balancer"))
def test_every_balancer_is_described_with_its_facts(call: Call, name: str) -> None:
    facts = json.loads(call("describe", name, "--json")[1])["facts"]
    assert list(facts)[:3] == ["reads", "trunk passes", "extra memory (trunk gradients)"]
    assert facts["trunk passes"] == ("1" if facts["reads"] in ("nothing", "losses") else "K")


def test_facts_are_shown_in_a_table(call: Call) -> None:
    lines = [" ".join(line.split()) for line in call("describe", "gaba")[1].splitlines()]
    start = lines.index("reads gradient norms")
    assert lines[start + 3 : start + 6] == [
        "copied to the host nothing",
        "heads get weighted",
        "weights sum to 1",
    ]
    assert json.loads(call("describe", "toy", "--json")[1])["facts"] == {}


def test_prose_is_wrapped_to_the_terminal_and_formulas_stay(call: Call) -> None:
    out = call("describe", "gaba")[1]
    assert (
        "Use it when one task's gradient on the trunk dwarfs the others'. It bounds the imbalance and cannot\ncancel"
        in out
    )
    assert "\n    w_k = max(e_k, floor) / Σ_j max(e_j, floor)  applied\n" in out
    assert "\nState: ema_weights" in out
    assert max(map(len, out.splitlines())) <= 100
