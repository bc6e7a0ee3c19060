"""``mtlbalance validate`` and ``mtlbalance config show``: everything that is wrong, or everything that will run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mtlbalance.cli.output import print_json, print_stderr, stdout_for_results
from mtlbalance.config import RunConfig, load_config

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML config.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, such as training.epochs=5; a value that is not TOML is text. Naming another plugin "
        "(balancer.name=fixed) leaves out the file's options for the old one.",
        show_default=False,
    ),
]
RefreshOption = Annotated[
    bool, typer.Option("--refresh-cache", help="Prepare the data again instead of using what is kept of it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

app = typer.Typer(help="Look at configs.", no_args_is_help=True)


def load(config: Path, overrides: list[str] | None) -> RunConfig:
    """Load a config and print its notices."""
    with stdout_for_results():
        loaded = load_config(config, overrides or [])
    for notice in loaded.notices:
        print_stderr(f"notice: {notice}")
    return loaded


def validate(
    config: ConfigArgument, overrides: OverridesArgument = None, as_json: JsonOption = False
) -> None:
    """Check a config and show every problem at once; nothing is trained."""
    loaded = load(config, overrides)
    if as_json:
        print_json({"valid": True, **summary(loaded)})
    else:
        print(f"ok: {config}")
        for label, value in summary(loaded).items():
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"  {label:<12} {shown}")


def summary(config: RunConfig) -> dict[str, Any]:
    """Return what a config chooses."""
    return {
        "run": config.run.name,
        "dataset": config.dataset.name,
        "backbone": config.backbone.name,
        "balancer": config.balancer.name,
        "tasks": [task.name for task in config.tasks],
    }


@app.command("show")
def show(config: ConfigArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Print the resolved config, every default spelled out: itself a config that can be run."""
    loaded = load(config, overrides)
    if as_json:
        print_json(loaded.to_dict())
    else:
        print(loaded.to_toml(), end="")
