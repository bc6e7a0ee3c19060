"""The page of what works with what shows what the tests found, and a run notices when it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import compatibility
import pytest

SUITE = """
import pytest
from compatibility import CUDA, GROUPS, NEEDS_CUDA

NAMES = [name for group in GROUPS.values() for name in group]


@pytest.mark.parametrize("method", ["good", "odd"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.situation(name)) for name in NAMES])
def test_one(method, name, footnote, refuses):
    assert (method, name) != ("odd", BROKEN)
    if name == "features":
        footnote("only on Sundays")
    if (method, name) == ("odd", "checkpointing"):
        refuses("use another")
    if (method, name) == ("good", "one task"):
        pytest.skip("has no single task")


@pytest.mark.skip(reason=NEEDS_CUDA)
@pytest.mark.parametrize("method", ["good", "odd"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.situation(name)) for name in CUDA])
def test_cuda(method, name):
    raise AssertionError
"""


@pytest.fixture
def suite(tmp_path):
    """A suite of two methods in every situation; returns how to run it with options."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["compatibility"]\n')
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["test_suite.py"]\nmarkers = ["situation(name)"]\n'
    )
    environment = os.environ | {"PYTHONPATH": str(Path(compatibility.__file__).parent), "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)

    def run(*options: str, broken: str = "", suite: str = SUITE) -> tuple[int, str]:
        (tmp_path / "test_suite.py").write_text(suite.replace("BROKEN", repr(broken)))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    run.page = tmp_path / "docs" / "compatibility.md"
    run.write = ("-m", "situation", f"--compatibility={run.page}")
    return run


def cell(page: str, method: str, situation: str) -> str:
    lines = page.splitlines()
    heading = next(line for line in lines if line.startswith("| method |") and f" {situation} " in line)
    column = [name.strip() for name in heading.split("|")].index(situation)
    row = next(line for line in lines[lines.index(heading) :] if line.startswith(f"| `{method}` |"))
    return row.split("|")[column].strip()


@pytest.mark.parametrize("processes", ["0", "2"])
def test_the_page_shows_what_the_tests_found(suite, processes):
    code, said = suite(*suite.write, "-n", processes, broken="fused AdamW")
    assert code == 1, said
    page = suite.page.read_text(encoding="utf-8")
    assert cell(page, "good", "fused AdamW") == "✓"
    assert cell(page, "odd", "fused AdamW") == "✗"
    assert cell(page, "odd", "features") == "✓<sup>1</sup>"
    assert "\n1. only on Sundays.\n" in page
    assert cell(page, "odd", "checkpointing").startswith("raises<sup>")
    assert cell(page, "good", "one task").startswith("—<sup>")
    assert "has no single task." in page
    assert "Not run yet on a machine with a GPU: equals the CPU, " in page


def test_a_whole_run_fails_if_the_page_is_out_of_date_and_others_do_not(suite):
    code, said = suite()
    assert code == 1
    assert "does not show what the tests found; write it anew: pytest -m situation --compatibility" in said
    assert suite(*suite.write)[0] == 0
    assert suite()[0] == 0
    suite.page.write_text(suite.page.read_text(encoding="utf-8").replace("✓", "✗", 1), encoding="utf-8")
    assert suite()[0] == 1
    assert suite("-k", "good")[0] == 0
    assert suite("--deselect", "test_suite.py::test_one[AdamW-odd]")[0] == 0


def test_a_situation_that_no_test_tries_is_named(suite):
    assert suite(*suite.write)[0] == 0
    smaller = SUITE.replace("in group]", 'in group if name != "batch norm"]')
    code, said = suite(suite=smaller)
    assert code == 1
    assert "no test says how good fares in the situation 'batch norm'" in said
    before = suite.page.read_text(encoding="utf-8")
    code, said = suite(*suite.write, suite=smaller)
    assert "did not write" in said
    assert "did not write" in suite(*suite.write, "-k", "good")[1]
    assert suite.page.read_text(encoding="utf-8") == before


def test_an_unknown_situation_is_an_error(suite):
    code, said = suite(suite=SUITE.replace("in NAMES]", 'in [*NAMES, "moonlight"]]'))
    assert code != 0
    assert "no column for situation 'moonlight'" in said


def test_results_from_a_gpu_are_kept_for_other_machines():
    cells = {("good", "AdamW"): compatibility.Cell(passed=True)}
    kept = {
        "device": "a GPU",
        "torch": "2.13",
        "cells": {"good": {"cuDNN LSTM": {"failed": False, "passed": True, "refused": False, "notes": []}}},
    }
    page = compatibility.page(cells, kept)
    assert cell(page, "good", "cuDNN LSTM") == "✓"
    assert cell(page, "good", "fp16, CUDA") == "not run"
    assert "Run on a GPU, torch 2.13." in page
