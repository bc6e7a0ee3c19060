"""One rank of scaling.py: steps under DistributedDataParallel, and what the balancer sends to the other ranks.

    python benchmarks/rank_steps.py RANK WORLD FOLDER TASKS WIDTH BATCH_SIZE ROUNDS

Started by scaling.py once for each rank; rank r writes r.json into the folder.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import methods
import torch
import torch.distributed as dist
import workloads
from measuring import rounded, write_json
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from variants import UPDATE_EVERY, optimizer_of
from workloads import Losses, Workload

PLAIN = "plain sum"
WAYS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # a method with its options; at the features where it is named so
    PLAIN: ("", {}),
    "rlw": ("rlw", {}),
    "gaba": ("gaba", {}),
    "gaba, norms": ("gaba", {"sync": "norms"}),
    f"gaba, every {UPDATE_EVERY}th step": ("gaba", {"update_every": UPDATE_EVERY}),
    "gaba, features": ("gaba", {}),
    "pcgrad": ("pcgrad", {}),
}
STEPS = UPDATE_EVERY  # a round, so that each has one that measures


class WithLosses(nn.Module):
    """The model behind one call that gives losses, so that DistributedDataParallel sees the whole forward pass."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        self.trunk, self.heads, _ = workload.fresh_model()

    def forward(self, inputs: Tensor) -> tuple[Tensor, Losses]:
        """Return the features and the losses."""
        features = self.trunk(inputs)
        return features, self.workload.losses({task: head(features) for task, head in self.heads.items()})


class Sent:
    """Counts the bytes that are summed over ranks from Python; those of DistributedDataParallel are not."""

    def __init__(self) -> None:
        self.bytes = 0
        self.calls = 0
        self._all_reduce = dist.all_reduce

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Count and pass on."""
        self.bytes += tensor.numel() * tensor.element_size()
        self.calls += 1
        return self._all_reduce(tensor, *args, **kwargs)


def steps(workload: Workload, way: str) -> Iterator[None]:
    """Take steps as one rank."""
    method, options = WAYS[way]
    model = WithLosses(workload)
    parallel: nn.Module = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = optimizer_of(list(model.parameters()), "adamw")
    balancer = methods.make(method, workload.tasks, **options) if method else None
    shared = list(model.trunk.parameters())
    while True:
        optimizer.zero_grad()
        features, losses = parallel(workload.inputs)
        if balancer is None:
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        else:
            balancer(losses, shared_params=features if "features" in way else shared).backward()
        optimizer.step()
        yield


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Return each way's CPU and wall seconds of a step, and what it sends in a step."""
    running = {way: steps(workload, way) for way in WAYS}
    found: dict[str, Any] = {way: {"cpu": [], "wall": []} for way in WAYS}
    for way, taken in running.items():
        for _ in range(2):
            next(taken)
        sent = Sent()
        with patch.object(dist, "all_reduce", sent.all_reduce):
            for _ in range(STEPS):
                next(taken)
        found[way] |= {"bytes_per_step": sent.bytes / STEPS, "calls_per_step": sent.calls / STEPS}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for way, taken in running.items():  # in the same order on every rank
            if dist.is_initialized():
                dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(STEPS):
                next(taken)
            found[way]["cpu"].append((time.process_time() - cpu) / STEPS)
            found[way]["wall"].append((time.perf_counter() - wall) / STEPS)
    for times in found.values():
        times |= {"cpu": rounded(times["cpu"]), "wall": rounded(times["wall"])}
    return found


def main(argv: list[str]) -> None:
    """Measure as one rank."""
    rank, world, folder = int(argv[0]), int(argv[1]), Path(argv[2])
    tasks_count, width, batch_size, rounds = map(int, argv[3:])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = workloads.mlp(tasks_count, width=width, batch_size=batch_size)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    found = measure(workload, rounds)
    write_json(folder / f"{rank}.json", {"trunk_numbers": workload.trunk_numbers, "ways": found})
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
