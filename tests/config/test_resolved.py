"""The resolved config is complete, runs from anywhere, and its hash speaks of the result alone."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtlbalance.config import RunConfig, load_config
from mtlbalance.config.loading import default_name

Write = Callable[[str], Path]

CONFIG = """\
dataset.name = "toy"
backbone.name = "mlp"
balancer.name = "gaba"
"""


def reload(config: RunConfig, folder: Path) -> RunConfig:
    path = folder / "config.resolved.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return load_config(path)


def test_every_default_is_spelled_out(write: Write) -> None:
    config = load_config(write(CONFIG))
    sections = tomllib.loads(config.to_toml())
    assert list(sections) == ["run", "dataset", "backbone", "balancer", "training"]
    assert sections["run"]["name"] == "study"
    assert set(sections["training"]) == {*type(config.training).model_fields} - {
        "weight_decay_late",
        "eval_batch_size",
        "matmul_precision",
    }  # these are none
    assert sections == config.to_dict()


_LISTS = st.lists(st.integers(1, 9), min_size=1, max_size=3)
_OVERRIDES: dict[str, st.SearchStrategy[Any]] = {
    "run.seed": st.integers(0, 2**32 - 1),
    "run.name": st.from_regex(r"\A[a-z0-9_][A-Za-z0-9_.-]{0,8}\Z"),
    "run.device": st.sampled_from(["cpu", "auto", "cuda:1"]),
    "run.output_dir": st.text(min_size=1, max_size=12).filter(
        lambda text: text.strip() and text[0] != "~" and Path(text) != Path()
    ),
    "run.deterministic": st.booleans(),
    "run.keep_freed_memory": st.booleans(),
    "training.lr": st.floats(5e-6, 10),
    "training.epochs": st.integers(1, 10**9),
    "training.weight_decay_late": st.floats(0, 1),
    "training.precision": st.sampled_from(["fp32", "bf16"]),
    "training.matmul_precision": st.sampled_from(["highest", "high", "medium"]),
    "balancer.beta": st.floats(0, 1, exclude_max=True),
    "balancer.min_weight": st.floats(0, 0.5),
    "backbone.hidden_sizes": _LISTS,
    "dataset.noise": st.integers(0, 3) | st.floats(0, 3),
}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=_OVERRIDES))
def test_any_override_goes_round(write: Write, chosen: dict[str, Any]) -> None:
    path = write(CONFIG)
    overrides = [
        key + tomli_w.dumps({"v": value}).removeprefix("v ").strip() for key, value in chosen.items()
    ]
    config = load_config(path, overrides)
    resolved = config.to_dict()
    for key, value in chosen.items():
        section, _, option = key.partition(".")
        expected = str(Path(value)) if option == "output_dir" else value
        assert resolved[section][option] == expected
    again = reload(config, Path())
    assert again == config
    assert again.result_hash() == config.result_hash()
    assert again.to_toml() == config.to_toml()


def test_the_hash_speaks_of_the_result_alone(write: Write) -> None:
    path = write(CONFIG)
    plain = load_config(path).result_hash()
    for same in (
        "run.name=x",
        "run.output_dir=/tmp",
        "run.device=cpu",
        "balancer.beta=0.990",
        "dataset.seed=0",
    ):
        assert load_config(path, [same]).result_hash() == plain
    different = [
        "run.seed=1",
        "training.lr=0.1",
        "balancer.beta=0.5",
        "balancer.name=fixed",
        "dataset.seed=1",
    ]
    hashes = [load_config(path, [text]).result_hash() for text in different]
    assert len({plain, *hashes}) == len(different) + 1


ACME = """\
    from mtlbalance.plugins import DatasetRegistration, PluginConfig, TaskSpec, hookimpl

    class Options(PluginConfig):
        places = frozenset({"data_dir"})
        data_dir: str = "."
        size: int = 1

    @hookimpl
    def register_datasets():
        tasks = (TaskSpec("one", "regression", "mse"),)
        return [DatasetRegistration("acme", "theirs", Options, "acme:build", lambda _: tasks)]
"""


@pytest.mark.parametrize("listed", ["acme", "./acme.py", "../here/acme.py"])
def test_plugins_beside_the_config_become_absolute(tmp_path: Path, monkeypatch: Any, listed: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "acme.py").write_text(dedent(ACME))
    (here / "study.toml").write_text(f'plugins = ["{listed}"]\n' + CONFIG.replace("toy", "acme"))
    monkeypatch.chdir(there)
    config = load_config(here / "study.toml", ["dataset.data_dir=/x"])
    assert config.plugins == (str(here / "acme.py"),)
    assert [task.name for task in config.tasks] == ["one"]
    assert reload(config, there) == config
    assert config.result_hash() == load_config(here / "study.toml").result_hash()  # data_dir is a place
    assert config.result_hash() != load_config(here / "study.toml", ["dataset.size=2"]).result_hash()


def test_default_names_are_folder_names() -> None:
    names = {"fd002.toml": "fd002", "my study (2).toml": "my-study-2", ".toml": "toml", "é.v2.toml": "v2"}
    assert {file: default_name(Path(file)) for file in names} == names


PLACES = """\
    from pathlib import Path
    from mtlbalance.plugins import DatasetRegistration, PluginConfig, TaskSpec, hookimpl

    class Options(PluginConfig):
        places = frozenset({"data_dir", "files"})
        data_dir: Path | None = None
        files: tuple[Path, ...] = ()
        label: str = ""

    @hookimpl
    def register_datasets():
        tasks = (TaskSpec("one", "regression", "mse"),)
        return [DatasetRegistration("other", "theirs", Options, "other:build", lambda _: tasks)]
"""


def test_places_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: Any) -> None:
    here, there, home = tmp_path / "here", tmp_path / "there", tmp_path / "home"
    for folder in (here, there):
        folder.mkdir()
    (here / "other.py").write_text(dedent(PLACES))
    text = 'plugins = ["other"]\n' + CONFIG.replace('dataset.name = "toy"\n', "")
    options = 'data_dir = "../data"\nfiles = ["a.txt", "~/b.txt", "/c.txt"]\nlabel = "./kept"\n'
    (here / "study.toml").write_text(f"{text}[dataset]\n{options}name = 'other'\n")
    monkeypatch.chdir(there)
    monkeypatch.setenv("HOME", str(home))
    config = load_config("../here/study.toml")
    section = config.to_dict()["dataset"]
    assert section["data_dir"] == str(tmp_path / "data")
    assert section["files"] == [str(here / "a.txt"), str(home / "b.txt"), "/c.txt"]
    assert section["label"] == "./kept"
    assert reload(config, tmp_path) == config
    overridden = load_config("../here/study.toml", ["dataset.data_dir=data", "run.output_dir=~/runs"])
    assert overridden.to_dict()["dataset"]["data_dir"] == str(there / "data")
    assert overridden.run.output_dir == home / "runs"
    assert overridden.result_hash() != load_config("../here/study.toml", ["dataset.label=x"]).result_hash()
