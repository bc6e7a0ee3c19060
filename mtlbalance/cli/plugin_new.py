"""``mtlbalance plugins new``: a plugin project to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from mtlbalance.cli.configs import JsonOption
from mtlbalance.cli.output import print_json
from mtlbalance.cli.plugin_choice import PluginOption, check_slot, load
from mtlbalance.errors import PluginError
from mtlbalance.plugins import Slot
from mtlbalance.plugins.scaffold import write_plugin


def new(
    name: Annotated[
        str, typer.Argument(help="The plugin's name, in kebab case, such as acme-loss.", show_default=False)
    ],
    slot: Annotated[str, typer.Option("--slot", help="balancer, dataset or backbone.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="The project's folder, which must not hold anything.", show_default="NAME"),
    ] = None,
    listed: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a plugin project that works as it is: registration, options, a small example, a test, a config."""
    check_slot(slot)
    if name in load(listed).names(slot):
        raise PluginError(f"there is a {slot} called {name!r} already; choose another name")
    folder = out or Path(name)
    files = write_plugin(name, cast(Slot, slot), folder)
    if as_json:
        print_json(
            {"slot": slot, "name": name, "folder": str(folder), "files": [str(path) for path in files]}
        )
        return
    print(f"wrote the {slot} {name} to {folder}:")
    for path in files:
        print(f"  {path.relative_to(folder)}")
    package = name.replace("-", "_")
    print("next:")
    print(f"  cd {folder}")
    print("  python -m pytest")
    print(f"  mtlbalance plugins check {name} --plugin ./{package}")
    print("  mtlbalance run example.toml")
    print("  python -m pip install -e .    # then it is found without being listed")
