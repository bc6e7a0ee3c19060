"""How the cost of balancing grows: with the tasks, with the trunk's parameters, with the ranks.

    python benchmarks/scaling.py --only tasks --tasks 2 8 32 64
    python benchmarks/scaling.py --only parameters --parameters 1e6 1e8
    python benchmarks/scaling.py --only ranks --ranks 1 2 4

Tasks and parameters: ratios to the plain sum, as in balancer_step.py. Ranks (gloo, on this machine): the CPU time of a
rank's step as a ratio to DistributedDataParallel with the plain sum, and what the balancer sends, in copies of the
trunk's gradients; wall times mean nothing once there are more ranks than cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import methods
import torch
import workloads
from balancer_step import measure_workload, print_result
from measuring import begin, markdown_header, markdown_row, paired_ratio, write_json
from rank_steps import PLAIN, WAYS
from rounds import Rounds
from variants import FLOORS, GABA_FORMS, method_variant

PARTS = ("tasks", "parameters", "ranks")
_FLOAT_BYTES = 4
_HELD_COPIES = 4  # a variant's weights, AdamW's two averages, and its gradients
_PARAMETER_TASKS = 4
_MOST_TO_FILL = 0.7  # of the memory that is free


def with_tasks(args: argparse.Namespace, rounds: Rounds) -> list[dict[str, Any]]:
    """Measure the methods on the mlp with more and more tasks."""
    variants = [*FLOORS, *(method_variant(method) for method in args.methods), *GABA_FORMS[1:]]
    results = []
    for count in args.tasks:
        workload = workloads.mlp(count, width=args.width).to(args.device)
        results.append(measure_workload(workload, variants, rounds, "adamw"))
        print_result(results[-1])
    return results


def with_parameters(args: argparse.Namespace, rounds: Rounds) -> list[dict[str, Any]]:
    """Measure GABA's forms on wider and wider trunks, as far as memory goes."""
    variants = [*FLOORS, method_variant("gaba"), method_variant("pcgrad"), GABA_FORMS[-1]]
    results = []
    for numbers in args.parameters:
        width = round((math.sqrt(32**2 + 8 * numbers) - 32) / 4)  # 32 w + 2 w² numbers in three layers
        copies = _HELD_COPIES * len(variants) + 2 * _PARAMETER_TASKS + 2
        needed = _FLOAT_BYTES * numbers * copies
        if needed > _MOST_TO_FILL * free_bytes(args.device):
            print(
                f"\n{numbers:.0e} parameters: left out, about {needed / 2**30:.0f} GiB are needed", flush=True
            )
            continue
        workload = workloads.wide(_PARAMETER_TASKS, width=width, batch_size=args.batch_size).to(args.device)
        results.append(measure_workload(workload, variants, rounds, "adamw"))
        print_result(results[-1])
    return results


def free_bytes(device: torch.device) -> float:
    """Return how much memory is free, where that can be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return float(free[0]) if free else math.inf


def with_ranks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure GABA's forms on 1 and more ranks."""
    results = []
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as name:
            numbers = [args.rank_tasks, args.width, args.rank_batch_size, args.rank_rounds]
            command = [sys.executable, str(Path(__file__).with_name("rank_steps.py"))]
            ranks = [
                subprocess.Popen([*command, str(rank), str(world), name, *map(str, numbers)])
                for rank in range(world)
            ]
            try:
                if any(rank.wait(timeout=600) for rank in ranks):
                    raise RuntimeError(f"one of {world} ranks failed")
            finally:
                for rank in ranks:
                    rank.kill()  # those that wait for one that failed
            found = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(world)]
        results.append(rank_result(world, args.rank_tasks, found))
    print_ranks(results)
    return results


def rank_result(world: int, tasks_count: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the ranks' figures together; times are those of the slowest rank in each round."""
    copy_bytes = _FLOAT_BYTES * found[0]["trunk_numbers"]
    slowest = {
        way: {
            clock: [max(times) for times in zip(*(rank["ways"][way][clock] for rank in found), strict=True)]
            for clock in ("cpu", "wall")
        }
        for way in WAYS
    }
    return {
        "ranks": world,
        "tasks": tasks_count,
        "trunk_numbers": found[0]["trunk_numbers"],
        "ways": {
            way: {
                "cpu_ratio": paired_ratio(slowest[way]["cpu"], slowest[PLAIN]["cpu"]),
                "wall_ratio": paired_ratio(slowest[way]["wall"], slowest[PLAIN]["wall"]),
                "sent_copies": round(found[0]["ways"][way]["bytes_per_step"] / copy_bytes, 4),
                "sums_per_step": found[0]["ways"][way]["calls_per_step"],
                **slowest[way],
            }
            for way in WAYS
        },
    }


def print_ranks(results: Sequence[dict[str, Any]]) -> None:
    """Print a row a way and a column a number of ranks."""
    columns = [f"{result['ranks']} ranks: CPU time (copies sent)" for result in results]
    print(f"\nK = {results[0]['tasks']}, ratios to the plain sum on as many ranks\n")
    print(markdown_header(["", *columns]))
    for way in WAYS:
        ways = [result["ways"][way] for result in results]
        print(markdown_row([way, *(f"{found['cpu_ratio']} ({found['sent_copies']:.2f})" for found in ways)]))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods.METHODS,
        metavar="METHOD",
        default=["rlw", "gaba", "pcgrad", "upgrad", "mgda", "cagrad", "nash-mtl"],
        help="for --only tasks",
    )
    parser.add_argument("--width", type=int, default=256, help="of the mlp, for tasks and ranks")
    parser.add_argument("--parameters", nargs="+", type=float, default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--batch-size", type=int, default=16, help="for parameters")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rank-tasks", type=int, default=4)
    parser.add_argument("--rank-batch-size", type=int, default=64, help="of each rank")
    parser.add_argument("--rank-rounds", type=int, default=10)
    parser.add_argument("--rounds", type=int, nargs=2, default=[4, 12], metavar=("LEAST", "MOST"))
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seconds", type=float, default=20.0, help="for a workload, beyond the least rounds")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write the figures as they come."""
    args = parse_arguments(argv)
    where = begin(device=str(args.device))
    least, most = args.rounds
    rounds = Rounds(least, most, args.tolerance, budget_seconds=args.seconds)
    content: dict[str, Any] = {"machine": where}
    if "tasks" in args.only:
        content["tasks"] = with_tasks(args, rounds)
        write_json(args.out, content)
    if "parameters" in args.only:
        content["parameters"] = with_parameters(args, rounds)
        write_json(args.out, content)
    if "ranks" in args.only:
        content["ranks"] = with_ranks(args)
    write_json(args.out, content)


if __name__ == "__main__":
    main()
