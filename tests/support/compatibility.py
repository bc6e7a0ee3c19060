"""Method × situation, from what the tests found: a pytest plugin that writes docs/compatibility.md and keeps it true.

A test that runs for every method and carries ``@pytest.mark.situation("fused AdamW")`` is one column of the page.

    pytest -m situation --compatibility=docs/compatibility.md    # write the page
    pytest                                                       # fails at its end if the page is out of date

A run in which some method or situation was not tested (-k, --lf, one file) says nothing about the page. Results that
need a GPU are kept beside it, in compatibility-cuda.json, by a run that has one; other machines show those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

GROUPS = {
    "Training loop": (
        "AdamW",
        "fused AdamW",
        "gradient clipping",
        "gradient accumulation",
        "features",
        "exact resume",
    ),
    "Model": (
        "recurrent trunk",
        "batch norm",
        "checkpointing",
        "compiled trunk",
        "compiled model",
        "frozen and unused",
        "heads share parameters",
        "parameter hooks",
    ),
    "Precision": (
        "bf16 autocast",
        "fp16 + GradScaler",
        "loss scale 1e-6 … 1e6",
        "fp16 overflow",
        "bf16 parameters",
    ),
    "Ranks": (
        "N ranks = 1",
        "features, N ranks",
        "sync='norms'",
        "task absent on a rank",
        "no task on a rank",
        "hooks, N ranks",
        "NaN on one rank",
        "FSDP2, features",
        "FSDP2, parameters",
    ),
    "Robustness": (
        "NaN or Inf loss",
        "NaN gradient",
        "NaN in the first step",
        "absent for 1,000 steps",
        "all losses zero",
        "loss without a graph",
        "one task",
        "one zero gradient",
        "equal gradients",
    ),
}
CUDA = ("equals the CPU", "bf16, CUDA", "fp16, CUDA", "overflow, CUDA", "cuDNN LSTM", "no host sync")
NEEDS_CUDA = "needs a CUDA device"
PAGE = Path("docs/compatibility.md")
HOW = "pytest -m situation --compatibility=docs/compatibility.md"

_METHOD = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)  # at the head of a row

Cells = dict[tuple[str, str], "Cell"]


@dataclass
class Cell:
    """What the tests of one method in one situation found."""

    failed: bool = False
    passed: bool = False
    refused: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def mark(self) -> str:
        """The sign in the table: failed, refused with an error that helps, passed, or not applicable."""
        if self.failed:
            return "✗"
        if self.refused:
            return "raises"
        return "✓" if self.passed else "—"

    def note(self, text: str) -> None:
        """Remember a footnote, once."""
        if text and text not in self.notes:
            self.notes.append(text)


def page(cells: Cells, cuda: Mapping[str, Any] | None) -> str:
    """Return the page for these results, and for the GPU results that were kept."""
    notes: list[str] = []
    methods = sorted({method for method, _ in cells})
    parts = [_INTRODUCTION]
    for group, situations in GROUPS.items():
        parts += [f"## {group}\n", _table(methods, situations, cells, notes)]
    kept = {
        (method, name): Cell(**cell)
        for method, row in (cuda or {}).get("cells", {}).items()
        for name, cell in row.items()
    }
    parts.append("## CUDA\n")
    if cuda:
        parts.append(f"Run on {cuda['device']}, torch {cuda['torch']}.\n")
        parts.append(_table(methods, CUDA, kept, notes))
    else:
        parts.append(f"Not run yet on a machine with a GPU: {', '.join(CUDA)}.\n")
    parts += ["## Notes\n", "\n".join(f"{number}. {text}." for number, text in enumerate(notes, 1)) + "\n"]
    return "\n".join(parts)


_INTRODUCTION = f"""# Compatibility

What works with what, by the tests: ✓ every test of the method in this situation passed; *raises* the method refuses it
with an error that says what to do instead; — it does not apply; ✗ a test failed; *not run* needs a machine that was
not at hand. Numbers point to the notes at the end. In loops, parameters after several steps are compared with a plain
float64 loop that sums the method's gradients by hand; over ranks, real processes are compared with a single one.

This page is written from the results of the tests, never by hand, and the test suite fails when it is out of date:

    {HOW}
"""


def _table(methods: list[str], situations: tuple[str, ...], cells: Cells, notes: list[str]) -> str:
    lines = ["| method | " + " | ".join(situations) + " |", "|---|" + ":-:|" * len(situations)]
    for method in methods:
        row = [_shown(cells.get((method, name)), notes) for name in situations]
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None, notes: list[str]) -> str:
    if cell is None:
        return "not run"
    own = sorted(cell.notes)  # reports of several processes come in any order
    notes += [text for text in own if text not in notes]
    numbers = ",".join(str(notes.index(text) + 1) for text in own)
    return f"{cell.mark}<sup>{numbers}</sup>" if numbers else cell.mark


# ------------------------------------------------------------------ pytest
@pytest.fixture
def footnote(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Give the tick of this method in this situation a footnote."""
    return lambda text: request.node.user_properties.append(("footnote", text))


