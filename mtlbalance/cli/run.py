"""``mtlbalance run``: train what a config says and show what came out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mtlbalance.caching import refresh
from mtlbalance.cli.configs import ConfigArgument, JsonOption, OverridesArgument, RefreshOption, load
from mtlbalance.cli.output import print_json, stdout_console, stdout_for_results

if TYPE_CHECKING:
    from mtlbalance.training import RunOutcome


def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder.", show_default="{output_dir}/{name}/seed_{seed}"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an existing run aside and start again.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    refresh_cache: RefreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one run; on the folder of an earlier one, resume it or say that it is finished."""
    loaded = load(config, overrides)
    if refresh_cache:
        os.environ |= refresh()
    from mtlbalance.training import run_training  # torch, only now that the config is known to be good

    with stdout_for_results():
        outcome = run_training(loaded, out=out, fresh=fresh, quiet=quiet)
    if not outcome.is_first:  # rank 0 speaks for all
        return
    if as_json:
        print_json({**outcome.results, "run_dir": str(outcome.run_dir), "status": outcome.status})
    else:
        _print_outcome(outcome)


def _print_outcome(outcome: RunOutcome) -> None:
    results = outcome.results
    console = stdout_console()
    if outcome.status == "already-finished":
        console.print(f"{results['run']} is finished already; --fresh starts it again", markup=False)
    key = results.get("key_metric", "")
    watched = "validation_metrics" not in results
    parts = f"{results['dataset']}, {results['backbone']}, {results['method']}, seed {results['seed']}"
    console.print(f"{results['run']}: {parts}", markup=False, style="bold", soft_wrap=True)
    table = Table()
    table.add_column("metric")
    table.add_column(f"best epoch ({results['best_epoch']})", justify="right")
    table.add_column(f"last epoch ({results['epochs_run'] - 1})", justify="right")
    for name in sorted(results["metrics"], key=lambda name: name != key):
        table.add_row(
            f"{name} (key)" if name == key else name,
            _number(results["metrics"][name]),
            _number(results["final_metrics"].get(name)),
            style="bold" if name == key else None,
        )
    console.print(table)
    rows = {
        "protocol": results["protocol"],
        "data source": results["data_source"],
        "measured on": "test set, which also chose the epoch"
        if watched
        else "test set, read once at the end",
        "weights": _weights(results.get("weights", {})),
        "stopped": results.get("stopped", ""),
        "time": f"{results['wall_seconds']:.1f} s",
        "written to": str(outcome.run_dir),
    }
    for label, value in rows.items():
        if value:
            console.print(f"{label:<12} {value}", markup=False, soft_wrap=True)
    for notice in results.get("notices", []):
        console.print(f"{'notice':<12} {notice}", markup=False, soft_wrap=True)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:,.4g}"


def _weights(weights: Mapping[str, float | None]) -> str:
    return ", ".join(f"{task} {weight:.4f}" for task, weight in weights.items() if weight is not None)
