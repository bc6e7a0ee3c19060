"""Which results may stand beside published figures."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from mtlbalance_cmapss.published import ComparisonError, Published, compare_with_published
from mtlbalance_cmapss.simulate import Fleet, write_fleet

from mtlbalance.config import load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmapss"
RESULTS: dict[str, Any] = {
    "dataset": "cmapss",
    "backbone": "cnn-bilstm-attention",
    "method": "gaba",
    "method_name": "GABA",
    "protocol": "paper",
    "data_source": "nasa",
    "metrics": {"rmse_last": 14.5, "nasa_score": 900.0, "rmse_all": 15.0},
    "parameters": {"total": 3_497_476},
    "epochs_run": 209,
    "stopped": "early-stop",
    "facts": {
        "subset": "FD002",
        "per_condition": True,
        "window": 30,
        "official_files": True,
        "cap_test_labels": True,
        "rul_cap": 125.0,
        "pad": "all",
        "validation_engines": 52,
    },
}


def study_config(name: str, *overrides: str) -> dict[str, Any]:
    """What a run of this config leaves as config.resolved.toml."""
    return tomllib.loads(load_config(EXAMPLE / f"{name}.toml", list(overrides)).to_toml())


def results(**changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(RESULTS)
    for key, value in changes.items():
        (changed["facts"] if key in changed["facts"] else changed)[key] = value
    return changed


def test_a_run_on_nasa_files_stands_beside_the_study() -> None:
    comparison = compare_with_published(RESULTS, study_config("fd002_gaba"))
    assert comparison.measured == {"rmse_last": 14.5, "nasa_score": 900.0}
    assert comparison.published == {"rmse_last": Published(7.53, 0.65), "nasa_score": Published(224.2, 22.4)}
    assert comparison.literature["rmse_last"] == Published(10.70)
    assert len(comparison.differences) == 1  # one seed against five


def test_what_differs_is_said() -> None:
    honest = compare_with_published(results(protocol="honest", pad="short"))
    assert any("held-out training engines (52 of them)" in text for text in honest.differences)
    assert any("pads every row" in text for text in honest.differences)
    fixed = compare_with_published(results(method="fixed", method_name="Fixed(0.05/0.95)"))
    assert any("this run has Fixed(0.05/0.95)" in text for text in fixed.differences)


def only_difference(run: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the one thing that is not alike, apart from the number of seeds."""
    seeds, other = compare_with_published(run, config).differences
    assert "five seeds" in seeds
    return other


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parameters": {"total": 153_956}}, "3,497,476 parameters; this run's has 153,956"),
        ({"parameters": {}}, "this run's has an unknown number"),
        ({"epochs_run": 4, "stopped": "epochs"}, "ended after 4 epochs; the study trains up to 500"),
        ({"epochs_run": 200, "stopped": "epochs"}, "ended after 200 epochs"),
        ({"protocol": "honest"}, "picked it on held-out training engines"),
        ({"pad": "short"}, "pads every row"),
        ({"per_condition": False}, "scales sensors within each operating condition; this run does not"),
    ],
)
def test_each_difference_in_the_results_is_said(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in only_difference(results(**changes), study_config("fd002_gaba"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("dataset.window=50", "[dataset], with the study's value in brackets: window = 50 (30)"),
        ("dataset.scale_settings_globally=false", "scale_settings_globally = false (true)"),
        ("dataset.health_thresholds=[60, 30]", "health_thresholds = [60.0, 30.0] ([80, 30])"),
        ("backbone.dropout=0.1", "dropout = 0.1 (0.3)"),
        ("backbone.funnel_dropout=0.0", "funnel_dropout = 0.0 (unset)"),
        ("balancer.beta=0.9", "[balancer], with the study's value in brackets: beta = 0.9 (0.99)"),
        ("training.ema_decay=0.99", "ema_decay = 0.99 (0.999)"),
    ],
)
def test_each_option_that_differs_is_said(override: str, sentence: str) -> None:
    assert sentence in only_difference(RESULTS, study_config("fd002_gaba", override))


@pytest.mark.parametrize("name", ["fd001_gaba", "fd003_gaba", "fd004_gaba", "fd002_fixed", "fd002_grace"])
def test_the_examples_own_configs_differ_in_nothing(name: str) -> None:
    subset, method = name.upper()[:5], name[6:]
    names = {"fixed": "Fixed(0.50/0.50)"}
    run = results(
        subset=subset,
        method=method,
        method_name=names.get(method, method.upper()),
        per_condition=subset in ("FD002", "FD004"),
    )
    assert len(compare_with_published(run, study_config(name)).differences) == 1


def test_amnl_has_a_published_row_for_its_normalised_form_alone() -> None:
    plain = compare_with_published(results(method="amnl", method_name="AMNL"))
    assert plain.published == {}
    assert any("belong to the normalised form" in text for text in plain.differences)
    normalised = compare_with_published(
        results(method="amnl", method_name="AMNL(normalised)"),
        study_config("fd002_amnl", "balancer.normalise=true", "backbone.dropout=0.2"),
    )
    assert normalised.published == {"rmse_last": Published(6.74, 0.91)}
    assert len(normalised.differences) == 1


def test_without_the_config_its_options_are_not_vouched_for() -> None:
    differences = compare_with_published(results(window=50)).differences
    assert any("options were not compared" in text for text in differences)
    assert any("this run's have 50" in text for text in differences)


def test_where_the_study_prints_no_figure_none_is_made_up() -> None:
    comparison = compare_with_published(results(subset="FD004"))
    assert comparison.published == {}
    assert comparison.literature == {"rmse_last": Published(12.89)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_source": "simulated"}, "simulated fleet"),
        ({"official_files": False}, "differ from NASA's"),
        ({"cap_test_labels": False}, "18.3 on uncapped FD002"),
        ({"rul_cap": 130.0}, "rul_cap = 130"),
        ({"protocol": "window-split"}, "leak"),
        ({"metrics": {"rmse_last": None, "nasa_score": 1.0}}, "no number for 'rmse_last'"),
        ({"dataset": "toy"}, "not the results of a run on the dataset 'cmapss'"),
    ],
)
def test_a_misleading_comparison_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ComparisonError, match=message) as caught:
        compare_with_published(results(**changes))
    assert caught.value.exit_code == 2


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mtlbalance_cmapss.cli", *map(str, arguments)],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_compare_from_the_shell(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    done = shell("compare", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "options were not compared" in done.stdout
    (tmp_path / "config.resolved.toml").write_text(
        load_config(EXAMPLE / "fd002_gaba.toml", ["backbone.dropout=0.1"]).to_toml()
    )
    done = shell("compare", tmp_path)
    assert "dropout = 0.1 (0.3)" in done.stdout
    assert "rmse_last: 14.50, study 7.53 ± 0.65, literature 10.7" in done.stdout
    path.write_text(json.dumps(results(data_source="simulated")))
    refused = shell("compare", path)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith(f"error: {path}: this run was made on a simulated fleet")