@pytest.fixture
def refuses(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say that what this test saw is a refusal, and what to do instead."""
    return lambda text: request.node.user_properties.append(("refuses", text))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--compatibility``."""
    parser.addoption(
        "--compatibility",
        metavar="PAGE",
        help="write what works with what to this page, from the tests' results",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Gather results where all reports arrive: in the only process, or in the one that leads the others."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Gatherer(config), "compatibility-gatherer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let reports carry method and situations, from whatever process they come."""
    known = {name for names in (*GROUPS.values(), CUDA) for name in names}
    for item in items:
        marks = list(item.iter_markers("situation"))
        names = [mark.args[0] for mark in marks]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise pytest.UsageError(
                f"{item.nodeid}: no column for situation {unknown[0]!r} in {__name__}.GROUPS"
            )
        if names:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            method = marks[0].kwargs.get("method", parameters.get("method"))
            if method is None:
                raise pytest.UsageError(
                    f"{item.nodeid}: a situation needs a method: an argument, or method= of the mark"
                )
            item.user_properties.extend([("method", method), *(("situation", name) for name in names)])


class Gatherer:
    """Gathers what the tests found, and writes or checks the page at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.cells: Cells = {}
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one result: of the call, or of a setup or teardown that did not pass."""
        if report.when != "call" and report.passed:
            return
        method = next((value for key, value in report.user_properties if key == "method"), None)
        for key, name in report.user_properties:
            if key != "situation":
                continue
            reason = str(report.longrepr[2]).removeprefix("Skipped: ") if _is_skip(report) else ""  # type: ignore[index]
            if reason == NEEDS_CUDA:
                continue
            cell = self.cells.setdefault((str(method), str(name)), Cell())
            cell.failed |= report.failed
            cell.passed |= report.passed
            cell.note(reason)
            for kind, text in report.user_properties:
                if report.passed and kind in ("footnote", "refuses"):
                    cell.refused |= kind == "refuses"
                    cell.note(str(text))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the page if asked to; else see whether it is up to date, if everything it shows was tested."""
        target = self.config.getoption("--compatibility")
        here = {key: cell for key, cell in self.cells.items() if key[1] not in CUDA}
        missing = list(self._missing(here))
        if target:
            self._write(Path(target), here, missing)
            return
        path = self.config.rootpath / PAGE
        shown = path.read_text(encoding="utf-8") if path.exists() else ""
        tested = {method for method, _ in here}
        partly = missing or not tested or not tested >= set(_METHOD.findall(shown))
        if partly and not self._is_whole_run(session):
            return
        if missing:
            method, name = missing[0]
            self._fail(session, f"no test says how {method} fares in the situation {name!r}")
        elif shown != page(here, _kept(path)):
            self._fail(session, f"{PAGE} does not show what the tests found; write it anew: {HOW}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was written, or what is wrong."""
        for line in self.lines:
            terminalreporter.write_line(line, bold=True)

    def _missing(self, cells: Cells) -> Iterator[tuple[str, str]]:
        methods = {method for method, _ in self.cells} or {"any method"}
        names = [name for group in GROUPS.values() for name in group]
        return ((method, name) for method in sorted(methods) for name in names if (method, name) not in cells)

    def _is_whole_run(self, session: pytest.Session) -> bool:
        option = self.config.option
        narrowed = (
            option.keyword
            or option.markexpr
            or getattr(option, "lf", False)
            or getattr(option, "deselect", None)
        )
        stopped = session.shouldstop or session.shouldfail or option.collectonly
        return self.config.args_source is pytest.Config.ArgsSource.TESTPATHS and not (narrowed or stopped)

    def _write(self, path: Path, cells: Cells, missing: list[tuple[str, str]]) -> None:
        on_gpu: dict[str, dict[str, dict[str, Any]]] = {}
        for (method, name), cell in self.cells.items():
            if name in CUDA:
                on_gpu.setdefault(method, {})[name] = vars(cell)
        if on_gpu:
            import torch

            record = {
                "device": torch.cuda.get_device_name(),
                "torch": str(torch.__version__),
                "cells": on_gpu,
            }
            _beside(path).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            self.lines.append(f"wrote {_beside(path)}")
        if missing or self.config.option.keyword:
            what = (
                f"{len(missing)} results are missing, such as {missing[0]}"
                if missing
                else "-k leaves some out"
            )
            self.lines.append(f"did not write {path}: {what}")
            return
        path.write_text(page(cells, _kept(path)), encoding="utf-8")
        self.lines.append(f"wrote {path}")

    def _fail(self, session: pytest.Session, text: str) -> None:
        self.lines.append(f"error: {text}")
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_skip(report: pytest.TestReport) -> bool:
    return report.skipped and isinstance(report.longrepr, tuple)


def _beside(path: Path) -> Path:
    return path.with_name(path.stem + "-cuda.json")


def _kept(path: Path) -> dict[str, Any] | None:
    beside = _beside(path)
    return json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else None
