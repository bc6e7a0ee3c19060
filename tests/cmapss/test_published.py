"""Which results may stand beside published figures."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mtlbalance_cmapss.published import ComparisonError, Published, compare_with_published
from mtlbalance_cmapss.simulate import Fleet, write_fleet

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmapss"
RESULTS: dict[str, Any] = {
    "dataset": "cmapss",
    "method": "gaba",
    "method_name": "GABA",
    "protocol": "paper",
    "data_source": "nasa",
    "metrics": {"rmse_last": 14.5, "nasa_score": 900.0, "rmse_all": 15.0},
    "facts": {
        "subset": "FD002",
        "official_files": True,
        "cap_test_labels": True,
        "rul_cap": 125.0,
        "pad": "all",
        "validation_engines": 52,
    },
}


def results(**changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(RESULTS)
    for key, value in changes.items():
        (changed["facts"] if key in changed["facts"] else changed)[key] = value
    return changed


def test_a_run_on_nasa_files_stands_beside_the_study() -> None:
    comparison = compare_with_published(RESULTS)
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
        ({"dataset": "toy"}, "not the results of a run on the dataset 'cmapss'"),
    ],
)
def test_a_misleading_comparison_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ComparisonError, match=message) as caught:
        compare_with_published(results(**changes))
    assert caught.value.exit_code == 2


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = "from mtlbalance_cmapss.cli import run_cli; run_cli()"
    return subprocess.run(
        [sys.executable, "-c", command, *map(str, arguments)],
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
    assert "rmse_last: 14.50, study 7.53 ± 0.65, literature 10.7" in done.stdout
    path.write_text(json.dumps(results(data_source="simulated")))
    refused = shell("compare", path)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: this run was made on a simulated fleet")


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
