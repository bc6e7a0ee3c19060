"""How the tests of the examples load and start them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a file that is loaded by path can be found again by its classes
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe() -> Callable[[str], ModuleType]:
    """Load a recipe by its name."""
    return load_recipe


@pytest.fixture
def run_recipe(tmp_path: Path) -> Callable[..., str]:
    """Start a recipe in one process, or in several under torchrun, and return what it printed."""

    def run(name: str, *arguments: str, processes: int = 1, warnings: str = "error") -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [
                sys.executable,
                *(["-W", warnings] if processes == 1 else launcher),
                str(RECIPES / f"{name}.py"),
                *arguments,
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
