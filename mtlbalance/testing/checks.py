"""Named checks: what each promises, what it found, and the one error that lists what was not kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from mtlbalance.errors import NonFiniteWarning, PluginError, did_you_mean
from mtlbalance.testing.expectations import where
from mtlbalance.testing.generators import kept_generators

S = TypeVar("S")
Status = Literal["kept", "broken", "not applicable"]
Applies = Callable[[S], str]  # returns why a check does not apply, or an empty string


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    Args:
        check: its name.
        promise: what it holds the plugin to.
        status: ``"kept"``, ``"broken"`` or ``"not applicable"``.
        finding: what was expected and what was found, or why the check does not apply.
        error: what was raised, if anything was.
    """

    check: str
    promise: str
    status: Status
    finding: str = ""
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.check}\n  promised: {self.promise}\n  but: {_indent(self.finding)}"


class ConformanceError(AssertionError):
    """A plugin breaks promises; ``report`` has them all."""

    def __init__(self, report: Report) -> None:
        self.report = report
        broken = report.broken
        heading = f"{report.subject} breaks {len(broken)} of {report.applied} checks"
        super().__init__("\n\n".join([f"{heading}:", *(str(outcome) for outcome in broken)]))


@dataclass(frozen=True)
class Report:
    """What the checks found of one plugin, in their order."""

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def broken(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "broken")

    @property
    def applied(self) -> int:
        """The number of checks that apply to this plugin."""
        return sum(outcome.status != "not applicable" for outcome in self.outcomes)

    def raise_if_broken(self) -> Report:
        """Return the report, or raise ``ConformanceError`` if a check failed."""
        if self.broken:
            raise ConformanceError(self) from self.broken[0].error
        return self


@dataclass(frozen=True)
class Check(Generic[S]):
    """One promise, and the function that tries to break it.

    Args:
        name: the function's name.
        promise: the first paragraph of its docstring.
        run: raises ``AssertionError`` if the promise is not kept.
        applies: returns why the check does not apply to a subject, or an empty string.
        first: nothing else can be examined where it is broken.
    """

    name: str
    promise: str
    run: Callable[[S], None]
    applies: Applies[S]
    first: bool = False

    def examine(self, subject: S) -> Outcome:
        """Run the check from a fixed seed, and leave no trace in the process's random generators."""
        with kept_generators(seed=0), warnings.catch_warnings():
            warnings.simplefilter("error", NonFiniteWarning)
            try:
                reason = self.applies(subject)
                if reason:
                    return Outcome(self.name, self.promise, "not applicable", reason)
                self.run(subject)
            except AssertionError as error:
                return Outcome(self.name, self.promise, "broken", str(error) or where(error), error)
            except Exception as error:
                place = (
                    "" if isinstance(error, PluginError) else f" ({where(error)})"
                )  # its text has the place
                finding = f"it raised {type(error).__name__}: {error}{place}"
                return Outcome(self.name, self.promise, "broken", finding, error)
        return Outcome(self.name, self.promise, "kept")


class Checks(Generic[S]):
    """Checks in the order in which they were added, after those of other lists."""

    def __init__(self, *others: Checks[S]) -> None:
        self._checks = {check.name: check for other in others for check in other}

    def add(
        self, applies: Applies[S] | None = None, *, first: bool = False
    ) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
        """Decorate a check: a function of the subject whose docstring's first paragraph is the promise."""

        def register(function: Callable[[S], None]) -> Callable[[S], None]:
            promise = " ".join((function.__doc__ or "").split("\n\n")[0].split())
            assert promise, f"{function.__name__} does not say what it promises"
            assert function.__name__ not in self._checks, f"{function.__name__} exists twice"
            self._checks[function.__name__] = Check(
                function.__name__, promise, function, applies or _always, first
            )
            return function

        return register

    def __iter__(self) -> Iterator[Check[S]]:
        return iter(self._checks.values())

    def __len__(self) -> int:
        return len(self._checks)

    def chosen(self, only: Collection[str] | None, skip: Collection[str]) -> list[Check[S]]:
        """Return the checks to run.

        Raises:
            ValueError: a name is none of the checks.
        """
        for name in (*(only or ()), *skip):
            if name not in self._checks:
                raise ValueError(f"there is no check {name!r}{did_you_mean(name, self._checks)}")
        return [
            check
            for check in self
            if check.first or ((only is None or check.name in only) and check.name not in skip)
        ]

    def examine(
        self, subject: S, *, only: Collection[str] | None = None, skip: Collection[str] = ()
    ) -> Iterator[Outcome]:
        """Run the checks one by one; those marked as first run whatever is chosen, and end it where they are broken."""
        for check in self.chosen(only, skip):
            outcome = check.examine(subject)
            yield outcome
            if check.first and outcome.status == "broken":
                return


def _always(_: Any) -> str:
    return ""


def _indent(text: str) -> str:
    return text.replace("\n", "\n       ")
