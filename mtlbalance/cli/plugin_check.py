"""``mtlbalance plugins check``: hold a registered plugin to what mtlbalance promises of its slot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mtlbalance.cli.configs import JsonOption
from mtlbalance.cli.output import hanging, print_json, stdout_console, stdout_for_results
from mtlbalance.cli.plugin_choice import NameArgument, PluginOption, SlotOption, check_slot, find, load
from mtlbalance.config.document import Document
from mtlbalance.config.problems import InvalidConfigError, LocatedProblem, Place
from mtlbalance.config.validation import validate
from mtlbalance.errors import PluginError
from mtlbalance.plugins import Registration

if TYPE_CHECKING:
    from mtlbalance.testing import Outcome

_MARKS = {
    "kept": ("✓", "ok", "green"),
    "broken": ("✗", "FAILED", "bold red"),
    "not applicable": ("-", "-", "dim"),
}


def check(
    name: NameArgument,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="The plugin's options, such as samples=60; the tasks of a balancer's checks are called a, b, c …",
            show_default=False,
        ),
    ] = None,
    slot: SlotOption = None,
    listed: PluginOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check a plugin against everything that mtlbalance promises of its slot; exit 1 if it breaks a promise."""
    check_slot(slot)
    registry = load(listed)
    registration = find(registry, name, slot)
    given = _options(registration, options or [])
    examination = _examination(registration, given)
    origin = registry.origin(registration.slot, name)
    console = stdout_console()
    if not as_json:
        console.print(f"{registration.slot} {name} ({origin})", markup=False, style="bold")
    outcomes: list[Outcome] = []
    for outcome in _quietly(examination):
        outcomes.append(outcome)
        if not as_json:
            _show(console, outcome)
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in _MARKS}
    if as_json:
        print_json(
            {
                "slot": registration.slot,
                "name": name,
                "plugin": origin.plugin,
                "version": origin.version,
                "options": given,
                "passed": not counts["broken"],
                "counts": counts,
                "checks": [_document(outcome) for outcome in outcomes],
            }
        )
    else:
        applied = counts["kept"] + counts["broken"]
        apart = f"; {counts['not applicable']} do not apply" if counts["not applicable"] else ""
        console.print(f"{counts['kept']} of {applied} checks passed{apart}", markup=False, style="bold")
    return int(counts["broken"] > 0)


def _options(registration: Registration, overrides: list[str]) -> dict[str, Any]:
    """Return the options given as ``key=value``, checked as a config's section is."""
    document = Document(Path("command line"), {})
    document.apply(overrides)
    label = f"{registration.slot} {registration.name!r}"
    _, faults = validate(registration.config, document.data, label)
    problems = list(document.problems)
    for fault in faults:
        place = document.place(fault.path, fault.at) if fault.path else Place("command line")
        advice = fault.help or "give it as KEY=VALUE after the plugin's name"
        problems.append(LocatedProblem(fault.message, place, advice))
    if problems:
        raise InvalidConfigError(problems)
    return document.data


def _examination(registration: Registration, options: Mapping[str, Any]) -> Iterator[Outcome]:
    """Return the outcomes of the slot's checks, one by one; only this imports torch."""
    from mtlbalance.testing import (
        BACKBONE_CHECKS,
        BALANCER_CHECKS,
        DATASET_CHECKS,
        BackboneCase,
        DatasetCase,
        registered_balancer,
    )

    of_slot: dict[str, Callable[[Any], Iterator[Outcome]]] = {
        "balancer": lambda plugin: BALANCER_CHECKS.examine(registered_balancer(plugin, options)),
        "dataset": lambda plugin: DATASET_CHECKS.examine(DatasetCase(plugin, options)),
        "backbone": lambda plugin: BACKBONE_CHECKS.examine(BackboneCase(plugin, options)),
    }
    if registration.slot not in of_slot:
        raise PluginError(
            f"there are no checks of the slot {registration.slot!r} (there are of {', '.join(of_slot)})"
        )
    return of_slot[registration.slot](registration)


def _quietly(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Yield the outcomes; what the plugin prints while it is examined goes to stderr."""
    while True:
        with stdout_for_results():
            outcome = next(outcomes, None)
        if outcome is None:
            return
        yield outcome


def _show(console: Console, outcome: Outcome) -> None:
    sign, word, style = _MARKS[outcome.status]
    mark = sign if console.encoding.startswith("utf") else word
    line = Text(f"  {mark} ", style=style).append(
        outcome.check, style="" if outcome.status == "kept" else style
    )
    if outcome.status == "not applicable":
        line.append(f": {outcome.finding}", style=style)
    console.print(line)
    if outcome.status == "broken":
        for label, text in {"promised": outcome.promise, "but": outcome.finding}.items():
            for number, row in enumerate(text.splitlines()):
                shown = hanging(f"      {label}: {row}" if number == 0 else f"        {row}", console.width)
                console.print(shown, markup=False, soft_wrap=True)


def _document(outcome: Outcome) -> dict[str, str]:
    return {
        "name": outcome.check,
        "promise": outcome.promise,
        "status": outcome.status,
        "finding": outcome.finding,
    }
