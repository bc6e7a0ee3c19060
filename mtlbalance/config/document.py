"""A config file as read: its values with the command line's overrides applied, and the place of each."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtlbalance.config.locator import KeyPath, Spans, locate
from mtlbalance.config.problems import InvalidConfigError, LocatedProblem, Place

SLOTS = ("dataset", "backbone", "balancer")


@dataclass(frozen=True)
class Override:
    """A value that replaces one of a config.

    Args:
        keys: the dotted key, such as ``("balancer", "beta")``.
        value: what it becomes.
        place: where it was written.
        shown: how a notice names it, such as ``balancer.name=fixed``.
        folder: where relative paths in it start; the current folder, for the command line.
        key_place: where its key was written, if that is known apart.
    """

    keys: tuple[str, ...]
    value: Any
    place: Place
    shown: str
    folder: Path = Path()
    key_place: Place | None = None

    def at(self, which: Literal["key", "value"]) -> Place:
        """Return the place of the key or of the value."""
        return self.key_place if which == "key" and self.key_place else self.place


@dataclass
class Document:
    """The values of a config, and where each of them was written.

    Args:
        path: the file as the user named it.
        data: the values, overrides included.
        notices: what the user must know about how overrides were applied.
        problems: the overrides that could not be applied.
    """

    path: Path
    data: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    problems: list[LocatedProblem] = field(default_factory=list)
    _lines: list[str] = field(default_factory=list)
    _spans: Spans = field(default_factory=Spans)
    _overrides: dict[KeyPath, Override] = field(default_factory=dict)

    def place(self, path: KeyPath, at: Literal["key", "value"] = "value") -> Place:
        """Return where ``path`` was written; of what is not in the file, the nearest table around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._overrides:
                return self._overrides[path[:end]].at(at if end == len(path) else "value")
        for known, override in self._overrides.items():
            if known[: len(path)] == path and path not in self._spans.keys:
                return override.at("key")
        spans = self._spans
        span = spans.keys.get(path) if at == "key" else spans.values.get(path)
        for end in range(len(path), 0, -1):
            span = span or spans.values.get(path[:end]) or spans.keys.get(path[:end])
        if span is None:
            return Place(str(self.path))
        return Place(str(self.path), span.line, span.column, span.length, self._lines[span.line - 1])

    def table_place(self, table: str) -> Place:
        """Return the place of a whole section: its name on the command line, or its header."""
        if (table, "name") in self._overrides:
            return self.place((table, "name"))
        return self.place((table,), "key")

    def override(self, path: KeyPath) -> Override | None:
        """Return the override that set the value at ``path``, or None where the file did."""
        return next(
            (self._overrides[path[:end]] for end in range(1, len(path) + 1) if path[:end] in self._overrides),
            None,
        )

    def apply(self, overrides: Sequence[str | Override]) -> None:
        """Apply overrides, ``key=value`` or parsed; names of plugins first, since they decide what else is kept.

        A slot whose plugin is replaced by an override loses the file's options for the old plugin.
        """
        parsed = [item for override in overrides if (item := self._parse(override)) is not None]
        parsed.sort(key=lambda item: not _names_a_plugin(item.keys))  # stable
        for item in parsed:
            if _names_a_plugin(item.keys):
                self._drop_options(item)
            self._set(item)

    def _parse(self, override: str | Override) -> Override | None:
        if isinstance(override, Override):
            return override
        keys = parse_override(override)
        place = Place(f"command line: {override}")
        if keys is None:
            self.problems.append(
                LocatedProblem(
                    f"{override!r} is not an override", place, "write key=value, such as training.epochs=5"
                )
            )
            return None
        return Override(keys, parse_value(override.partition("=")[2]), place, override)

    def _drop_options(self, override: Override) -> None:
        slot = override.keys[0]
        section = self.data.get(slot)
        if not isinstance(section, dict) or section.get("name") in (override.value, None):
            return
        dropped = [key for key in section if key != "name"]
        if dropped:
            self.notices.append(
                f"{override.shown} replaces {section['name']!r}: its options in {self.path} "
                f"are left out ({', '.join(dropped)})"
            )
        self.data[slot] = {}

    def _set(self, override: Override) -> None:
        keys = override.keys
        *parents, last = keys
        table = self.data
        for depth, key in enumerate(parents):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                self.problems.append(
                    LocatedProblem(
                        f"{'.'.join(keys[: depth + 1])!r} is not a table, so it has no "
                        f"{'.'.join(keys[depth + 1 :])!r}",
                        override.place,
                    )
                )
                return
        table[last] = override.value
        for known in [known for known in self._overrides if known[: len(keys)] == keys]:
            del self._overrides[known]
        self._overrides[keys] = override


def read_document(path: Path) -> Document:
    """Read a TOML file.

    Raises:
        InvalidConfigError: it cannot be read, or is not TOML; with line and column where there is one.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _whole_file(path, "there is no such config file") from None
    except IsADirectoryError:
        raise _whole_file(path, "this is a folder, not a config file") from None
    except OSError as error:
        raise _whole_file(path, f"cannot read the file: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _whole_file(
            path, f"line {line} is not UTF-8 text (byte 0x{raw[error.start]:02x})", "save the file as UTF-8"
        ) from None
    lines = text.split("\n")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfigError([_syntax_problem(path, lines, str(error))]) from None
    return Document(path, data, _lines=lines, _spans=locate(text))


def parse_override(text: str) -> tuple[str, ...] | None:
    """Return the keys that ``key=value`` sets, or None if that is not what the text is.

    >>> parse_override("balancer.beta=0.9")
    ('balancer', 'beta')
    """
    key, equals, _ = text.partition("=")
    return _parse_key(key) if equals else None


def parse_value(text: str) -> Any:
    """Return an override's value: TOML where it is TOML, else the text itself.

    >>> parse_value("0.9"), parse_value("[1, 2]"), parse_value("FD001")
    (0.9, [1, 2], 'FD001')
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _parse_key(text: str) -> tuple[str, ...] | None:
    try:
        table: Any = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return None
    keys: list[str] = []
    while isinstance(table, dict):
        if len(table) != 1:
            return None
        [(key, table)] = table.items()
        keys.append(key)
    return tuple(keys)


def _names_a_plugin(keys: KeyPath) -> bool:
    return len(keys) == 2 and keys[0] in (*SLOTS, "engine") and keys[1] == "name"


def _whole_file(path: Path, message: str, advice: str = "") -> InvalidConfigError:
    return InvalidConfigError([LocatedProblem(message, Place(str(path)), advice)])


def _syntax_problem(path: Path, lines: list[str], message: str) -> LocatedProblem:
    found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    what = message[: found.start()] if found else message
    if found and found[1]:
        line, column = int(found[1]), int(found[2])
    else:
        line = max((n for n, text in enumerate(lines, 1) if text.strip()), default=1)
        column = len(lines[line - 1]) + 1
    text, length = lines[line - 1], 1
    if column > len(text) and text.strip():  # past the end of the line: the whole statement is meant
        column, length = len(text) - len(text.lstrip()) + 1, len(text.strip())
    advice = {
        "Invalid value": "text needs quotes; true and false are written in lower case",
        "Cannot overwrite a value": "this key is already set above",
    }.get(what, "")
    return LocatedProblem(f"not valid TOML: {what}", Place(str(path), line, column, length, text), advice)
