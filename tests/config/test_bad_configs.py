"""What a user reads for every kind of bad config, to the character."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from mtlbalance.config import InvalidConfigError, load_config
from mtlbalance.plugins.manager import load_plugins

Problems = Callable[..., str]
Write = Callable[[str], Path]

SLOTS = 'dataset.name = "toy"\nbackbone.name = "mlp"\n'
BALANCERS = ", ".join(load_plugins(entry_points=False).names("balancer"))
GABA = SLOTS + '[balancer]\nname = "gaba"\n'


def text(block: str) -> str:
    return dedent(block).strip("\n").replace("BALANCERS", BALANCERS)


def test_unknown_option(problems: Problems) -> None:
    assert problems(GABA + "bata = 0.9\n") == text("""
        error: unknown key 'bata' in [balancer] (gaba)
          --> study.toml:5:1
          |
        5 | bata = 0.9
          | ^^^^
        help: did you mean 'beta'?
        """)


def test_out_of_range_value_behind_a_tab(problems: Problems) -> None:
    assert problems(GABA + "\tbeta =\t1.5 # high\n") == (
        "error: 'beta' in [balancer] (gaba) must be a number at least 0 and below 1, not 1.5\n"
        "  --> study.toml:5:9\n"
        "  |\n"
        "5 | \tbeta =\t1.5 # high\n"
        "  | \t      \t^^^\n"
        "help: beta: smoothing of the weights: the share kept at each step"
    )


def test_line_numbers_of_two_digits(problems: Problems) -> None:
    assert problems("\n" * 8 + GABA + 'sync = "gradient"\n') == text("""
        error: 'sync' in [balancer] (gaba) must be one of 'gradients', 'norms', 'none', not the text 'gradient'
          --> study.toml:13:8
           |
        13 | sync = "gradient"
           |        ^^^^^^^^^^
        help: did you mean 'gradients'?
        """)


def test_unknown_plugin_lists_what_exists(problems: Problems) -> None:
    assert problems(GABA.replace("gaba", "gabba")) == text("""
        error: unknown balancer 'gabba'
          --> study.toml:4:8
          |
        4 | name = "gabba"
          |        ^^^^^^^
        help: did you mean 'gaba'? available: BALANCERS
        """)


def test_unknown_plugin_like_no_other(problems: Problems) -> None:
    assert problems(GABA.replace("toy", "cmapss")) == text("""
        error: unknown dataset 'cmapss'
          --> study.toml:1:16
          |
        1 | dataset.name = "cmapss"
          |                ^^^^^^^^
        help: a plugin that is not installed must be listed in plugins = [...]; available: toy
        """)


@pytest.mark.parametrize(
    ("line", "expected", "advice"),
    [
        (
            'lr = "0.9"',
            "'lr' in [training] must be a number above 0, not the text '0.9'",
            "without quotes: 0.9",
        ),
        ("lr = nan", "'lr' in [training] must be a finite number, not nan", "lr: learning rate"),
        ("lr = inf", "'lr' in [training] must be a finite number, not inf", "lr: learning rate"),
        ("lr = true", "'lr' in [training] must be a number above 0, not true", "lr: learning rate"),
        (
            "epochs = 1.0",
            "'epochs' in [training] must be a whole number at least 1, not 1.0",
            "epochs: at most",
        ),
        ("epochs = true", "'epochs' in [training] must be a whole number at least 1, not true", "epochs: at"),
        ("epochs = 0", "'epochs' in [training] must be a whole number at least 1, not 0", "epochs: at most"),
        (
            "epochs = [3]",
            "'epochs' in [training] must be a whole number at least 1, not the list [3]",
            "epochs:",
        ),
        ("drop_last = 1", "'drop_last' in [training] must be true or false, not 1", "drop_last: drop"),
        (
            "warmup_start = 1.5",
            "'warmup_start' in [training] must be a number above 0 and at most 1, not 1.5",
            "warmup_start: first",
        ),
        (
            "precision = 16",
            "'precision' in [training] must be one of 'fp32', 'bf16', 'fp16', not 16",
            "precision: bf16",
        ),
        (
            "matmul_precision = 'tf32'",
            "'matmul_precision' in [training] must be one of 'highest', 'high', 'medium', not the text 'tf32'",
            "matmul_precision: float32 matrix products",
        ),
        (
            "ema_decay = 2024-01-01",
            "'ema_decay' in [training] must be a number at least 0 and below 1, not the text '2024-01-01'",
            "ema_decay: ",
        ),
    ],
)
def test_wrong_types_and_ranges(problems: Problems, line: str, expected: str, advice: str) -> None:
    found = problems(GABA + "[training]\n" + line + "\n")
    value = line.partition(" = ")[2]
    column = len(line) - len(value) + 1
    assert found.startswith(
        f"error: {expected}\n  --> study.toml:6:{column}\n  |\n6 | {line}\n  | {' ' * (column - 1)}{'^' * len(value)}\n"
    )
    assert advice in found.splitlines()[-1]


def test_problems_inside_lists_and_tables(problems: Problems) -> None:
    config = """\
        dataset.name = "toy"
        balancer = { name = "fixed", weights = { large = -1, small = "x" } }
        [backbone]
        name = "mlp"
        hidden_sizes = [64, 0]
        """
    assert problems(config) == text("""
        error: 'weights.large' in [balancer] (fixed) must be a number at least 0, not -1
          --> study.toml:2:50
          |
        2 | balancer = { name = "fixed", weights = { large = -1, small = "x" } }
          |                                                  ^^
        help: weights: weight by task, or a list in the dataset's order; used as given; none: 1/K each

        error: 'weights.small' in [balancer] (fixed) must be a number, not the text 'x'
          --> study.toml:2:62
          |
        2 | balancer = { name = "fixed", weights = { large = -1, small = "x" } }
          |                                                              ^^^
        help: weights: weight by task, or a list in the dataset's order; used as given; none: 1/K each

        error: 'hidden_sizes[1]' in [backbone] (mlp) must be a whole number at least 1, not 0
          --> study.toml:5:21
          |
        5 | hidden_sizes = [64, 0]
          |                     ^
        help: hidden_sizes: width of each hidden layer; the last one gives the features
        """)


def test_value_that_fits_no_branch_of_a_union(problems: Problems) -> None:
    found = problems(SLOTS + '[balancer]\nname = "fixed"\nweights = 3\n')
    assert found.startswith("error: 'weights' in [balancer] (fixed) must be a table or a list, not 3\n")


def test_what_only_the_tasks_show(problems: Problems) -> None:
    config = """\
        dataset.name = "toy"
        backbone.name = "mlp"
        [balancer]
        name = "grace"
        biased_task = "larg"
        target_cap = 60
        min_weight = 0.6
        """
    assert problems(config) == text("""
        error: [balancer] (grace): unknown task 'larg'
          --> study.toml:5:15
          |
        5 | biased_task = "larg"
          |               ^^^^^^
        help: did you mean 'large'?

        error: [balancer] (grace): 'min_weight' must be at most 1/K = 0.5 for 2 tasks, not 0.6
          --> study.toml:7:14
          |
        7 | min_weight = 0.6
          |              ^^^
        """)


@pytest.mark.parametrize(
    ("weights", "expected", "place"),
    [
        ("[1, 2, 3]", "'weights' has 3 values for 2 tasks", "5:11"),
        ("{ large = 1 }", "'weights' has no weight for 'small'", "5:11"),
        ("[0, 0.0]", "'weights' are all zero: nothing would be learned", "5:11"),
        ("{ large = 1, small = 1, smal = 1 }", "unknown task 'smal'", "5:35"),
    ],
)
def test_weights_against_tasks(problems: Problems, weights: str, expected: str, place: str) -> None:
    found = problems(SLOTS + f'[balancer]\nname = "fixed"\nweights = {weights}\n')
    assert found.startswith(f"error: [balancer] (fixed): {expected}\n  --> study.toml:{place}\n")


def test_tasks_are_checked_although_other_options_are_wrong(problems: Problems) -> None:
    config = 'dataset = { name = "toy", smples = 1 }\nbackbone.name = "mlp"\n[balancer]\nname = "amnl"\n'
    found = problems(config + 'biased_task = "x"\ntarget_cap = 0\n')
    assert "unknown key 'smples' in [dataset] (toy)" in found
    assert "'target_cap' in [balancer] (amnl) must be a number above 0, not 0" in found
    assert "unknown task 'x'" in found
    found = problems(config + 'biased_task = "x"\ntarget_cap = 1\n')
    assert "unknown key 'smples'" in found
    assert "unknown task 'x'" in found


def test_missing_option(problems: Problems) -> None:
    found = problems(GABA.replace("gaba", "amnl") + "target_cap = 125\n")
    assert found == text("""
        error: missing key 'biased_task' in [balancer] (amnl)
          --> study.toml:3:2
          |
        3 | [balancer]
          |  ^^^^^^^^
        help: biased_task: the task whose samples weigh more the nearer they are to failure
        """)


def test_missing_sections(problems: Problems) -> None:
    assert problems("[dataset]\nname = 'toy'\n[balancr]\nname = 'gaba'\n") == text("""
        error: unknown section [balancr]
          --> study.toml:3:2
          |
        3 | [balancr]
          |  ^^^^^^^
        help: did you mean 'balancer'?

        error: missing section [backbone]
          --> study.toml
        help: add [backbone] with name = "..."; available: mlp
        """)


def test_empty_file(problems: Problems) -> None:
    found = problems("")
    assert [f"missing section [{slot}]" in found for slot in ("dataset", "backbone", "balancer")] == [
        True
    ] * 3


def test_section_without_name(problems: Problems) -> None:
    found = problems("[dataset]\nsamples = 100\n[backbone]\nnmae = 'mlp'\n[balancer]\nname = 3\n")
    assert found == text("""
        error: missing key 'name' in [dataset]
          --> study.toml:1:2
          |
        1 | [dataset]
          |  ^^^^^^^
        help: available: toy

        error: missing key 'name' in [backbone]
          --> study.toml:4:1
          |
        4 | nmae = 'mlp'
          | ^^^^
        help: did you mean 'name'? available: mlp

        error: 'name' in [balancer] must be text, not 3
          --> study.toml:6:8
          |
        6 | name = 3
          |        ^
        help: available: BALANCERS
        """)


def test_sections_that_are_none(problems: Problems) -> None:
    found = problems('dataset = "toy"\nbackbone = ["mlp"]\ntraining = 3\n[balancer]\nname = "gaba"\n')
    assert "error: 'dataset' must be a section, not the text 'toy'\n  --> study.toml:1:11" in found
    assert "error: 'backbone' must be a section, not the list [\"mlp\"]\n  --> study.toml:2:12" in found
    assert "error: 'training' must be a section, not 3\n  --> study.toml:3:12" in found


def test_misplaced_keys_are_told_where_they_belong(problems: Problems) -> None:
    found = problems("epochs = 3\n" + GABA + "[run]\nbatch_size = 3\n")
    assert "error: unknown key 'epochs'\n  --> study.toml:1:1" in found
    assert "error: unknown key 'batch_size' in [run]\n  --> study.toml:7:1" in found
    assert found.count("help: it belongs in [training]") == 2


def test_options_that_contradict_each_other(problems: Problems) -> None:
    assert problems(GABA + "[training]\nlr = 1e-6\n") == text("""
        error: [training]: scheduler_min_lr (5e-06) is above lr (1e-06)
          --> study.toml:6:6
          |
        6 | lr = 1e-6
          |      ^^^^
        """)


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "", "two words"])
def test_a_run_name_is_a_folder_name(problems: Problems, name: str) -> None:
    assert problems(GABA + f"[run]\nname = '{name}'\n") == text(f"""
        error: 'name' in [run] cannot be the text '{name}'
          --> study.toml:6:8
          |
        6 | name = '{name}'
          |        ^^{"^" * len(name)}
        help: name: letters, digits, _ . and -; default: the config file's name
        """)


def test_every_problem_at_once_in_the_order_of_the_file(problems: Problems) -> None:
    found = problems(
        'plugins = ["nope"]\n' + GABA.replace("mlp", "mpl") + "bata = 1\n[training]\nlr = 0\n", "run.seed=-1"
    )
    places = [line for line in found.splitlines() if line.startswith("  -->")]
    assert places == [
        "  --> study.toml:1:12",
        "  --> study.toml:3:17",
        "  --> study.toml:6:1",
        "  --> study.toml:8:6",
        "  --> command line: run.seed=-1",
    ]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (
            "[balancer]\nname = gaba\n",
            "not valid TOML: Invalid value\n  --> study.toml:2:8\n  |\n2 | name = gaba\n  |        ^\n"
            "help: text needs quotes; true and false are written in lower case",
        ),
        (
            "[balancer]\nname = 'gaba'\nname = 'fixed'\n",
            "not valid TOML: Cannot overwrite a value\n  --> study.toml:3:1\n  |\n3 | name = 'fixed'\n"
            "  | ^^^^^^^^^^^^^^\nhelp: this key is already set above",
        ),
        (
            "weights = [1, 2\n\n",
            "not valid TOML: Unclosed array\n  --> study.toml:1:1\n  |\n1 | weights = [1, 2\n  | ^^^^^^^^^^^^^^^",
        ),
    ],
)
def test_syntax_errors(problems: Problems, broken: str, expected: str) -> None:
    assert problems(broken) == f"error: {expected}"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("latin.toml").write_bytes(b"# line one\nname = '\xe9'\n")
    for name, expected in {
        "gone.toml": "error: there is no such config file\n  --> gone.toml",
        "folder": "error: this is a folder, not a config file\n  --> folder",
        "latin.toml": "error: line 2 is not UTF-8 text (byte 0xe9)\n  --> latin.toml\nhelp: save the file as UTF-8",
    }.items():
        with pytest.raises(InvalidConfigError) as caught:
            load_config(Path(name))
        assert str(caught.value) == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission(write: Write) -> None:
    path = write(GABA)
    path.chmod(0)
    with pytest.raises(InvalidConfigError, match="cannot read the file: Permission denied"):
        load_config(path)


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (GABA + "bata = 1\n").replace("\n", "\r\n").encode())
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path)
    assert f"{path}:5:1\n  |\n5 | bata = 1\n  | ^^^^\n" in str(caught.value)


# The plugins that a config lists.


def test_plugins_must_be_a_list_of_text(problems: Problems) -> None:
    assert problems('plugins = "acme"\n' + GABA).startswith(
        "error: 'plugins' must be a list of text, not the text 'acme'\n  --> study.toml:1:11\n"
    )
    assert problems('plugins = [1, ""]\n' + GABA).startswith(
        "error: a plugin must be a module name or a path, not 1\n  --> study.toml:1:12\n"
    )


def test_listed_plugin_that_fails_is_a_problem_of_its_line(write: Write, problems: Problems) -> None:
    write("")
    Path("broken.py").write_text("import math\n\nraise ValueError('no licence')\n")
    found = problems('plugins = [\n  "broken",\n  "./gone.py",\n]\n' + GABA.replace("toy", "turbines"))
    assert found == text(f"""
        error: plugin 'broken' cannot be used: ValueError: no licence (at {Path("broken.py").resolve()}:3)
          --> study.toml:2:3
          |
        2 |   "broken",
          |   ^^^^^^^^

        error: plugin './gone.py' cannot be used: there is no {Path("gone.py").resolve()}
          --> study.toml:3:3
          |
        3 |   "./gone.py",
          |   ^^^^^^^^^^^

        error: unknown dataset 'turbines'
          --> study.toml:5:16
          |
        5 | dataset.name = "turbines"
          |                ^^^^^^^^^^
        help: it may come with the plugin that could not be loaded; available: toy
        """)


def test_dataset_that_cannot_say_its_tasks(write: Write, problems: Problems) -> None:
    write("")
    Path("acme.py").write_text(
        dedent("""\
        from mtlbalance.plugins import DatasetRegistration, PluginConfig, TaskSpec, hookimpl

        def broken(options):
            return 1 / 0

        def twice(options):
            return [TaskSpec("a", "regression", "mse"), TaskSpec("a", "regression", "mse")]

        @hookimpl
        def register_datasets():
            return [
                DatasetRegistration(name, "summary", PluginConfig, "acme:build", tasks)
                for name, tasks in (("broken", broken), ("twice", twice))
            ]
        """)
    )
    config = 'plugins = ["acme"]\n' + GABA
    found = problems(config.replace("toy", "broken"))
    assert found.startswith(
        "error: dataset 'broken' cannot say its tasks: ZeroDivisionError: division by zero (at "
    )
    assert "acme.py:4)\n  --> study.toml:2:16" in found
    found = problems(config.replace("toy", "twice"))
    assert found.startswith("error: dataset 'twice' must give tasks with unique names, not ['a', 'a']\n")


def test_a_missing_option_hides_no_other_check(problems: Callable[..., str]) -> None:
    text = """\
        dataset.name = "toy"
        backbone.name = "mlp"
        [balancer]
        name = "grace"
        target_cap = 0
        min_weight = 0.9
    """
    found = problems(text)
    assert "missing key 'biased_task' in [balancer] (grace)" in found
    assert "'target_cap' in [balancer] (grace) must be a number above 0, not 0" in found
    assert "'min_weight' must be at most 1/K = 0.5 for 2 tasks, not 0.9" in found
    assert found.count("error:") == 3
    found = problems(text.replace("grace", "amnl").replace("min_weight = 0.9", "weights = { larg = 1 }"))
    assert "unknown task 'larg'" in found
    assert "missing key 'biased_task'" in found


def test_an_empty_output_folder(problems: Callable[..., str]) -> None:
    text = 'dataset.name = "toy"\nbackbone.name = "mlp"\nbalancer.name = "gaba"\nrun.output_dir = ""\n'
    assert "'output_dir' in [run]: it is empty" in problems(text)
