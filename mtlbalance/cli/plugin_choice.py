"""Which plugin a command is about: the options that say so, and finding it."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from mtlbalance.cli.output import stdout_for_results
from mtlbalance.errors import PluginError, did_you_mean
from mtlbalance.plugins import PluginRegistry, Registration, Slot, load_plugins

NameArgument = Annotated[str, typer.Argument(help="A plugin's name, such as gaba.", show_default=False)]

SlotOption = Annotated[
    str | None, typer.Option("--slot", help=f"Only this slot: {', '.join(get_args(Slot))}.")
]

PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A plugin that is not installed: a path, or a module in this folder."),
]


def check_slot(slot: str | None) -> None:
    """Raise a usage error for a slot that does not exist."""
    if slot is not None and slot not in get_args(Slot):
        slots = ", ".join(get_args(Slot))
        raise typer.BadParameter(
            f"unknown slot {slot!r}{did_you_mean(slot, get_args(Slot))} (slots: {slots})"
        )


def load(listed: list[str] | None) -> PluginRegistry:
    """Load all plugins; what they print goes to stderr."""
    with stdout_for_results():
        return load_plugins(listed or [])


def find(registry: PluginRegistry, name: str, slot: str | None) -> Registration:
    """Return the plugin of that name in any slot, or in ``slot``.

    Raises:
        PluginError: there is none, it is broken, or the name is in two slots.
    """
    if slot is not None:
        return registry.get(slot, name)
    slots = [candidate for candidate in get_args(Slot) if name in registry.names(candidate)]
    if len(slots) > 1:
        raise PluginError(f"{name!r} names a {' and a '.join(slots)}; choose with --slot")
    if slots:
        return registry.get(slots[0], name)
    names = [known for candidate in get_args(Slot) for known in registry.names(candidate)]
    for broken in registry.broken:
        if broken.name == name or broken.listed_index is not None:
            raise PluginError(str(broken))
    raise PluginError(
        f"no plugin is called {name!r}{did_you_mean(name, names)}\navailable: {', '.join(names)}"
    )
