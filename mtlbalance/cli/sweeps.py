"""``mtlbalance sweep``: many runs from one file, what has become of them, and what they come to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mtlbalance.caching import refresh
from mtlbalance.cli.configs import JsonOption, RefreshOption
from mtlbalance.cli.output import print_json, print_stderr, stdout_console, stdout_for_results

if TYPE_CHECKING:
    from mtlbalance.sweeps import Plan
    from mtlbalance.sweeps.supervisor import SweepOutcome

app = typer.Typer(help="Many runs from one file.", no_args_is_help=True)

_STYLES = {"finished": "green", "broken": "yellow", "locked": "cyan", "new": ""}


@app.command("run")
def run(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides for every run, such as training.epochs=5, or for the engine: engine.per_device=2.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The sweep's folder.", show_default="{output_dir}/{name}")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Where to run: 'mtlbalance plugins list --slot engine'.", show_default="local"),
    ] = None,
    per_device: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time on each device.", show_default="1")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster, for an engine that has one.", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which a run is stopped.", show_default="none"),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Times that a run that was killed or lost is tried again.")
    ] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; start nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    refresh_cache: RefreshOption = False,
    as_json: JsonOption = False,
) -> int:
    """Carry out a sweep: finished runs are skipped, broken ones resumed, locked ones left alone."""
    from mtlbalance.sweeps.display import make_display
    from mtlbalance.sweeps.engine_choice import choose_engine, split_overrides
    from mtlbalance.sweeps.plan import make_plan
    from mtlbalance.sweeps.supervisor import prepare, supervise

    of_runs, of_engine = split_overrides(overrides or [])
    flags = {"name": engine, "per_device": per_device, "address": address}
    of_engine = [
        *(f"engine.{key}={value}" for key, value in flags.items() if value is not None),
        *of_engine,
    ]
    with stdout_for_results():
        plan = make_plan(sweep, of_runs, out)
        assert plan.runs[0].config is not None
        choice = choose_engine(sweep, of_engine, plan.runs[0].config.registry)
    for notice in (*plan.notices, *choice.notices):
        print_stderr(f"notice: {notice}")
    if dry_run:
        _print_plan(plan, as_json=as_json)
        return 0
    with stdout_for_results():  # engines may print what they like
        engine_at_work = choice.build()
        prepare(plan)
        outcome = supervise(
            plan,
            engine_at_work,
            make_display(quiet=quiet),
            retries=retries,
            timeout_seconds=timeout or None,
            environment=refresh() if refresh_cache else {},
        )
    if not as_json:
        _print_outcome(plan, outcome)
    elif not outcome.stopped:  # else the document says that it was stopped
        print_json({"sweep": plan.name, "folder": str(plan.folder), **outcome.to_dict()})
    return outcome.exit_code


@app.command("status")
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show what has become of a sweep's runs; any time, from anywhere."""
    from mtlbalance.sweeps.plan import read_plan

    plan = read_plan(folder)
    if as_json:
        print_json(_described(plan))
    else:
        _print_states(plan)


def _described(plan: Plan) -> dict[str, Any]:
    from mtlbalance.sweeps.folder_state import folder_states

    states = folder_states(plan)
    return {
        "sweep": plan.name,
        "folder": str(plan.folder),
        "counts": dict(Counter(states.values())),
        "runs": [
            {
                "id": run.id,
                "coordinates": dict(run.coordinates),
                "state": states[run.id],
                "folder": str(plan.folder_of(run.id)),
                "log": str(plan.log_of(run.id)),
            }
            for run in plan.runs
        ],
    }


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    from mtlbalance.sweeps.supervisor import changed_runs

    changed = changed_runs(plan)
    if as_json:
        print_json(_described(plan) | {"changed": changed})
        return
    sizes = " x ".join(f"{len(axis.labels)} {axis.name}" for axis in plan.axes)
    total = 1
    for axis in plan.axes:
        total *= len(axis.labels)
    excluded = f", {total - len(plan.runs)} excluded" if total != len(plan.runs) else ""
    print(f"{plan.name}: {sizes} = {len(plan.runs)} runs{excluded}")
    _print_states(plan)
    for run_id, keys in changed.items():
        print_stderr(f"warning: {run_id} was trained with another config: {'; '.join(keys)}")


def _print_states(plan: Plan) -> None:
    described = _described(plan)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for axis in plan.axes:
        table.add_column(axis.name, no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("folder", overflow="fold")
    for run in described["runs"]:
        style = _STYLES[run["state"]]
        state = f"[{style}]{run['state']}[/]" if style else str(run["state"])
        table.add_row(*(run["coordinates"][axis.name] for axis in plan.axes), state, run["id"])
    console = stdout_console()
    console.print(table)
    counts = ", ".join(f"{count} {state}" for state, count in described["counts"].items())
    console.print(f"{len(plan.runs)} runs: {counts}; in {plan.folder}", markup=False, soft_wrap=True)


def _print_outcome(plan: Plan, outcome: SweepOutcome) -> None:
    parts = [f"{len(outcome.finished)} finished"]
    if outcome.skipped:
        parts.append(f"{len(outcome.skipped)} finished before")
    if outcome.failed:
        parts.append(f"{len(outcome.failed)} failed")
    left = len(plan.runs) - len(outcome.finished) - len(outcome.skipped) - len(outcome.failed)
    if left:
        parts.append(f"{left} left")
    print(f"{plan.name}: of {len(plan.runs)} runs: {', '.join(parts)}; in {plan.folder}")
    for run_id, reason in outcome.failed.items():
        print(f"failed {run_id}: {reason}\n  log {plan.log_of(run_id)}")
    if left or outcome.failed:
        print("the same command goes on with what is not finished")
