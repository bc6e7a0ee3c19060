"""Samples a second: one thing after another changed, each gain kept apart; and several processes at once.

The ladder: a DataLoader, batches that lie on the device, fused AdamW, TF32 (in matrix products; cuDNN has it by
default), bfloat16 autocast, the whole step as a CUDA graph (`GraphedStep`). Every rung keeps those before it. Methods
are measured side by side on each rung, in interleaved rounds, so that balancing can be told from the rest.

    python benchmarks/throughput.py --device cuda --out runs/throughput.json
    python benchmarks/throughput.py --device cuda --only ladder --model mlp --tasks 8
    python benchmarks/throughput.py --device cuda --only packed --processes 1 2 4 8

Packed: so many processes share the GPU, each training a model of its own on the top rung.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods
import torch
import workloads
from measuring import begin, markdown_header, markdown_row, paired_ratio, rounded, write_json
from rounds import Entry, Rounds, clock_of, measure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from workloads import Workload

from mtlbalance import GraphedStep

METHODS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "gaba": {},
    "gaba, every 10th step": {"update_every": 10},
    "gaba, batched": {"delivery": "batched"},  # on CUDA no recurrent layer has a rule for it, so it may fail
}
LEARNING_RATE = 1e-4
STEPS_BEFORE_REPLAYS = 45  # a graph is captured at the fourth call of its phase, here the fourth measured one

Batch = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Rung:
    """A way to train, and what it needs.

    Args:
        name: what it changes.
        on_device, fused, tf32, bf16, graph: what is done on it.
    """

    name: str
    on_device: bool = False
    fused: bool = False
    tf32: bool = False
    bf16: bool = False
    graph: bool = False

    @property
    def needs_cuda(self) -> bool:
        """Whether a CPU cannot do it."""
        return self.tf32 or self.graph


RUNGS = (
    Rung("DataLoader"),
    Rung("batches on the device", on_device=True),
    Rung("fused AdamW", on_device=True, fused=True),
    Rung("TF32", on_device=True, fused=True, tf32=True),
    Rung("bfloat16", on_device=True, fused=True, tf32=True, bf16=True),
    Rung("CUDA graph", on_device=True, fused=True, tf32=True, bf16=True, graph=True),
)


def samples_of(settings: argparse.Namespace) -> Workload:
    """Return the model, and a training set in the place of its batch."""
    if settings.model == "mlp":
        return workloads.mlp(settings.tasks, width=settings.hidden_size, batch_size=settings.samples)
    return workloads.study(hidden_size=settings.hidden_size, batch_size=settings.samples)


class Samples(Dataset[Batch]):
    """The samples of a workload, one by one."""

    def __init__(self, workload: Workload) -> None:
        self.inputs, self.targets = workload.inputs, workload.targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], {task: target[index] for task, target in self.targets.items()}


def loaded(workload: Workload, batch_size: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Yield shuffled batches from a DataLoader for ever."""
    loader = DataLoader(
        Samples(workload),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for inputs, targets in loader:
            there = {task: target.to(device, non_blocking=True) for task, target in targets.items()}
            yield inputs.to(device, non_blocking=True), there


def indexed(workload: Workload, batch_size: int) -> Iterator[Batch]:
    """Yield shuffled batches of what lies on the device for ever."""
    count = len(workload.inputs)
    while True:
        order = torch.randperm(count, device=workload.inputs.device)
        for index in torch.split(order[: count - count % batch_size], batch_size):
            targets = {task: target.index_select(0, index) for task, target in workload.targets.items()}
            yield workload.inputs.index_select(0, index), targets


def training_steps(
    samples: Workload, method: str, rung: Rung, batch_size: int, workers: int, device: torch.device
) -> Iterator[None]:
    """Yield after every training step on ``rung``, for ever; the first one comes when no graph is left to capture."""
    there = samples.to(device)
    batches = indexed(there, batch_size) if rung.on_device else loaded(samples, batch_size, workers, device)
    trunk, heads, model = there.fresh_model()
    balancer = methods.make(method.split(",")[0], samples.tasks, **METHODS[method]).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, fused=rung.fused or None, capturable=rung.graph
    )
    shared = list(trunk.parameters())

    def step(inputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=rung.bf16):
            features = trunk(inputs)
            losses = {
                task: criterion(heads[task](features), targets[task])
                for task, criterion in samples.criteria.items()
            }
        loss: Tensor = balancer(losses, shared_params=shared)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    graphed = GraphedStep(step, balancer, optimizer, device=device) if rung.graph else None
    for count, batch in enumerate(batches):
        torch.backends.cuda.matmul.allow_tf32 = rung.tf32
        if graphed is None:
            optimizer.zero_grad()
            step(*batch)
        else:
            graphed(*batch)
        if graphed is None or count >= STEPS_BEFORE_REPLAYS:
            yield


