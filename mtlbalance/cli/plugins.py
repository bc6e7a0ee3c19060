"""``mtlbalance plugins``: what there is to name in a config, and which options each takes."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import asdict
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo
from rich.table import Table

from mtlbalance.cli.configs import JsonOption
from mtlbalance.cli.output import print_json, stdout_console, stdout_for_results
from mtlbalance.config.validation import describe_range
from mtlbalance.errors import PluginError, did_you_mean
from mtlbalance.plugins import PluginRegistry, Registration, Slot, import_reference, load_plugins
from mtlbalance.plugins.registrations import BalancerRegistration, FromClass

app = typer.Typer(help="Discover plugins and their options.", no_args_is_help=True)

SlotOption = Annotated[
    str | None, typer.Option("--slot", help=f"Only this slot: {', '.join(get_args(Slot))}.")
]

PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A plugin that is not installed: a path, or a module in this folder."),
]


def _check_slot(slot: str | None) -> None:
    if slot is not None and slot not in get_args(Slot):
        slots = ", ".join(get_args(Slot))
        raise typer.BadParameter(
            f"unknown slot {slot!r}{did_you_mean(slot, get_args(Slot))} (slots: {slots})"
        )


@app.command("list")
def list_plugins(slot: SlotOption = None, listed: PluginOption = None, as_json: JsonOption = False) -> None:
    """List every dataset, backbone and balancer, and the plugins that are broken."""
    _check_slot(slot)
    rows = [row for row in _load(listed).rows() if slot in (None, row.slot) or row.status == "broken"]
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("slot", no_wrap=True)
    table.add_column("name", no_wrap=True, style="cyan")
    table.add_column("summary", ratio=1)
    table.add_column("plugin", overflow="fold")
    table.add_column("status", no_wrap=True)
    styles = {"broken": "red", "duplicate": "yellow"}
    for row in rows:
        plugin = f"{row.plugin} {row.version}".strip()
        status = f"[{styles[row.status]}]{row.status}[/]" if row.status in styles else row.status
        table.add_row(row.slot or "-", row.name, _literal(row.summary), _literal(plugin), status)
    stdout_console().print(table)


@app.command("describe")
def describe(
    name: Annotated[str, typer.Argument(help="A plugin's name, such as gaba.", show_default=False)],
    slot: SlotOption = None,
    listed: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a plugin is and every option that it takes."""
    _check_slot(slot)
    registry = _load(listed)
    registration = _find(registry, name, slot)
    origin = registry.origin(registration.slot, name)
    options = [_option(key, field) for key, field in registration.config.model_fields.items()]
    about = _about(registration)
    if as_json:
        document = {
            "slot": registration.slot,
            "name": name,
            "summary": registration.summary,
            "plugin": origin.plugin,
            "version": origin.version,
            "about": about,
            "options": options,
        }
        print_json(document)
        return
    console = stdout_console()
    console.print(f"{registration.slot} {name}: {registration.summary}", markup=False, style="bold")
    console.print(f"plugin: {origin}", markup=False)
    if about:
        console.print(f"\n{about}", markup=False)
    console.print()
    if not options:
        console.print("It takes no options.")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for option in options:
        kind = f"{option['type']} {option['range']}".strip()
        default = "required" if option["required"] else f"default {option['default_text']}"
        table.add_row(option["name"], _literal(f"{kind}; {default}"))
        table.add_row("", f"[dim]{_literal(option['description'])}[/]")
    console.print(table)


def _load(listed: list[str] | None) -> PluginRegistry:
    with stdout_for_results():
        return load_plugins(listed or [])


def _find(registry: PluginRegistry, name: str, slot: str | None) -> Registration:
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


def _about(registration: Registration) -> str:
    """Return what a balancer's class says of itself, its arguments and example left out; only this imports torch."""
    if not (isinstance(registration, BalancerRegistration) and isinstance(registration.build, FromClass)):
        return ""
    text = inspect.getdoc(import_reference(registration.build.reference)) or ""
    kept: list[str] = []
    skipping = False
    for line in text.split("\n"):
        if line and not line.startswith(" "):
            skipping = line in ("Args:", "Example:")  # the options follow, from the config model
        if not skipping:
            kept.append(line.replace("``", ""))
    return "\n".join(kept).strip()


def _option(name: str, field: FieldInfo) -> dict[str, Any]:
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True)
    return {
        "name": name,
        "type": _type_name(field.annotation),
        "required": required,
        "default": default,
        "default_text": "" if required else _default_text(default),
        "range": describe_range(field.metadata),
        "description": field.description or "",
    }


def _default_text(default: Any) -> str:
    if default is None:
        return "none"
    return json.dumps(default, default=str) if not isinstance(default, str) else default


def _type_name(annotation: Any) -> str:
    """Return a type as a config's author knows it.

    >>> _type_name(float | None), _type_name(dict[str, float])
    ('number', 'table of numbers')
    """
    names = {float: "number", int: "whole number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    members = get_args(annotation)
    if not members:
        return "text" if getattr(annotation, "__name__", "") == "Path" else str(annotation)
    origin = getattr(annotation, "__origin__", None)
    if getattr(origin, "__name__", "") in ("list", "tuple", "set"):
        return f"list of {_plural(_type_name(members[0]))}"
    if getattr(origin, "__name__", "") == "dict":
        return f"table of {_plural(_type_name(members[1]))}"
    if "Literal" in str(annotation).partition("[")[0]:
        return " | ".join(map(str, members))
    if "Annotated" in type(annotation).__name__:
        return _type_name(members[0])
    shown = [_type_name(member) for member in members if member is not type(None)]
    return " or ".join(dict.fromkeys(shown))


def _plural(kind: str) -> str:
    return f"{kind}s" if kind.endswith("number") else kind


def _literal(text: str) -> str:
    return re.sub(r"\[", r"\\[", text)
