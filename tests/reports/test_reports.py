"""Reports on folders of runs: what is compared with what, and what is said of it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from mtlbalance.cli.main import main
from mtlbalance.cli.output import print_json
from mtlbalance.reports import make_report, study_of_runs, study_of_sweep
from mtlbalance.sweeps import read_plan

Call = Callable[..., tuple[int, str, str]]

# rmse by subset, method and seed: gaba is better by .5, .7 and .6 on FD001, worse by 1, 2 and 3 on FD002.
RMSE = {
    ("FD001", "fixed"): [10.0, 11.0, 12.0],
    ("FD001", "gaba"): [9.5, 10.3, 11.4],
    ("FD002", "fixed"): [20.0, 21.0, 22.0],
    ("FD002", "gaba"): [21.0, 23.0, 25.0],
}


def write_run(folder: Path, rmse: float, config: dict[str, Any], **results: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.resolved.toml").write_text(tomli_w.dumps(config))
    document = {
        "method": config["balancer"]["name"],
        "seed": config["run"]["seed"],
        "protocol": "honest",
        "data_source": "nasa",
        "key_metric": "rmse",
        "key_metric_mode": "min",
        "metrics": {"rmse": rmse, "score": 10 * rmse, "accuracy": 1 / rmse, "broken": None},
        "validation_metrics": {},
    }
    (folder / "results.json").write_text(json.dumps(document | results))


def config_of(subset: str, method: str, seed: int) -> dict[str, Any]:
    balancer = {"name": method} | ({"beta": 0.9} if method == "gaba" else {"weights": [0.5, 0.5]})
    return {
        "run": {"name": f"{subset}-{method}", "seed": seed},
        "dataset": {"name": "cmapss", "subset": subset, "data_dir": f"/somewhere/{seed}"},
        "balancer": balancer,
        "training": {"epochs": 3},
    }


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a finished sweep."""
    folder = tmp_path / "table"
    runs = []
    for (subset, method), values in RMSE.items():
        for seed, rmse in enumerate(values, start=1):
            run_id = f"{subset}/{method}/seed_{seed}"
            write_run(folder / run_id, rmse, config_of(subset, method, seed))
            coordinates = {"subset": subset, "method": method, "seed": str(seed)}
            runs.append({"id": run_id, "coordinates": coordinates})
    axes = [
        {"name": "subset", "labels": ["FD001", "FD002"], "keys": ["dataset.subset"]},
        {"name": "method", "labels": ["fixed", "gaba"], "keys": ["balancer.name", "balancer.beta"]},
        {"name": "seed", "labels": ["1", "2", "3"], "keys": ["run.seed"]},
    ]
    plan = {"schema": 1, "sweep": "table", "axes": axes, "runs": runs}
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.setenv("COLUMNS", "200")

    def call_command(*arguments: object) -> tuple[int, str, str]:
        code = main([str(item) for item in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call_command


def test_figures_ranks_and_differences(sweep: Path) -> None:
    report = make_report(study_of_sweep(read_plan(sweep)))
    assert (report.compared, report.baseline) == ("method", "fixed")
    assert (report.levels, report.strata, report.num_runs) == (["fixed", "gaba"], ["FD001", "FD002"], 12)
    [metric] = report.metrics
    assert (metric.metric, metric.mode) == ("rmse", "min")
    for figure in metric.figures:
        values = RMSE[figure.stratum, figure.level]
        assert list(figure.values.values()) == values
        assert figure.summary.mean == pytest.approx(np.mean(values))
        assert figure.summary.std == pytest.approx(np.std(values, ddof=1))
    # gaba wins all three blocks of FD001 and loses all three of FD002.
    assert (metric.mean_ranks, metric.num_ranked) == ({"fixed": 1.5, "gaba": 1.5}, 6)
    found = {item.stratum: item for item in metric.differences}
    assert found["FD001"].paired.mean == pytest.approx(-0.6)
    assert found["FD002"].paired.mean == pytest.approx(2.0)
    assert found["all together"].paired.n == 6
    assert found["all together"].paired.mean == pytest.approx(0.7)
    # Three pairs of one sign: 2 / 2^3; twice that after Holm for the two of this family. All six have a family of one.
    assert (found["FD001"].paired.p_value, found["FD001"].p_holm) == (0.25, 0.5)
    assert found["all together"].p_holm == found["all together"].paired.p_value
    # By hand: of the 64 sign patterns of .5, .7, .6, 1, 2, 3, those with |sum| >= 4.2.
    patterns = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1)
    by_hand = np.mean(np.abs(np.array([-0.5, -0.7, -0.6, 1, 2, 3]) @ patterns) >= 4.2 - 1e-9)
    assert found["all together"].paired.p_value == pytest.approx(by_hand)


def test_it_says_when_n_is_too_small(sweep: Path) -> None:
    [metric] = make_report(study_of_sweep(read_plan(sweep))).metrics
    assert metric.sentences[0] == (
        "3 paired runs cannot give a p-value below 0.25 (2 / 2^3), so no difference can be significant at 0.05, "
        "however large: at least 6 pairs are needed for one comparison, 7 for the 2 of this table."
    )
    assert metric.sentences[1].startswith("Bootstrap intervals from few pairs are too narrow")
    assert len(metric.sentences) == 2  # six pairs over everything, compared once, are enough


def test_another_baseline_axis_and_metric(sweep: Path) -> None:
    plan = read_plan(sweep)
    [metric] = make_report(study_of_sweep(plan), ["accuracy"], baseline="gaba").metrics
    assert metric.mode == "max"
    assert {item.level for item in metric.differences} == {"fixed"}
    [metric] = make_report(study_of_sweep(plan), ["score"]).metrics
    assert (metric.mode, metric.mean_ranks) == (None, {})
    assert metric.sentences[0].startswith("Whether small or large values of score are good is not known")
    [metric] = make_report(study_of_sweep(plan), ["score:min"]).metrics
    assert metric.mean_ranks == {"fixed": 1.5, "gaba": 1.5}
    report = make_report(study_of_sweep(plan, compare="subset"))
    assert (report.levels, report.strata) == (["FD001", "FD002"], ["fixed", "gaba"])


def test_runs_from_anywhere_are_told_apart_by_their_configs(sweep: Path) -> None:
    report = make_report(study_of_runs([sweep]))
    by_axes = make_report(study_of_sweep(read_plan(sweep)))
    assert (report.levels, report.strata) == (by_axes.levels, by_axes.strata)
    assert report.metrics == by_axes.metrics
    config = config_of("FD001", "gaba", 1)
    config["balancer"]["beta"] = 0.99
    write_run(sweep.parent / "more" / "one", 9.0, config)
    report = make_report(study_of_runs([sweep / "FD001", sweep.parent / "more"]))
    assert report.levels == ["fixed", "gaba, beta 0.9", "gaba, beta 0.99"]
    assert report.strata == [""]


def test_a_method_can_be_chosen_by_its_validation_metrics(tmp_path: Path) -> None:
    for seed, rmse in ((1, 3.0), (2, 5.0)):
        config = config_of("FD001", "gaba", seed)
        write_run(tmp_path / str(seed), 1.0, config, validation_metrics={"rmse": rmse})
    [metric] = make_report(study_of_runs([tmp_path]), ["validation_rmse"]).metrics
    assert (metric.mode, metric.figures[0].summary.mean) == ("min", 4.0)


def test_a_run_given_twice_counts_once(sweep: Path) -> None:
    twice = make_report(study_of_runs([sweep, sweep / "FD001"]))
    assert twice.num_runs == 12
    config = config_of("FD001", "gaba", 1)
    write_run(sweep.parent / "copy", 1.0, config)
    copied = make_report(study_of_runs([sweep, sweep.parent / "copy"]))
    assert copied.num_runs == 12
    assert copied.notices[0].startswith(f"{sweep.parent / 'copy'} is the same run as ")


def test_unfinished_runs_are_said_and_not_counted(sweep: Path) -> None:
    (sweep / "FD001" / "gaba" / "seed_2" / "results.json").unlink()
    report = make_report(study_of_sweep(read_plan(sweep)))
    assert report.notices == ["1 of 12 runs are not finished, and not counted: FD001/gaba/seed_2."]
    found = {item.stratum: item for item in report.metrics[0].differences}
    assert (found["FD001"].paired.n, found["FD002"].paired.n) == (2, 3)
    assert found["FD001"].paired.mean == pytest.approx(-0.55)  # seed 2 of fixed has lost its partner
    assert report.metrics[0].num_ranked == 5
    assert make_report(study_of_runs([sweep])).num_runs == 11


def test_cautions(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1.0, config_of("FD001", "gaba", 1), data_source="simulated")
    write_run(tmp_path / "b", 2.0, config_of("FD001", "gaba", 2), protocol="paper")
    path = tmp_path / "b" / "results.json"
    document = json.loads(path.read_text())
    del document["validation_metrics"]
    path.write_text(json.dumps(document))
    assert make_report(study_of_runs([tmp_path])).notices == [
        "These runs have different protocols (honest, paper): do not compare them.",
        "These runs have different data sources (nasa, simulated): do not compare them.",
        "Simulated data: the figures say nothing about the real data set.",
        "The best epoch was chosen on the test set, so every figure is the best of many looks at it.",
    ]


def test_a_run_whose_metric_is_no_number_is_said(sweep: Path, call: Call) -> None:
    """A mean without the run that diverged flatters the method."""
    folders = [sweep / "FD001" / "gaba" / f"seed_{seed}" for seed in (1, 2)]
    for folder, value in zip(
        folders, (None, math.nan), strict=True
    ):  # as it is recorded, and as others might
        document = json.loads((folder / "results.json").read_text())
        document["metrics"]["rmse"] = value
        (folder / "results.json").write_text(json.dumps(document))
    [metric] = make_report(study_of_sweep(read_plan(sweep))).metrics
    assert metric.sentences[0] == (
        "2 of 12 finished runs have no finite rmse, and are in none of its figures, which may look better for it: "
        "FD001, gaba, 1; FD001, gaba, 2."
    )
    assert {item.paired.n for item in metric.differences if item.stratum == "FD001"} == {1}
    assert metric.num_ranked == 4
    code, _, err = call("sweep", "report", sweep, "--metric", "broken")
    assert code == 2
    assert "error: 'broken' is a finite number in no run; there are accuracy, rmse, score" in err


def test_a_baseline_without_runs_is_said(sweep: Path) -> None:
    for path in sweep.glob("*/fixed/*/results.json"):
        path.unlink()
    [metric] = make_report(study_of_sweep(read_plan(sweep))).metrics
    assert metric.differences == []
    assert metric.sentences[:2] == [
        "No run of fixed has rmse, so nothing is compared with it; --baseline names another.",
        "No data and seed has a run of every method, so there are no ranks.",
    ]


def test_seeds_without_a_partner_are_said(tmp_path: Path) -> None:
    for method, seeds in (("fixed", (1, 2)), ("gaba", (3, 4))):
        for seed in seeds:
            write_run(tmp_path / f"{method}{seed}", 1.0, config_of("FD001", method, seed))
    [metric] = make_report(study_of_runs([tmp_path])).metrics
    assert metric.sentences == [
        "Not compared with fixed, for want of a run on the same data with the same seed: gaba.",
        "No data and seed has a run of every method, so there are no ranks.",
    ]


def test_methods_that_were_trained_differently_are_named_so(tmp_path: Path) -> None:
    for method, epochs in (("fixed", 40), ("gaba", 500)):
        for seed, workers in ((1, 0), (2, 4)):
            config = config_of("FD001", method, seed)
            config["training"] = {"epochs": epochs, "num_workers": workers}  # the latter decides nothing
            write_run(tmp_path / f"{method}{seed}", 1.0, config)
    assert study_of_runs([tmp_path]).levels == ["fixed, epochs 40", "gaba, epochs 500"]


def test_special_cases_of_a_sweep_are_said(sweep: Path) -> None:
    for seed in (1, 2, 3):
        path = sweep / "FD002" / "gaba" / f"seed_{seed}" / "config.resolved.toml"
        path.write_text(path.read_text().replace("epochs = 3", "epochs = 7"))
    plan = read_plan(sweep)
    assert study_of_sweep(plan).notices == [
        "Not only the method differs in FD002: training.epochs is 3 (fixed); 7 (gaba)."
    ]
    assert study_of_sweep(plan, compare="subset").notices == [
        "Not only the subset differs in gaba: training.epochs is 3 (FD001); 7 (FD002)."
    ]


def test_runs_that_were_set_aside_are_passed_over(sweep: Path) -> None:
    run = sweep / "FD001" / "gaba" / "seed_1"
    for name in ("seed_1.old-1", ".seed_1-half"):
        config = config_of("FD001", "gaba", 1)
        config["training"]["epochs"] = 9
        write_run(run.with_name(name), 1.0, config)
    assert study_of_runs([sweep]).levels == ["fixed", "gaba"]
    assert make_report(study_of_runs([run.with_name("seed_1.old-1")])).num_runs == 1  # asked for by name


def test_json_has_no_nan(capfd: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [1.0, -math.inf], "c": (Path("x"), None)})
    out = capfd.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"a": None, "b": [1.0, None], "c": ["x", None]}


