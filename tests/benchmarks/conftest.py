"""The scripts in benchmarks/ are imported as they import each other: by their bare names."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports one of the scripts, or of the modules that they share."""
    modules, path, threads = set(sys.modules), list(sys.path), torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - modules:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
    sys.path[:] = path
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.fixture
def figures(script: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a script with a command line and gives the content of the JSON that it writes."""

    def run(name: str, *argv: str) -> dict[str, Any]:
        out = tmp_path / f"{name}.json"
        script(name).main([*argv, "--out", str(out)])
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run
