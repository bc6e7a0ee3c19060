"""One section of a config against its pydantic model, with what is wrong in plain sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from mtlbalance.config.locator import KeyPath
from mtlbalance.errors import did_you_mean

Model = TypeVar("Model", bound=BaseModel)
ErrorDetails: TypeAlias = Mapping[str, Any]  # one of pydantic's ``ValidationError.errors()``

_KINDS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Fault:
    """A problem inside a section: ``path`` within it (empty: the section), and whether its key or value."""

    path: KeyPath
    at: Literal["key", "value"]
    message: str
    help: str = ""


def validate(
    model: type[Model], options: Mapping[str, Any], label: str, elsewhere: Mapping[str, str] | None = None
) -> tuple[Model | None, list[Fault]]:
    """Return the validated options, or None and every fault.

    Validation is strict: text is no number, ``1.0`` and ``true`` are no whole numbers. As JSON has it, whole
    numbers do for numbers, lists for tuples and text for paths.

    Args:
        model: the section's model.
        options: what was written.
        label: how messages name the section, such as ``"[balancer] (gaba)"``.
        elsewhere: keys of other sections and where they belong, for misplaced ones.
    """
    try:
        return model.model_validate_json(json.dumps(options, default=_as_json), strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    faults: list[Fault] = []
    for path, group in _by_path(details, options).items():
        faults.append(_fault(model, options, label, path, group, elsewhere or {}))
    return None, faults


def validate_partly(
    model: type[Model], options: Mapping[str, Any], at_fault: AbstractSet[str | int]
) -> tuple[Model | None, set[str]]:
    """Return the options that are in order, for further checks, and the names of required ones that are not.

    In what is returned, a faulty option that has a default has it, and one that is required is not set:
    reading it raises AttributeError.
    """
    kept = {key: value for key, value in options.items() if key not in at_fault}
    missing = {name for name, field in model.model_fields.items() if field.is_required() and name not in kept}
    unset: dict[str, Any] = dict.fromkeys(missing, (Any, None))
    try:
        valid, _ = validate(create_model(model.__name__, __base__=model, **unset), kept, "")
    except Exception:  # the model's own validator needs what is missing
        return None, missing
    if valid is not None:
        for name in missing:
            del valid.__dict__[name]
    return valid, missing


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a TOML value")  # pragma: no cover


def _by_path(details: Sequence[ErrorDetails], options: Any) -> dict[KeyPath, list[ErrorDetails]]:
    """Group errors by the place in the options that they speak of.

    pydantic reports every branch of a union, with the branch's name inside the location. Only the branch
    that got furthest into the value is what the user meant.
    """
    branches: dict[tuple[KeyPath, str], list[tuple[KeyPath, ErrorDetails]]] = {}
    for detail in details:
        path, branch, fork = _resolve(detail, options)
        branches.setdefault((path[:fork], branch), []).append((path, detail))
    depths: dict[KeyPath, int] = {}
    for (fork_path, branch), found in branches.items():
        if branch:
            depths[fork_path] = max(depths.get(fork_path, 0), max(len(path) for path, _ in found))
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for (fork_path, branch), found in branches.items():
        if branch and max(len(path) for path, _ in found) < depths[fork_path]:
            continue
        for path, detail in found:
            groups.setdefault(path, []).append(detail)
    return groups


def _resolve(detail: ErrorDetails, options: Any) -> tuple[KeyPath, str, int]:
    """Return the path in the options, the name of the union branch or "", and the depth of that fork."""
    path: KeyPath = ()
    branch, fork = "", 0
    current = options
    for index, part in enumerate(detail["loc"]):
        is_missing = detail["type"] == "missing" and index == len(detail["loc"]) - 1
        if _holds(current, part):
            current = current[part]
        elif not is_missing:
            if not branch:
                branch, fork = str(part), len(path)
            continue
        path = (*path, part)
    return path, branch, fork


def _holds(container: Any, part: str | int) -> bool:
    if isinstance(container, list):
        return isinstance(part, int) and part < len(container)
    return isinstance(container, Mapping) and part in container


def _fault(
    model: type[BaseModel],
    options: Mapping[str, Any],
    label: str,
    path: KeyPath,
    details: Sequence[ErrorDetails],
    elsewhere: Mapping[str, str],
) -> Fault:
    detail = details[0]
    name = dotted(path)
    field = model.model_fields.get(str(path[0])) if path else None
    about = f"{path[0]}: {field.description}" if field and field.description else ""
    if detail["type"] == "extra_forbidden":
        known = list(model.model_fields) if len(path) == 1 else []
        advice = did_you_mean(str(path[-1]), known).removeprefix("; ")
        if not advice and name in elsewhere:
            advice = f"it belongs in {elsewhere[name]}"
        if not advice and known:
            advice = f"the keys here are {', '.join(known)}"
        return Fault(path, "key", f"unknown key {name!r} in {label}", advice)
    if detail["type"] == "missing":
        return Fault(path[:-1], "key", f"missing key {name!r} in {label}", about)
    if detail["type"] in ("value_error", "assertion_error"):
        message = re.sub(r"^(Value error|Assertion failed), ", "", detail["msg"])
        if path:
            return Fault(path, "value", f"{name!r} in {label}: {message}", about)
        mentioned = [key for key in options if re.search(rf"\b{re.escape(key)}\b", message)]
        return Fault(tuple(mentioned[:1]), "value", f"{label}: {message}")
    value = detail["input"]
    if detail["type"] == "string_pattern_mismatch" and about:  # a description says more than a pattern
        return Fault(path, "value", f"{name!r} in {label} cannot be {show(value)}", about)
    expected = list(dict.fromkeys(_expected(item, field if len(path) == 1 else None) for item in details))
    if detail["type"] == "literal_error" and isinstance(value, str):
        about = did_you_mean(value, _choices(detail)).removeprefix("; ") or about
    elif isinstance(value, str) and any("number" in text for text in expected) and _is_number(value):
        about = f"write it without quotes: {float(value):g}"
    return Fault(
        path, "value", f"{name!r} in {label} must be {' or '.join(expected)}, not {show(value)}", about
    )


def _expected(detail: ErrorDetails, field: Any) -> str:
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind in _BOUNDS or kind in ("float_type", "int_type", "int_from_float"):
        bounds = describe_range(field.metadata) if field is not None else ""
        if not bounds and kind in _BOUNDS:
            key, words = _BOUNDS[kind]
            bounds = f"{words} {number(context[key])}"
        whole = kind != "float_type" and (kind not in _BOUNDS or _is_whole(context[_BOUNDS[kind][0]]))
        return f"{'a whole number' if whole else 'a number'} {bounds}".strip()
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "literal_error":
        choices = _choices(detail)
        return ("one of " if len(choices) > 1 else "") + ", ".join(repr(choice) for choice in choices)
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind in ("too_short", "string_too_short"):
        return f"{_counted(kind)} at least {context['min_length']}"
    if kind in ("too_long", "string_too_long"):
        return f"{_counted(kind)} at most {context['max_length']}"
    message: str = detail["msg"]
    return message.removeprefix("Input should be ").rstrip(".")


def _counted(kind: str) -> str:
    return "text whose length is" if kind.startswith("string") else "a list whose length is"


def _is_whole(bound: Any) -> bool:
    return isinstance(bound, int)  # pydantic gives a bound in the type that it checks


def _choices(detail: ErrorDetails) -> list[str]:
    return re.findall(r"'((?:[^'\\]|\\.)*)'", str(detail.get("ctx", {}).get("expected", "")))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def dotted(path: KeyPath) -> str:
    """Return ``("weights", "rul", 0)`` as ``weights.rul[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def number(value: float) -> str:
    """Return a bound as a person writes it: ``1``, not ``1.0``."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"


def describe_range(metadata: Iterable[Any]) -> str:
    """Return the bounds in a field's metadata as words, such as ``at least 0 and below 1``, or ""."""
    bounds = {
        key: bound
        for item in metadata
        for key in ("gt", "ge", "lt", "le")
        if (bound := getattr(item, key, None)) is not None
    }
    if bounds.keys() == {"ge", "le"}:
        return f"from {number(bounds['ge'])} to {number(bounds['le'])}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(f"{words[key]} {number(bound)}" for key, bound in bounds.items())


def show(value: Any) -> str:
    """Return a value as it would stand in a sentence.

    >>> show("0.9"), show(True), show([1, 2])
    ("the text '0.9'", 'true', 'the list [1, 2]')
    """
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"the list {_short(value)}"
    if isinstance(value, Mapping):
        return f"the table {_short(value)}"
    return str(value)


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"
