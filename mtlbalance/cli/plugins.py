"""``mtlbalance plugins``: what there is to name in a config, and which options each takes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, get_args

import typer
from pydantic.fields import FieldInfo
from rich.table import Table

from mtlbalance.cli import plugin_check, plugin_new
from mtlbalance.cli.configs import JsonOption
from mtlbalance.cli.output import hanging, print_json, stdout_console
from mtlbalance.cli.plugin_choice import NameArgument, PluginOption, SlotOption, check_slot, find, load
from mtlbalance.config.validation import describe_range
from mtlbalance.errors import MtlBalanceError
from mtlbalance.plugins import Registration, TaskSpec, build_plugin, import_reference
from mtlbalance.plugins.registrations import BalancerRegistration, FromClass

_DOCSTRING_WIDTH = 100  # a line that ends before was meant to end
_LABEL = re.compile(r"[A-Z][\w ,]*: ")  # as in "State: none"

app = typer.Typer(help="Discover, check and write plugins.", no_args_is_help=True)


@app.command("list")
def list_plugins(slot: SlotOption = None, listed: PluginOption = None, as_json: JsonOption = False) -> None:
    """List every dataset, backbone and balancer, and the plugins that are broken."""
    check_slot(slot)
    rows = [row for row in load(listed).rows() if slot in (None, row.slot) or row.status == "broken"]
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
    name: NameArgument,
    slot: SlotOption = None,
    listed: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a plugin is and every option that it takes."""
    check_slot(slot)
    registry = load(listed)
    registration = find(registry, name, slot)
    origin = registry.origin(registration.slot, name)
    options = [_option(key, field) for key, field in registration.config.model_fields.items()]
    about, facts = _about(registration), _facts(registration)
    if as_json:
        document = {
            "slot": registration.slot,
            "name": name,
            "summary": registration.summary,
            "plugin": origin.plugin,
            "version": origin.version,
            "about": about,
            "facts": facts,
            "options": options,
        }
        print_json(document)
        return
    console = stdout_console()
    console.print(f"{registration.slot} {name}: {registration.summary}", markup=False, style="bold")
    console.print(f"plugin: {origin}", markup=False)
    if about:
        console.print()
        for line in about.split("\n"):
            console.print(hanging(line, console.width), markup=False, soft_wrap=True)
    if facts:
        console.print()
        console.print(_pairs(facts.items()))
    console.print()
    if not options:
        console.print("It takes no options.")
        return
    rows: list[tuple[str, str]] = []
    for option in options:
        kind = f"{option['type']} {option['range']}".strip()
        default = "required" if option["required"] else f"default {option['default_text']}"
        rows += [(option["name"], f"{kind}; {default}"), ("", option["description"])]
    console.print(_pairs(rows))


app.command("check")(plugin_check.check)
app.command("new")(plugin_new.new)


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
    return _unwrapped("\n".join(kept).strip())


def _unwrapped(text: str) -> str:
    """Join the lines of prose that were broken for want of room, so that a terminal can wrap them to its own width."""
    joined: list[str] = []
    last = ""  # the line before, as it was written
    for line in text.split("\n"):
        no_room = len(last) + 1 + len(line.split(" ")[0]) > _DOCSTRING_WIDTH
        is_prose = line and last and not line.startswith(" ") and not last.startswith(" ")
        if is_prose and no_room and not _LABEL.match(line):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
        last = line
    return "\n".join(joined)


def _facts(registration: Registration) -> dict[str, str]:
    """Return what a balancer reads, costs and keeps, read off an instance with its default options."""
    if registration.slot != "balancer":
        return {}
    from mtlbalance.balancers.facts import FACT_HEADINGS, method_facts

    tasks = [TaskSpec(name, "regression", "mse") for name in ("a", "b")]
    stand_ins: dict[Any, Any] = {str: "a", int: 1, float: 1.0, bool: False}
    required = {
        name: stand_ins.get(field.annotation)
        for name, field in registration.config.model_fields.items()
        if field.is_required()
    }
    try:
        facts = method_facts(build_plugin(registration, registration.config(**required), tasks))
    except (MtlBalanceError, ValueError):  # it cannot be built for tasks called a and b
        return {}
    return {heading: facts[key] for key, heading in FACT_HEADINGS.items()}


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, _literal(value), style="" if name else "dim")
    return table


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
