"""A problem of a config with its place, and the error that carries all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mtlbalance.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a problem is: in a file (``line`` and ``column`` from 1; 0: the file as a whole) or in an override.

    Args:
        source: the file as the user named it, or ``command line: key=value``.
        line: the line, or 0.
        column: the first character at fault.
        length: how many characters are at fault.
        text: that line of the file.
    """

    source: str
    line: int = 0
    column: int = 0
    length: int = 1
    text: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class LocatedProblem:
    """What is wrong, where, and what to do about it (or an empty ``help``)."""

    message: str
    place: Place
    help: str = ""

    def render(self) -> str:
        """Return the problem as a compiler would print it."""
        place = self.place
        lines = [f"error: {self.message}", f"  --> {place}"]
        if place.line:
            number = str(place.line)
            gutter = " " * len(number)
            # Tabs stay tabs, so that the carets stand under what they mean.
            indent = "".join("\t" if c == "\t" else " " for c in place.text[: place.column - 1])
            lines += [
                f"{gutter} |",
                f"{number} | {place.text}".rstrip(),
                f"{gutter} | {indent}{'^' * max(place.length, 1)}",
            ]
        if self.help:
            lines.append(f"help: {self.help}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the problem as JSON values."""
        return asdict(self)


class InvalidConfigError(ConfigError):
    """A config with problems: all of them, in the order of the file.

    Args:
        problems: at least one.
    """

    def __init__(self, problems: Sequence[LocatedProblem]) -> None:
        self.problems = list(problems)
        super().__init__("\n\n".join(problem.render() for problem in self.problems))
