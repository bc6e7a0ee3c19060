"""What an import costs: a balancer needs torch alone, and the command line answers without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ["pandas", "pluggy", "pydantic", "typer", "rich", "torchmetrics", "safetensors", "filelock"]


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages in ``sys.modules`` of a fresh interpreter after the statement."""
    program = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_a_balancer_needs_torch_alone() -> None:
    by_torch = loaded_by("import torch")
    by_us = loaded_by("from mtlbalance import GABALoss")
    assert "torch" in by_us
    assert not by_us & set(HEAVY) - by_torch


@pytest.mark.parametrize(
    "module",
    [
        "mtlbalance",
        "mtlbalance.slots",
        "mtlbalance.plugins",
        "mtlbalance.config.sections",
        "mtlbalance.sweeps",
    ],
)
def test_the_shared_ground_leaves_torch_out(module: str) -> None:
    assert "torch" not in loaded_by(f"import {module}")


def test_the_command_line_starts_without_torch() -> None:
    loaded = loaded_by("import mtlbalance.cli.app")
    assert "typer" in loaded
    assert "torch" not in loaded
    assert "pandas" not in loaded
