from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from mtlbalance.config import RunConfig, load_config

PLUGIN = Path(__file__).parent / "training_plugin.py"
CONFIG = f"""
plugins = ["{PLUGIN}"]
[run]
name = "trial"
seed = 3
device = "cpu"
output_dir = "OUTPUT"
[dataset]
name = "pairs"
[backbone]
name = "net"
[balancer]
name = "gaba"
warmup_steps = 5
[training]
epochs = 6
batch_size = 16
lr = 0.02
warmup_epochs = 2
ema_decay = 0.8
"""

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def config_text() -> str:
    """The config of a small run; ``OUTPUT`` stands for its output folder."""
    return CONFIG


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Returns ``configure(*overrides) -> RunConfig`` of a small run below ``tmp_path``."""

    def make(*overrides: str) -> RunConfig:
        path = tmp_path / "trial.toml"
        path.write_text(CONFIG.replace("OUTPUT", str(tmp_path / "runs")))
        return load_config(path, overrides)

    return make


@pytest.fixture
def plugin(configure: Configure) -> Iterator[Any]:
    """The test plugin's module, its traces empty."""
    configure()
    module: Any = sys.modules["training_plugin"]
    module.trace.clear()
    module.reads.clear()
    yield module
    module.interrupt_after = None
    module.observer_fails_in = ""
    module.data_source, module.input_shift = "made-up", 0.0
    module.unreadable_after = module.damage_after = module.hangs_at = None
    module.unreadable_set, module.observer_draws, module.gives = "train", False, None
    module.signal_in.clear()


@pytest.fixture
def stop_after() -> Iterator[Callable[[int, int], None]]:
    """Returns ``stop_after(steps, signum)``: this process sends itself a signal after so many optimizer steps."""
    left: list[int] = []

    def count(*_: Any) -> None:
        if left and (left.__setitem__(0, left[0] - 1) or left[0] == 0):
            signum = left.pop()
            left.clear()
            os.kill(os.getpid(), signum)

    handle = register_optimizer_step_post_hook(count)
    yield lambda steps, signum: left.__setitem__(slice(None), [steps, signum])
    handle.remove()


@pytest.fixture
def read_csv() -> Callable[..., list[dict[str, str]]]:
    """Returns ``read_csv(path, drop=()) -> rows``."""

    def read(path: Path, drop: tuple[str, ...] = ()) -> list[dict[str, str]]:
        with path.open(newline="") as file:
            return [
                {key: value for key, value in row.items() if key not in drop} for row in csv.DictReader(file)
            ]

    return read


@pytest.fixture
def assert_same(read_csv: Callable[..., list[dict[str, str]]]) -> Callable[..., None]:
    """Returns ``assert_same(folder, other, drop=())``: two runs agree in all but how long things took."""

    def check(first: Path, second: Path, drop: tuple[str, ...] = ()) -> None:
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        assert (first / "gradient_stats.csv").read_bytes() == (second / "gradient_stats.csv").read_bytes()
        rows = [read_csv(folder / "metrics.csv", ("seconds",)) for folder in (first, second)]
        assert rows[0] == rows[1]
        results = [json.loads((folder / "results.json").read_text()) for folder in (first, second)]
        for found in results:
            for key in ("wall_seconds", *drop):
                del found[key]
        assert results[0] == results[1]

    return check