def test_the_commands(sweep: Path, call: Call) -> None:
    code, out, err = call("sweep", "report", sweep)
    assert (code, err) == (0, "")
    assert "fixed" in out
    assert "11 ± 1 (3)" in out
    assert "-0.6" in out
    code, out, _ = call("sweep", "report", sweep, "--json")
    document = json.loads(out)
    assert document["metrics"][0]["figures"][0]["values"] == {"1": 10.0, "2": 11.0, "3": 12.0}
    code, out, _ = call("report", sweep / "FD001", "--format", "markdown")
    assert "| fixed | 11 ± 1 (3) | 2.00 |" in out
    assert "| gaba | 3 | -0.6 |" in out
    code, out, _ = call(
        "sweep", "report", sweep, "--format", "csv", "--metric", "rmse", "--metric", "accuracy"
    )
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["metric"], row["stratum"], row["method"]) for row in rows[:5]] == [
        ("rmse", "FD001", "fixed"),
        ("rmse", "FD001", "gaba"),
        ("rmse", "FD002", "fixed"),
        ("rmse", "FD002", "gaba"),
        ("rmse", "all together", "gaba"),
    ]
    assert float(rows[1]["difference"]) == pytest.approx(-0.6)
    assert rows[1]["p_holm"] == "0.5"
    assert rows[0]["difference"] == ""
    code, out, _ = call("report", sweep / "FD001" / "gaba" / "seed_1")
    assert code == 0  # of one run, every metric
    assert [name in out for name in ("rmse", "score", "accuracy")] == [True, True, True]
    assert "One run each says nothing about spread" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--metric", "rsme"],
            "no run has a metric 'rsme'; did you mean 'rmse'?; there are accuracy, rmse, score",
        ),
        (["--metric", "rmse:low"], "'rmse:low': after the colon comes min or max"),
        (["--baseline", "gabba"], "there is no method 'gabba'; did you mean 'gaba'?"),
        (["--compare", "metod"], "there is no axis 'metod'; did you mean 'method'?"),
    ],
)
def test_what_cannot_be_reported(sweep: Path, call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call("sweep", "report", sweep, *arguments)
    assert (code, out) == (2, "")
    assert f"error: {message}" in err


def test_nothing_to_report(sweep: Path, call: Call) -> None:
    assert "there is no such folder" in call("report", sweep / "gone")[2]
    for path in sweep.rglob("results.json"):
        path.unlink()
    code, _, err = call("sweep", "report", sweep)
    assert code == 2
    assert "error: no run of table is finished, so there is nothing to report" in err
    (sweep / "FD001/gaba/seed_1/results.json").write_text("{")
    assert "error: cannot read" in call("report", sweep)[2]
