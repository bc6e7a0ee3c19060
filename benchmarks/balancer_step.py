"""What balancing adds to a step (forward + balancing + backward + AdamW), as a ratio to the plain sum.

Everything runs in one process on one thread, in interleaved rounds; a ratio pairs the CPU times of one round.

    python benchmarks/balancer_step.py --models mlp --tasks 2 4 8 16
    python benchmarks/balancer_step.py --models study --out runs/benchmarks/study.json
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import machine, markdown_header, markdown_row, paired_ratio, write_json
from torch import Tensor, nn

from mtlbalance import Balancer, FixedWeightLoss, GABALoss

UPDATE_EVERY = 10
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model with ``trunk`` and ``heads``, a batch for it and the loss of each task."""

    name: str
    model: nn.Module
    inputs: Tensor
    losses: Callable[[dict[str, Tensor]], Losses]
    tasks: tuple[str, ...]
    steps_per_round: int


class MLP(nn.Module):
    """Three hidden layers as the trunk, and a linear head for each task."""

    def __init__(self, width: int, tasks: tuple[str, ...]) -> None:
        super().__init__()
        layers = [(32, width), (width, width), (width, width)]
        self.trunk = nn.Sequential(*(part for sizes in layers for part in (nn.Linear(*sizes), nn.ReLU())))
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})


def mlp_workload(tasks_count: int, width: int, batch_size: int) -> Workload:
    """K regression tasks on an MLP."""
    tasks = tuple(f"task_{index}" for index in range(tasks_count))
    targets = {task: torch.randn(batch_size, 1) for task in tasks}

    def losses(predictions: dict[str, Tensor]) -> Losses:
        return {task: nn.functional.mse_loss(predictions[task], targets[task]) for task in tasks}

    name = f"mlp K={tasks_count}"
    return Workload(name, MLP(width, tasks), torch.randn(batch_size, 32), losses, tasks, steps_per_round=10)


def study_workload(hidden_size: int, batch_size: int) -> Workload:
    """The study's CNN-BiLSTM-attention with its two tasks on random windows."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cmapss"))
    from mtlbalance_cmapss.backbone import CnnBiLstmAttention
    from mtlbalance_cmapss.config import CmapssConfig, CnnBiLstmAttentionConfig, tasks_of

    config = CnnBiLstmAttentionConfig(hidden_size=hidden_size)
    model = CnnBiLstmAttention(config, num_features=17, tasks=tasks_of(CmapssConfig()))
    rul_cycles, health = 125 * torch.rand(batch_size), torch.randint(3, (batch_size,))

    def losses(predictions: dict[str, Tensor]) -> Losses:
        return {
            "rul": nn.functional.mse_loss(predictions["rul"], rul_cycles),
            "health": nn.functional.cross_entropy(predictions["health"], health),
        }

    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    name = f"cnn-bilstm-attention K=2 ({size:.1f} M)"
    return Workload(
        name, model, torch.randn(batch_size, 30, 17), losses, ("rul", "health"), steps_per_round=1
    )


@dataclass(frozen=True)
class Variant:
    """A way to balance; without a balancer, the plain sum in one backward pass or in one for each task."""

    name: str
    balancer: Callable[[tuple[str, ...]], Balancer] | None
    backward_per_task: bool = False
    reads_features: bool = False
    steps_at_least: int = 1


def gaba(**options: int | str) -> Callable[[tuple[str, ...]], Balancer]:
    """Return a maker of GABA that is past its warm-up at once."""
    return lambda tasks: GABALoss(tasks=tasks, warmup_steps=0, min_weight=0.5 / len(tasks), **options)  # type: ignore[arg-type]


VARIANTS = (
    Variant("plain sum", None),
    Variant("Fixed", FixedWeightLoss),
    Variant("K backward passes, no balancing", None, backward_per_task=True),
    Variant("GABA (direct)", gaba()),
    Variant("GABA (K+1 passes)", gaba(delivery="weighted_sum")),
    Variant(f"GABA every {UPDATE_EVERY}th", gaba(update_every=UPDATE_EVERY), steps_at_least=UPDATE_EVERY),
    Variant("GABA at the features", gaba(), reads_features=True),
)


def training_steps(workload: Workload, variant: Variant) -> Iterator[None]:
    """Take one full training step each time this is advanced."""
    model = copy.deepcopy(workload.model).train()
    trunk, heads = model.get_submodule("trunk"), model.get_submodule("heads")
    assert isinstance(heads, nn.ModuleDict)
    shared = list(trunk.parameters())
    balancer = variant.balancer(workload.tasks) if variant.balancer else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=False)
    while True:
        optimizer.zero_grad()
        features = trunk(workload.inputs)
        losses = workload.losses({task: heads[task](features) for task in workload.tasks})
        if variant.backward_per_task:  # about the least for reading every task's gradient
            for task, loss in losses.items():
                loss.backward(retain_graph=task != workload.tasks[-1])  # type: ignore[no-untyped-call]
        elif balancer is None:
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        else:
            balancer(losses, shared_params=features if variant.reads_features else shared).backward()
        optimizer.step()
        yield


def measure(workload: Workload, rounds: int) -> dict[str, list[float]]:
    """Return for each variant the CPU seconds of one step in each round."""
    steps = {variant.name: training_steps(workload, variant) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    order = list(VARIANTS)
    shuffler = random.Random(0)
    for variant in VARIANTS:
        next(steps[variant.name])  # AdamW's state and the allocator's pools are there from here on
    for _ in range(rounds):
        shuffler.shuffle(order)
        for variant in order:
            count = max(workload.steps_per_round, variant.steps_at_least)
            start = time.process_time()
            for _ in range(count):
                next(steps[variant.name])
            seconds[variant.name].append((time.process_time() - start) / count)
    return seconds


def workloads(args: argparse.Namespace) -> Iterator[tuple[Workload, int]]:
    """Yield what was asked for, each with its number of rounds."""
    if "mlp" in args.models:
        for tasks_count in args.tasks:
            yield mlp_workload(tasks_count, args.width, args.batch_size), args.rounds or 40
    if "study" in args.models:
        yield study_workload(args.hidden_size, args.batch_size), args.rounds or 5


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=["mlp", "study"], default=["mlp", "study"])
    parser.add_argument(
        "--tasks", nargs="+", type=int, default=[2, 4, 8, 16], help="numbers of tasks of the mlp"
    )
    parser.add_argument("--width", type=int, default=256, help="hidden width of the mlp (default: 256)")
    parser.add_argument(
        "--hidden-size", type=int, default=256, help="of the study model (default: 256, 3.5 M)"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, help="default: 40 for the mlp, 5 for the study model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table as it grows, and write the figures."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = machine(args.threads)
    print(", ".join(f"{key} {value}" for key, value in where.items()) + f", batch size {args.batch_size}\n")

    print(
        markdown_header(["model", "plain sum, CPU time a step", *(variant.name for variant in VARIANTS[1:])])
    )
    results = {}
    for workload, rounds in workloads(args):
        seconds = measure(workload, rounds)
        baseline = seconds[VARIANTS[0].name]
        ratios = {name: paired_ratio(values, baseline) for name, values in seconds.items()}
        row = [workload.name, f"{1000 * np.median(baseline):.2f} ms", *list(ratios.values())[1:]]
        print(markdown_row(row), flush=True)
        results[workload.name] = {"rounds": rounds, "ratios": ratios, "seconds_per_step": seconds}
        write_json(args.out, {"machine": where, "batch_size": args.batch_size, "results": results})
    print("\nratios of a full step to the plain sum: median over rounds (95 % bootstrap interval)")


if __name__ == "__main__":
    main()
