"""The example's two sweeps: every run's config is checked, and says what the study did."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtlbalance.sweeps import Plan, make_plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmapss"


def configs(plan: Plan) -> dict[str, dict[str, Any]]:
    return {run.id: run.config.to_dict() for run in plan.runs if run.config is not None}


@pytest.fixture(scope="module")
def table() -> Plan:
    return make_plan(EXAMPLE / "paper_table.toml")


def test_the_table_is_140_runs(table: Plan) -> None:
    assert len(table.runs) == 140
    assert [axis.name for axis in table.axes] == ["subset", "method", "seed"]
    found = configs(table)
    assert Counter(config["dataset"]["subset"] for config in found.values()) == dict.fromkeys(
        ["FD001", "FD002", "FD003", "FD004"], 35
    )
    assert Counter(config["balancer"]["name"] for config in found.values()) == dict.fromkeys(
        ["fixed", "dwa", "gradnorm", "uncertainty", "amnl", "gaba", "grace"], 20
    )
    assert Counter(config["run"]["seed"] for config in found.values()) == dict.fromkeys(
        [42, 123, 456, 789, 1024], 28
    )
    assert len({run.config.result_hash() for run in table.runs if run.config is not None}) == 140


def test_the_tables_methods_differ_in_nothing_else(table: Plan) -> None:
    """But in what the study did otherwise: AMNL's dropout on FD002 and FD004."""
    found = configs(table)
    for run_id, config in found.items():
        subset, method, seed = run_id.split("/")
        base = found[f"{subset}/gaba/{seed}"]
        special = {"dropout": 0.2} if method == "amnl" and subset in ("FD002", "FD004") else {}
        assert base["backbone"]["dropout"] == 0.3
        assert config["backbone"] == base["backbone"] | special
        for section in ("dataset", "training"):
            assert config[section] == base[section]


def test_the_tables_gaba_is_the_example_config(table: Plan) -> None:
    from mtlbalance.config import load_config

    for number in (1, 2, 3, 4):
        single = load_config(EXAMPLE / f"fd00{number}_gaba.toml", ["run.seed=123"])
        [run] = [run for run in table.runs if run.id == f"FD00{number}/gaba/seed_123"]
        assert run.config is not None
        assert run.config.result_hash() == single.result_hash()


def test_the_tables_options(table: Plan) -> None:
    found = configs(table)
    amnl = found["FD001/amnl/seed_42"]["balancer"]
    assert (amnl["normalise"], amnl["max_weight"], amnl["target_cap"]) == (True, 2.0, 125.0)
    grace = found["FD001/grace/seed_42"]["balancer"]
    assert (grace["beta"], grace["warmup_steps"], grace["biased_task"]) == (0.99, 100, "rul")
    assert found["FD001/baseline/seed_42"]["balancer"]["weights"] == {"rul": 0.5, "health": 0.5}
    assert found["FD001/gradnorm/seed_42"]["balancer"]["alpha"] == 1.5
    assert found["FD001/dwa/seed_42"]["balancer"]["temperature"] == 2.0


def test_the_weight_sweep() -> None:
    plan = make_plan(EXAMPLE / "fixed_weight_sweep.toml")
    assert len(plan.runs) == 40
    for run_id, config in configs(plan).items():
        weights = config["balancer"]["weights"]
        assert run_id.split("/")[1] == f"lambda_{weights['rul']}"
        assert weights["rul"] + weights["health"] == pytest.approx(1.0)
        assert (config["balancer"]["name"], config["training"]["epochs"]) == ("fixed", 40)


def test_sweep_files_are_not_configs() -> None:
    sweeps = [path.name for path in EXAMPLE.glob("*.toml") if "axes" in tomllib.loads(path.read_text())]
    assert sorted(sweeps) == ["fixed_weight_sweep.toml", "paper_table.toml"]


def test_the_sweep_on_the_page_about_sweeps(tmp_path: Path) -> None:
    page = (EXAMPLE.parents[1] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (tmp_path / "sweep.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    study = (EXAMPLE / "fd002_fixed.toml").read_text()
    plugin = f'"{EXAMPLE / "mtlbalance_cmapss"}"'
    (tmp_path / "study.toml").write_text(study.replace('"mtlbalance_cmapss"', plugin))
    dropout = {
        run.id: run.config.to_dict()["backbone"]["dropout"]
        for run in make_plan(tmp_path / "sweep.toml").runs
        if run.config is not None
    }
    assert dropout == {
        "FD001/equal/seed_1": 0.3,
        "FD001/equal/seed_2": 0.3,
        "FD001/gaba/seed_1": 0.2,
        "FD001/gaba/seed_2": 0.2,
        "FD002/gaba/seed_1": 0.3,
        "FD002/gaba/seed_2": 0.3,
    }
