"""What the commands print and return, in this process."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mtlbalance.cli.main import main

CONFIG = """\
dataset = { name = "toy", samples = 60 }
backbone = { name = "mlp", hidden_sizes = [4] }
balancer.name = "gaba"
training = { epochs = 2, warmup_epochs = 0 }
run.device = "cpu"
"""

ACME = """\
import sys
from mtlbalance.errors import TrainingError
from mtlbalance.plugins import DatasetRegistration, PluginConfig, TaskSpec, hookimpl

class Options(PluginConfig):
    fails: str = "fault"

def build(options):
    print("from the plugin")
    if options.fails == "fault":
        return {}["key"]
    if options.fails == "interrupt":
        raise KeyboardInterrupt
    if options.fails == "pre-empted":
        raise SystemExit(75)
    raise TrainingError("the loss of 'one' is NaN in step 3")

@hookimpl
def register_datasets():
    return [DatasetRegistration(
        "acme", "fails", Options, build, lambda options: [TaskSpec("one", "regression", "mse")]
    )]
"""


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a command beside ``study.toml`` and return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("study.toml").write_text(CONFIG)

    def call_command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call_command


def test_version(call: Call) -> None:
    assert call("--version") == (0, "mtlbalance 0.1.0\n", "")


def test_validate(call: Call) -> None:
    code, out, err = call("validate", "study.toml")
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert lines[:6] == [
        ["ok:", "study.toml"],
        ["run", "study"],
        ["dataset", "toy"],
        ["backbone", "mlp"],
        ["balancer", "gaba"],
        ["tasks", "large, small"],
    ]


def test_validate_as_json(call: Call) -> None:
    code, out, _ = call("validate", "study.toml", "--json")
    assert code == 0
    assert json.loads(out)["tasks"] == ["large", "small"]


def test_a_bad_config(call: Call) -> None:
    code, out, err = call("validate", "study.toml", "balancer.bata=1", "training.lr=0")
    assert (code, out) == (2, "")
    assert err == (
        "error: 'lr' in [training] must be a number above 0, not 0\n  --> command line: training.lr=0\n"
        "help: lr: learning rate after warm-up\n\n"
        "error: unknown key 'bata' in [balancer] (gaba)\n  --> command line: balancer.bata=1\n"
        "help: did you mean 'beta'?\n"
    )


@pytest.mark.parametrize("command", [["validate"], ["config", "show"], ["run"]])
def test_a_bad_config_as_json(call: Call, command: list[str]) -> None:
    code, out, err = call(*command, "study.toml", "balancer.bata=1", "--json")
    error = json.loads(out)["error"]
    assert code == error["exit_code"] == 2
    assert error["type"] == "InvalidConfigError"
    [problem] = error["problems"]
    assert problem["message"] == "unknown key 'bata' in [balancer] (gaba)"
    assert problem["place"]["source"] == "command line: balancer.bata=1"
    assert "error: unknown key 'bata'" in err


def test_config_show_is_a_config(call: Call) -> None:
    code, out, _ = call("config", "show", "study.toml", "run.seed=7")
    assert code == 0
    assert tomllib.loads(out)["run"]["seed"] == 7
    Path("shown.toml").write_text(out)
    assert call("config", "show", "shown.toml") == (0, out, "")
    assert json.loads(call("config", "show", "shown.toml", "--json")[1]) == tomllib.loads(out)


def test_a_notice_goes_to_stderr(call: Call) -> None:
    code, out, err = call("config", "show", "study.toml", "dataset.name=toy", "backbone.name=mlp2")
    assert (code, out) == (2, "")
    code, out, err = call("config", "show", "study.toml", "balancer.name=fixed", "training={}")
    assert (code, err) == (0, "")
    Path("study.toml").write_text(CONFIG.replace('.name = "gaba"', ' = { name = "gaba", beta = 0.5 }'))
    code, out, err = call("config", "show", "study.toml", "balancer.name=fixed")
    assert err == (
        "notice: balancer.name=fixed replaces 'gaba': its options in study.toml are left out (beta)\n"
    )
    assert tomllib.loads(out)["balancer"]["name"] == "fixed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate"], "error: Missing argument 'CONFIG'.\nhelp: see 'mtlbalance validate --help'\n"),
        (["validte", "x"], "error: No such command 'validte'."),
        (["run", "study.toml", "--fast"], "error: No such option: --fast"),
        (["plugins", "list", "--slot", "balancr"], "unknown slot 'balancr'; did you mean 'balancer'?"),
    ],
)
def test_usage_errors(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    code, out, _ = call(*arguments, "--json")
    assert code == json.loads(out)["error"]["exit_code"] == 2


@pytest.mark.parametrize("arguments", [[], ["plugins"], ["config"]])
def test_a_group_alone_shows_its_help(call: Call, arguments: list[str]) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert "Usage: mtlbalance" in out + err


def test_plugins_list(call: Call) -> None:
    code, out, err = call("plugins", "list")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["slot", "name", "summary", "plugin", "status"]
    assert {(line[0], line[1]) for line in lines} >= {
        ("dataset", "toy"),
        ("backbone", "mlp"),
        ("balancer", "gaba"),
    }
    rows = json.loads(call("plugins", "list", "--slot", "balancer", "--json")[1])
    assert {row["name"] for row in rows} >= {"fixed", "amnl", "gaba", "grace"}
    assert {row["slot"] for row in rows} == {"balancer"}


def test_plugins_describe(call: Call) -> None:
    code, out, err = call("plugins", "describe", "gaba")
    assert (code, err) == (0, "")
    assert "Weigh each task by the others' share of the gradient norm" in out  # the class's own docstring
    lines = [" ".join(line.split()) for line in out.splitlines()]
    at = lines.index("beta number at least 0 and below 1; default 0.99")
    assert lines[at + 1] == "smoothing of the weights: the share kept at each step"
    assert "biased_task text; required" in [
        " ".join(line.split()) for line in call("plugins", "describe", "amnl")[1].splitlines()
    ]


@pytest.mark.parametrize(
    ("name", "option", "kind", "default"),
    [
        ("mlp", "hidden_sizes", "list of whole numbers", "[64, 64]"),
        ("mlp", "activation", "relu | gelu | silu | tanh", "relu"),
        ("fixed", "weights", "table of numbers or list of numbers", "none"),
        ("amnl", "normalise", "true or false", "false"),
        ("toy", "samples", "whole number", "2000"),
    ],
)
def test_described_options(call: Call, name: str, option: str, kind: str, default: str) -> None:
    document = json.loads(call("plugins", "describe", name, "--json")[1])
    [described] = [item for item in document["options"] if item["name"] == option]
    assert (described["type"], described["default_text"]) == (kind, default)


def test_a_plugin_that_is_not_installed(call: Call) -> None:
    sys.modules.pop("acme_cli", None)
    Path("acme_cli.py").write_text("print('hello')\n" + ACME)
    code, out, err = call("plugins", "list", "--plugin", "./acme_cli.py", "--slot", "dataset", "--json")
    assert (code, err) == (0, "hello\n")
    assert "acme" in [row["name"] for row in json.loads(out)]
    assert "fails  text; default fault" in call("plugins", "describe", "acme", "--plugin", "acme_cli")[1]
    code, _, err = call("plugins", "describe", "acme", "--plugin", "acme_gone")
    assert code == 2
    assert err.startswith("error: plugin 'acme_gone' cannot be used: no module 'acme_gone' is installed")


def test_describing_what_is_not_there(call: Call) -> None:
    code, out, err = call("plugins", "describe", "gabba")
    assert (code, out) == (2, "")
    assert err.startswith("error: no plugin is called 'gabba'; did you mean 'gaba'?\navailable: ")
    assert call("plugins", "describe", "gaba", "--slot", "dataset")[2].startswith(
        "error: unknown dataset 'gaba'"
    )


def test_run_and_run_again(call: Call) -> None:
    code, out, _ = call("run", "study.toml", "--out", "here", "--quiet")
    assert code == 0
    assert "study: toy, mlp, gaba, seed 42" in out
    assert "nrmse (key)" in out
    assert "written to   here" in out
    code, out, _ = call("run", "study.toml", "--out", "here", "--quiet", "--json")
    document = json.loads(out)
    assert (code, document["status"], document["run_dir"]) == (0, "already-finished", "here")
    written = json.loads(Path("here/results.json").read_text())
    assert {key: document[key] for key in written} == written
    assert "study is finished already" in call("run", "study.toml", "--out", "here")[1]
    code, out, err = call("run", "study.toml", "training.epochs=3", "--out", "here")
    assert (code, out) == (2, "")
    assert "training.epochs: 2 -> 3" in err


@pytest.mark.parametrize(
    ("fails", "code", "message", "kind"),
    [
        ("fault", 2, "error: dataset 'acme' cannot be built: KeyError: 'key' (at ", "PluginError"),
        ("interrupt", 130, "interrupted; the run goes on when it is started again", "Stopped"),
        ("pre-empted", 75, "pre-empted; the run goes on", "Stopped"),
        ("nan", 1, "error: the loss of 'one' is NaN in step 3", "TrainingError"),
    ],
)
def test_how_a_run_ends(call: Call, fails: str, code: int, message: str, kind: str) -> None:
    Path("acme_cli.py").write_text(ACME)
    text = CONFIG.replace('dataset = { name = "toy", samples = 60 }', 'plugins = ["./acme_cli.py"]')
    Path("acme.toml").write_text(text + f'[dataset]\nname = "acme"\nfails = "{fails}"\n')
    sys.modules.pop("acme_cli", None)
    found, out, err = call("run", "acme.toml", "--out", "there", "--json")
    assert found == code
    assert message in err
    assert "from the plugin" in err
    assert "Traceback" not in err
    error = json.loads(out)["error"]
    assert (error["type"], error["exit_code"]) == (kind, code)


def test_the_result_fits_a_narrow_terminal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = call("run", "study.toml", "--quiet", "run.seed=1234567890")
    assert code == 0
    assert "study: toy, mlp, gaba, seed 1234567890" in out.splitlines()
