"""One rank of ``test_ranks.py``: several runs in one process group, each as ``mtlbalance run`` would do it."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from mtlbalance.config import RunConfig, load_config
from mtlbalance.errors import MtlBalanceError
from mtlbalance.training import run_training


@contextmanager
def terminated_after(steps: int | None) -> Iterator[None]:
    """Send this process SIGTERM after so many optimizer steps."""
    done = itertools.count(1)

    def count(*_: Any) -> None:
        if next(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()


def run_and_note(config: RunConfig, out: Path, rank: int) -> None:
    """Run, and leave the error there is, if any, beside the folder."""
    try:
        run_training(config, out=out, quiet=True)
    except MtlBalanceError as error:
        text = f"{error.exit_code} {type(error).__name__} {error}"
        out.with_name(f"{out.name}.rank{rank}").write_text(text)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for name, overrides in json.loads((folder / "runs.json").read_text()).items():
        config = load_config(folder / "trial.toml", overrides)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name.startswith("stopped"):  # by a signal to the last rank alone
                with terminated_after(2 if rank == world - 1 else None), pytest.raises(SystemExit):
                    run_training(config, out=folder / name, quiet=True)
            if name.startswith("unreadable"):  # a sample of the third batch, on the last rank alone
                plugin = sys.modules["training_plugin"]
                plugin.reads.clear()
                plugin.unreadable_after = 2 + 8 + 8 + 2 if rank == world - 1 else None
                run_and_note(config, folder / name, rank)
                plugin.unreadable_after = None
                run_training(config, out=folder / name, quiet=True)
            else:
                run_and_note(config, folder / name, rank)
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
