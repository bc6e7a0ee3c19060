"""Where every key and value of a TOML text stands. ``tomllib`` reads the values; this only finds places."""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[^\s.=\[\]\"'#,{}]+")
_SCALAR = re.compile(r"[^,\]}\n#]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:""?)?|\'\'\'.*?\'\'\'(?:\'\'?)?|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}


@dataclass(frozen=True)
class Span:
    """A stretch of one line: ``line`` and ``column`` count from 1."""

    line: int
    column: int
    length: int


@dataclass
class Spans:
    """The spans of every key (a table's is its header) and of every value, by path."""

    keys: dict[KeyPath, Span] = field(default_factory=dict)
    values: dict[KeyPath, Span] = field(default_factory=dict)


def locate(text: str) -> Spans:
    """Return the spans in a valid TOML text; what a broken text hides is simply missing."""
    scanner = _Scanner(text)
    with contextlib.suppress(_LostError):
        scanner.document()
    return scanner.spans


class _LostError(Exception):
    """The text is not the TOML that the scanner expects."""


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.spans = Spans()
        self.array_lengths: dict[KeyPath, int] = {}  # of [[arrays of tables]] so far

    def document(self) -> None:
        table: KeyPath = ()
        while self.skip_space():
            if self.peek("["):
                table = self.header()
            else:
                self.pair(table)

    def header(self) -> KeyPath:
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        path: KeyPath = ()
        for name, start, end in self.key():
            path = (*path, name)
            self.spans.keys.setdefault(path, self.span(start, end))
            if path in self.array_lengths and not is_array:
                path = (*path, self.array_lengths[path] - 1)
        self.expect("]]" if is_array else "]")
        if is_array:
            count = self.array_lengths.get(path, 0)
            self.array_lengths[path] = count + 1
            path = (*path, count)
        return path

    def pair(self, table: KeyPath) -> None:
        path = table
        for name, start, end in self.key():
            path = (*path, name)
            self.spans.keys.setdefault(path, self.span(start, end))
        self.expect("=")
        self.value(path)

    def key(self) -> list[tuple[str, int, int]]:
        """Read a dotted key as (name, start, end) for each part."""
        parts = []
        while True:
            self.skip_space()
            start = self.at
            if quoted := _STRING.match(self.text, self.at):
                name = _unquote(quoted.group())
            elif bare := _BARE_KEY.match(self.text, self.at):
                name = bare.group()
            else:
                raise _LostError
            self.at = (quoted or bare).end()  # type: ignore[union-attr]
            parts.append((name, start, self.at))
            self.skip_space()
            if not self.peek("."):
                return parts
            self.at += 1

    def value(self, path: KeyPath) -> None:
        self.skip_space()
        start = self.at
        if self.peek("["):
            self.at += 1
            index = 0
            while self.skip_space() and not self.peek("]"):
                self.value((*path, index))
                index += 1
                self.skip_comma()
            self.expect("]")
        elif self.peek("{"):
            self.at += 1
            while self.skip_space() and not self.peek("}"):
                self.pair(path)
                self.skip_comma()
            self.expect("}")
        elif match := (_STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)):
            self.at = start + len(match.group().rstrip())
        else:
            raise _LostError
        self.spans.values[path] = self.span(start, self.at)

    def skip_space(self) -> bool:
        """Move past white space and comments; False at the end of the text."""
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.at < len(self.text)

    def skip_comma(self) -> None:
        self.skip_space()
        if self.peek(","):
            self.at += 1

    def peek(self, token: str) -> bool:
        return self.text.startswith(token, self.at)

    def expect(self, token: str) -> None:
        self.skip_space()
        if not self.peek(token):
            raise _LostError
        self.at += len(token)

    def span(self, start: int, end: int) -> Span:
        line = bisect_right(self.line_starts, start)
        newline = self.text.find("\n", start, end)
        return Span(line, start - self.line_starts[line - 1] + 1, (end if newline < 0 else newline) - start)


def _unquote(quoted: str) -> str:
    if quoted.startswith("'"):
        return quoted[1:-1]
    return _ESCAPE.sub(
        lambda match: chr(int(match[1][1:], 16)) if match[1][0] in "uU" else _ESCAPES.get(match[1], match[1]),
        quoted[1:-1],
    )
