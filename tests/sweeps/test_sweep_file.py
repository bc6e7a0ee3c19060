"""A sweep file becomes a plan, or a list of everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from mtlbalance.cli.main import main
from mtlbalance.config import InvalidConfigError
from mtlbalance.errors import RunFolderError
from mtlbalance.sweeps import make_plan, read_plan
from mtlbalance.sweeps.supervisor import prepare

Write = Callable[[str], Path]

SWEEP = """
    base = "study.toml"
    name = "table"
    exclude = [{ method = ["fixed", "slow"], seed = 2 }]
    overrides = { training.patience = 7 }
    [axes]
    size = [{ training.batch_size = 16 }, { training.batch_size = 32, label = "large" }]
    seed = [{ run.seed = 1 }, { run.seed = 2 }]
    [[axes.method]]
    balancer.name = "fixed"
    [[axes.method]]
    balancer = { name = "gaba", beta = 0.9 }
    [[axes.method]]
    label = "slow"
    balancer = { name = "gaba", beta = 0.999 }
    training.lr = 1e-4
    """


def text(block: str) -> str:
    return dedent(block).strip("\n")


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(InvalidConfigError) as caught:
        make_plan(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_product_without_what_is_excluded(write: Write) -> None:
    plan = make_plan(write(SWEEP), ["training.epochs=3"])
    assert plan.folder == Path("runs/table")
    # In the order of the file, the last axis moving fastest; a label that is a number says of what.
    assert [run.id for run in plan.runs] == [
        f"{size}/seed_{seed}/{method}"
        for size in ("size_16", "large")
        for seed in (1, 2)
        for method in (["fixed", "gaba", "slow"] if seed == 1 else ["gaba"])
    ]
    assert plan.runs[-1].coordinates == {"size": "large", "seed": "2", "method": "gaba"}
    assert [axis.keys for axis in plan.axes] == [
        ("training.batch_size",),
        ("run.seed",),
        ("balancer.name", "balancer.beta", "training.lr"),
    ]
    assert [axis.is_replication for axis in plan.axes] == [False, True, False]


def test_every_run_has_its_config(write: Write) -> None:
    plan = make_plan(write(SWEEP), ["training.epochs=3"])
    configs = {run.id: run.config.to_dict() for run in plan.runs if run.config is not None}
    slow = configs["large/seed_1/slow"]
    assert (slow["balancer"]["name"], slow["balancer"]["beta"]) == ("gaba", 0.999)
    assert (slow["training"]["lr"], slow["training"]["batch_size"]) == (1e-4, 32)
    assert (slow["run"]["seed"], slow["run"]["name"]) == (1, "table-large-seed_1-slow")
    assert "beta" not in configs["large/seed_1/fixed"]["balancer"]
    assert {config["training"]["epochs"] for config in configs.values()} == {3}
    assert {config["training"]["patience"] for config in configs.values()} == {7}


def test_a_plan_is_written_and_read_back(write: Write, tmp_path: Path) -> None:
    plan = make_plan(write(SWEEP), out=tmp_path / "here")
    prepare(plan)
    assert read_plan(tmp_path / "here") == plan
    with pytest.raises(RunFolderError, match=r"is not the folder of a sweep: it has no plan\.json"):
        read_plan(tmp_path)
    other = make_plan(write(SWEEP.replace("table", "other")), out=tmp_path / "here")
    with pytest.raises(RunFolderError, match="is the folder of the sweep 'table', not of 'other'"):
        prepare(other)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "axes": [{}]}'])
def test_a_plan_that_cannot_be_read_is_written_again(write: Write, tmp_path: Path, content: str) -> None:
    plan = make_plan(write(SWEEP), out=tmp_path / "here")
    prepare(plan)
    (tmp_path / "here" / "plan.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"plan\.json: .*; 'mtlbalance sweep run' writes it again"):
        read_plan(tmp_path / "here")
    prepare(plan)
    assert read_plan(tmp_path / "here") == plan


def test_paths_are_relative_to_the_file_they_are_written_in(write: Write, tmp_path: Path) -> None:
    write("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "sweep.toml").write_text(
        'base = "../study.toml"\naxes.place = [{ dataset.traces = "here" }]\n'
    )
    [run] = make_plan(tmp_path / "sub" / "sweep.toml").runs
    assert run.config is not None
    assert run.config.to_dict()["dataset"]["traces"] == str(tmp_path / "sub" / "here")


def test_a_wrong_value_is_shown_where_it_stands(write: Write) -> None:
    sweep = write("""
        base = "study.toml"
        [axes]
        seed = [{ run.seed = 1 }, { run.seed = -2 }]
        method = [
          { balancer = { name = "gaba", bata = 0.9 } },
          { balancer.name = "gabba" },
        ]
        """)
    found = problems(sweep)
    assert found.startswith(
        text("""
        error: unknown key 'bata' in [balancer] (gaba)
          --> sweep.toml:6:33
          |
        6 |   { balancer = { name = "gaba", bata = 0.9 } },
          |                                 ^^^^
        help: did you mean 'beta'?

        error: unknown balancer 'gabba'
          --> sweep.toml:7:21
          |
        7 |   { balancer.name = "gabba" },
          |                     ^^^^^^^
        help: did you mean 'gaba'?
        """)
    )
    assert found.endswith(
        text("""
        error: 'seed' in [run] must be a whole number from 0 to 4294967295, not -2
          --> sweep.toml:4:40
          |
        4 | seed = [{ run.seed = 1 }, { run.seed = -2 }]
          |                                        ^^
        help: seed: seeds every random generator
        """)
    )
    assert found.count("error: ") == 3  # each once, however many runs have it


def test_a_wrong_override_of_some_runs_names_them(write: Write) -> None:
    found = problems(write(SWEEP), "balancer.beta=0.5")
    assert "error: axis 'method' varies 'balancer.beta'\n  --> command line: balancer.beta=0.5" in found
    assert "error: unknown key 'beta' in [balancer] (fixed) (in size_16/seed_1/fixed and 1 more)" in found


@pytest.mark.parametrize(
    ("sweep", "messages"),
    [
        (
            'axes.a = [{ run.seed = 1 }]\nbas = "x"',
            ["missing key 'base'", "unknown key 'bas' in a sweep file"],
        ),
        ('base = "gone.toml"\naxes.a = [{ run.seed = 1 }]', ["there is no config gone.toml"]),
        ('base = "study.toml"', ["a sweep needs a section [axes] with at least one axis"]),
        ('base = "study.toml"\naxes.a = [1, 2]', ["axis 'a' must be a list of override tables"]),
        ('base = "study.toml"\naxes.a = []', ["axis 'a' must be a list of override tables"]),
        (
            'base = "study.toml"\naxes.a = [{ run.seed = 1 }, { label = "1" }]',
            ["two points of axis 'a' are labelled '1'"],
        ),
        (
            'base = "study.toml"\naxes.a = [{ run.seed = 1, label = "x/y" }]',
            ["a label cannot be the text 'x/y'"],
        ),
        (
            'base = "study.toml"\naxes.a = [{ run.seed = 1, label = "logs" }]',
            ["'logs' is the name of a folder that every sweep has"],
        ),
        (
            'base = "study.toml"\naxes.a = [{ run.name = "x" }]\naxes.b = [{ plugins = [] }]',
            ["'run.name' cannot be varied", "'plugins' cannot be varied"],
        ),
        (
            'base = "study.toml"\naxes.a = [{ run.seed = 1 }]\naxes.b = [{ run.seed = 2 }]',
            ["'a' and axis 'b' both set 'run.seed'"],
        ),
        (
            'base = "study.toml"\noverrides.run.seed = 3\naxes.a = [{ run.seed = 1 }]',
            ["'overrides' and axis 'a' both set 'run.seed'"],
        ),
        (
            'base = "study.toml"\noverrides = 3\naxes.a = [{ run.seed = 1 }]',
            ["'overrides' must be a table, not 3"],
        ),
        (
            'base = "study.toml"\nexclude = [{ b = 1 }, { a = 3 }]\naxes.a = [{ run.seed = 1 }]',
            ["there is no axis 'b'", "axis 'a' has no point '3'"],
        ),
        (
            'base = "study.toml"\nexclude = [{ a = 1 }]\naxes.a = [{ run.seed = 1 }]',
            ["every run is excluded"],
        ),
        ('base = "study.toml"\nexclude = 1\naxes.a = [{ run.seed = 1 }]', ["'exclude' must be a list"]),
        ('base = "study.toml"\naxes.a = [{ trainig.lr = 1.0 }]', ["unknown section [trainig]"]),
        (  # a number's folder is named after the axis
            'base = "study.toml"\naxes.a = [{ run.seed = 1 }, { run.seed = 2, label = "a_1" }]',
            ["the points '1' and 'a_1' of axis 'a' would share the folder 'a_1'"],
        ),
        (
            'base = "study.toml"\naxes.a = [{ run.seed = 1, label = "x" }, { run.seed = 2, label = "X" }]',
            ["the points 'x' and 'X' of axis 'a' would share the folder 'X'"],
        ),
        (
            f'base = "study.toml"\naxes.a = [{{ run.seed = 1, label = "{101 * "x"}" }}]',
            ["a label cannot be the text 'xxx"],
        ),
        (
            'base = "study.toml"\naxes.a = [{ run.seed = 1, label = "plan.json" }]',
            ["'plan.json' is the name of a file that every sweep has"],
        ),
        (
            'base = "study.toml"\nexclude = [{ a = [] }]\naxes.a = [{ run.seed = 1 }]',
            ["this list is empty, so it matches no run"],
        ),
    ],
)
def test_what_a_sweep_file_cannot_say(write: Write, sweep: str, messages: list[str]) -> None:
    found = problems(write(sweep))
    for message in messages:
        assert f"error: {message}" in found
    assert "--> sweep.toml" in found


def test_labels_are_what_a_value_looks_like_in_the_file(write: Write) -> None:
    plan = make_plan(
        write("""
        base = "study.toml"
        exclude = [{ shift = -0.5, deterministic = true }]
        [axes]
        deterministic = [{ run.deterministic = true }, { run.deterministic = false }]
        shift = [{ dataset.shift = 1e20 }, { dataset.shift = -0.5 }]
        """)
    )
    assert [run.id for run in plan.runs] == ["true/shift_1e20", "false/shift_1e20", "false/shift_-0.5"]


CASES = """
    base = "study.toml"
    [axes]
    size = [{ training.batch_size = 16 }, { training.batch_size = 32 }]
    method = [{ balancer.name = "fixed" }, { balancer.name = "gaba" }]
    """


def test_special_cases_are_for_some_runs_alone(write: Write) -> None:
    plan = make_plan(
        write(
            'special_cases = [{ where = { method = "gaba", size = [32] }, training.lr = 0.5 }]\n'
            "overrides = { training.lr = 0.25 }\n" + text(CASES)
        )
    )
    rates = {run.id: run.config.training.lr for run in plan.runs if run.config is not None}
    assert rates == {"size_16/fixed": 0.25, "size_16/gaba": 0.25, "size_32/fixed": 0.25, "size_32/gaba": 0.5}


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ("[{ training.lr = 0.5 }]", "a special case needs 'where', a table of labels"),
        ('[{ where = { method = "gaba" } }]', "this special case changes nothing"),
        ('[{ where = { method = "gabba" }, training.lr = 0.5 }]', "axis 'method' has no point 'gabba'"),
        ('[{ where = { methud = "gaba" }, training.lr = 0.5 }]', "there is no axis 'methud'"),
        ("[{ where = { size = [] }, training.lr = 0.5 }]", "this list is empty, so it matches no run"),
        (
            "[{ where = { size = 16 }, training.batch_size = 8 }]",
            "a special case cannot set 'training.batch_size': axis 'size' does",
        ),
        (
            '[{ where = { size = 16 }, training.lr = 1 }, { where = { method = "gaba" }, training.lr = 2 }]',
            "another special case sets 'training.lr' for some of the same runs",
        ),
        (
            "[{ where = { size = 16 }, training.lr = 1 }]\nexclude = [{ size = 16 }]",
            "no run of the sweep is here: every one of them is excluded",
        ),
        ("[{ where = { size = 16 }, training.lr = -1 }]", "'lr' in [training] must be a number above 0"),
        ("[{ where = { size = 16 }, plugins = [] }]", "'plugins' cannot be varied"),
    ],
)
def test_what_a_special_case_cannot_say(write: Write, cases: str, message: str) -> None:
    found = problems(write(f"special_cases = {cases}\n{text(CASES)}"))
    assert f"error: {message}" in found
    assert "--> sweep.toml:1:" in found


def test_the_command_line_does_not_undo_a_special_case(write: Write) -> None:
    path = write(f"special_cases = [{{ where = {{ size = 16 }}, training.lr = 1 }}]\n{text(CASES)}")
    assert (
        "error: special_cases set 'training.lr' for some runs\n  --> command line: training.lr=3"
        in problems(path, "training.lr=3")
    )


def test_runs_that_must_be_alike_are_noted(write: Write) -> None:
    plan = make_plan(
        write('base = "study.toml"\naxes.device = [{ run.device = "cpu" }, { run.device = "auto" }]')
    )
    assert plan.notices == ("auto has the same config as cpu: it must give the same result",)


def test_the_plan_is_printed_and_nothing_is_started(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    write(SWEEP)
    assert main(["sweep", "run", "sweep.toml", "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[0] == "table: 2 size x 2 seed x 3 method = 8 runs, 4 excluded"
    assert out.splitlines()[2].split() == ["16", "1", "fixed", "new", "size_16/seed_1/fixed"]
    assert out.splitlines()[-1] == "8 runs: 8 new; in runs/table"
    assert not Path("runs").exists()
    assert main(["sweep", "run", "sweep.toml", "--dry-run", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["counts"] == {"new": 8}
    assert document["runs"][0]["coordinates"] == {"size": "16", "seed": "1", "method": "fixed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "lokal"], "unknown engine 'lokal'"),
        (["--address", "x"], "unknown key 'address' in [engine] (local)"),
        (
            ["engine.per_device=0"],
            "'per_device' in [engine] (local) must be a whole number at least 1, not 0",
        ),
        (["engine=local"], "'engine' is a section, not the text 'local'"),
        (["engine.devices.first=1"], "'engine.devices' is not a table, so it has no 'first'"),
        (["run.name=x"], "a sweep names its runs itself"),
    ],
)
def test_wrong_arguments(
    write: Write, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(SWEEP + '\n    [engine]\n    devices = "auto"\n')
    assert main(["sweep", "run", "sweep.toml", *arguments]) == 2
    assert f"error: {message}" in capfd.readouterr().err
    assert not Path("runs").exists()


def test_the_engine_can_be_chosen_in_the_file(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    write(SWEEP + '\n    [engine]\n    name = "local"\n    per_devise = 2\n')
    assert main(["sweep", "run", "sweep.toml", "--dry-run"]) == 2
    err = capfd.readouterr().err
    assert "unknown key 'per_devise' in [engine] (local)" in err
    assert "help: did you mean 'per_device'?" in err


@pytest.mark.parametrize("named", ['name = "local"\n', ""])
def test_another_engine_leaves_out_the_files_options_and_says_so(
    write: Write, capfd: pytest.CaptureFixture[str], named: str
) -> None:
    path = write(f"{SWEEP}\n    [engine]\n    {named}\n    per_device = 2\n")
    assert main(["sweep", "run", str(path), "--engine", "remote", "--dry-run"]) == 0
    assert capfd.readouterr().err == (
        "notice: engine.name=remote replaces 'local': its options in sweep.toml are left out (per_device)\n"
    )


def test_the_toy_sweep() -> None:
    plan = make_plan(Path(__file__).parents[2] / "examples" / "toy_sweep.toml")
    assert len(plan.runs) == 12
    assert plan.folder == Path("runs/toy_sweep")
    assert plan.notices == ()