@pytest.mark.parametrize("content", ["[1, 2]", "3", "null", '{"dataset": "cmapss", "facts": []}', "{", "{}"])
def test_a_file_that_is_no_result_is_an_error_and_no_traceback(content: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    done = shell("compare", path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: ")
    assert "Traceback" not in done.stderr


def test_simulate_and_verify_from_the_shell(tmp_path: Path) -> None:
    done = shell("simulate", "FD002", tmp_path / "fleet", "--engines", "5")
    assert done.returncode == 0, done.stderr
    again = shell("simulate", "FD002", tmp_path / "fleet")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    verified = shell("verify", tmp_path / "fleet")
    assert verified.returncode == 2
    assert "FD002: 5 training engines" in verified.stdout
    assert "a simulated fleet" in verified.stdout
    assert "FD001: absent" in verified.stderr


def test_verify_stops_at_a_broken_file(tmp_path: Path) -> None:
    write_fleet(Fleet("FD001", 4, 0), tmp_path / "fleet")
    (tmp_path / "fleet" / "RUL_FD001.txt").write_text("1\n")
    done = shell("verify", tmp_path / "fleet")
    assert done.returncode == 2
    assert "RUL_FD001.txt:1: the file has 1 remaining lives" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real_data
def test_verify_nasa_files(nasa_folder: Path) -> None:
    done = shell("verify", nasa_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NASA's own") == 4
    assert "FD004: 249 training engines (61249 rows), 248 test engines (41214 rows)" in done.stdout
