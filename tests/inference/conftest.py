from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtlbalance import load_run
from mtlbalance.config import load_config
from mtlbalance.inference import LoadedRun
from mtlbalance.training import run_training

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "training" / "training_plugin.py"
CONFIG = f"""
plugins = ["{PLUGIN}"]
run = {{ name = "trial", seed = 3, device = "cpu" }}
dataset.name = "pairs"
backbone.name = "net"
balancer = {{ name = "gaba", warmup_steps = 5 }}
training = {{ epochs = 4, batch_size = 16, lr = 0.02, warmup_epochs = 1, ema_decay = 0.8 }}
"""

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Returns ``train(*overrides, text=CONFIG) -> folder``: each run is trained once and must not be changed."""
    trained: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str, text: str = CONFIG) -> Path:
        key = (text, *overrides)
        if key not in trained:
            folder = tmp_path_factory.mktemp("run")
            config = folder / "config.toml"
            config.write_text(text)
            run_training(load_config(config, overrides), out=folder / "run", quiet=True)
            trained[key] = folder / "run"
        return trained[key]

    return run


@pytest.fixture
def folder(train: Train) -> Path:
    """A run with a regression and a classification; not to be changed."""
    return train()


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of ``folder`` that may be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture
def loaded(folder: Path) -> LoadedRun:
    return load_run(folder)


@pytest.fixture
def plugin(folder: Path) -> Any:
    """The test plugin's module, which decides what data there is."""
    module: Any = sys.modules["training_plugin"]
    yield module
    module.data_source, module.input_shift = "made-up", 0.0