def ladder(
    samples: Workload,
    rungs: Sequence[Rung],
    batch_size: int,
    workers: int,
    rounds: Rounds,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return a row for each method on each rung: samples a second, and the gain over the rung before."""
    entries = {
        f"{method}: {rung.name}": Entry(
            training_steps(samples, method, rung, batch_size, workers, device),
            10 if "10th" in method else 1,
            may_fail=rung.graph or "batched" in method,
        )
        for rung in rungs
        for method in METHODS
    }
    measure(entries, next(iter(entries)), rounds, clock_of(device))
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        before: list[float] = []
        for rung in rungs:
            entry = entries[f"{method}: {rung.name}"]
            if entry.failure:
                rows.append({"method": method, "rung": rung.name, "failure": entry.failure})
                continue
            seconds = entry.seconds
            plain = entries[f"fixed: {rung.name}"].seconds
            row = {
                "method": method,
                "rung": rung.name,
                "samples_per_second": round(batch_size / float(torch.tensor(seconds).median())),
                "to_fixed": paired_ratio(seconds, plain) if plain else None,
                "seconds_per_step": rounded(seconds),
            }
            if before:
                row["gain"] = paired_ratio(before, seconds)
            rows.append(row)
            before = seconds
    return rows


_BARRIERS: list[Any] = []  # of a process that trains beside others, as it was started with


def _note_barrier(barrier: Any) -> None:
    _BARRIERS.append(barrier)


def train_for(settings: argparse.Namespace, rung: Rung) -> float:
    """In a process of its own: train for some seconds, while others do; return the steps a second."""
    (barrier,) = _BARRIERS
    try:
        torch.set_num_threads(1)
        samples = samples_of(settings)
        steps = training_steps(samples, "gaba", rung, settings.batch_size, 0, settings.device)
        clock = clock_of(settings.device) if settings.device.type == "cuda" else time.perf_counter
        for _ in range(3):
            next(steps)
        clock()
        barrier.wait()
        start, count = clock(), 0
        while (now := clock()) < start + settings.packed_seconds:
            for _ in range(10):
                next(steps)
            count += 10
        return count / (now - start)
    except BaseException:
        barrier.abort()  # the others must not wait for this one
        raise


def packed(settings: argparse.Namespace, rung: Rung, count: int) -> dict[str, Any]:
    """Return the samples a second of so many processes together."""
    spawn = multiprocessing.get_context("spawn")
    share = (_note_barrier, (spawn.Barrier(count, timeout=240),))
    with ProcessPoolExecutor(count, spawn, *share) as processes:
        rates = list(processes.map(train_for, [settings] * count, [rung] * count))
    each = [round(rate * settings.batch_size) for rate in rates]
    return {"processes": count, "rung": rung.name, "samples_per_second": sum(each), "of_each": each}


def print_ladder(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of the ladder."""
    print()
    print(markdown_header(["method", "rung", "samples a second", "gain", "to fixed, in time"]))
    for row in rows:
        found = [row.get("failure", "-")] * 3
        if "failure" not in row:
            found = [row["samples_per_second"], row.get("gain", "-"), row["to_fixed"]]
        print(markdown_row([row["method"], row["rung"], *found]))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["ladder", "packed"], help="one of the two")
    parser.add_argument("--model", choices=["study", "mlp"], default="study")
    parser.add_argument("--tasks", type=int, default=8, help="of the mlp")
    parser.add_argument(
        "--hidden-size", type=int, default=256, help="of either (study, 256: 3.5 M parameters)"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16384, help="in the training set")
    parser.add_argument("--workers", type=int, default=4, help="of the DataLoader")
    parser.add_argument("--rounds", type=int, nargs=2, default=[5, 20], metavar=("LEAST", "MOST"))
    parser.add_argument("--slice-seconds", type=float, default=0.3)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the ladder, beyond the least rounds")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--packed-seconds", type=float, default=8.0, help="for each number of processes")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write the figures as they come."""
    args = parse_arguments(argv)
    where = begin(device=str(args.device))
    on_cuda = args.device.type == "cuda"
    rungs = [rung for rung in RUNGS if on_cuda or not rung.needs_cuda]
    samples = samples_of(args)
    left_out = [rung.name for rung in RUNGS if rung not in rungs]
    figures: dict[str, Any] = {"machine": where, "workload": samples.name, "needs_cuda": left_out}
    if left_out:
        print(f"skipped: {', '.join(left_out)} (needs CUDA)")
    if args.only != "packed":
        least, most = args.rounds
        rounds = Rounds(least, most, 0.01, args.slice_seconds, args.seconds)
        figures["ladder"] = ladder(samples, rungs, args.batch_size, args.workers, rounds, args.device)
        print_ladder(figures["ladder"])
        write_json(args.out, figures)
    if args.only != "ladder":
        figures["packed"] = []
        print("\n" + markdown_header(["processes", "samples a second, together"]))
        top = rungs[-1]
        for count in args.processes:
            try:
                figures["packed"].append(packed(args, top, count))
            except Exception as error:
                if top is not rungs[-1]:
                    raise
                top = rungs[-2]
                print(
                    f"without {rungs[-1].name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                )
                figures["packed"].append(packed(args, top, count))
            print(markdown_row([count, figures["packed"][-1]["samples_per_second"]]), flush=True)
            write_json(args.out, figures)


if __name__ == "__main__":
    main()
