"""What the C library's memory thresholds cost a training step, and what raising them gives (Linux with glibc).

glibc hands large blocks back to the system when they are freed, so that the next step faults every page in again. With
the thresholds raised they stay in the process:

    GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824:glibc.malloc.top_pad=67108864

This script measures steps in fresh processes that take turns, with the thresholds as they are, raised by that
environment variable, and raised by mallopt() before the first step.

    python benchmarks/allocator.py --rounds 5 --out runs/allocator.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import workloads
from measuring import in_words, machine, markdown_header, markdown_row, paired_ratio, rounded, write_json
from variants import FLOORS, method_variant

from mtlbalance.allocator import keep_freed_memory

THRESHOLD_BYTES, PAD_BYTES = 2**30, 2**26
TUNABLES = (
    f"glibc.malloc.mmap_threshold={THRESHOLD_BYTES}:glibc.malloc.trim_threshold={THRESHOLD_BYTES}:"
    f"glibc.malloc.top_pad={PAD_BYTES}"
)
AS_IT_IS, BY_ENVIRONMENT, BY_MALLOPT = "as it is", "GLIBC_TUNABLES", "mallopt"
SETTINGS = (AS_IT_IS, BY_ENVIRONMENT, BY_MALLOPT)
MODELS = ("mlp", "study")
METHODS = {"plain sum": FLOORS[0], "gaba": method_variant("gaba")}


def steps_here(model: str, method: str, steps: int, hidden_size: int, batch_size: int) -> dict[str, float]:
    """Return CPU and wall seconds and page faults of a step, and the most memory that was resident."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if model == "mlp":
        workload = workloads.mlp(4, batch_size=batch_size)
    else:
        workload = workloads.study(hidden_size=hidden_size, batch_size=batch_size)
    running = METHODS[method].steps(workload, "adamw")
    for _ in range(2):
        next(running)
    before, cpu, wall = resource.getrusage(resource.RUSAGE_SELF), time.process_time(), time.perf_counter()
    for _ in range(steps):
        next(running)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_seconds": (time.process_time() - cpu) / steps,
        "wall_seconds": (time.perf_counter() - wall) / steps,
        "page_faults": (after.ru_minflt - before.ru_minflt) / steps,
        "resident_megabytes": after.ru_maxrss / 1024,
    }


def in_fresh_process(setting: str, arguments: Sequence[str]) -> dict[str, float]:
    """Return the figures of a process that was started for them."""
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if setting == BY_ENVIRONMENT:
        environment["GLIBC_TUNABLES"] = TUNABLES
    command = [sys.executable, __file__, "--here", setting, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a model, method and setting."""
    rows = []
    for model in args.models:
        steps = str(args.steps or {"mlp": 100, "study": 2}[model])
        for method in METHODS:
            arguments = [model, method, steps, str(args.hidden_size), str(args.batch_size)]
            found: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
            for index in range(args.rounds):
                for offset in range(len(SETTINGS)):  # each comes first equally often
                    setting = SETTINGS[(index + offset) % len(SETTINGS)]
                    found[setting].append(in_fresh_process(setting, arguments))
            baseline = [figures["cpu_seconds"] for figures in found[AS_IT_IS]]
            for setting, figures in found.items():
                cpu = [one["cpu_seconds"] for one in figures]
                medians = {key: median(one[key] for one in figures) for key in figures[0]}
                ratio = paired_ratio(cpu, baseline)
                rows.append({"model": model, "method": method, "setting": setting, "ratio": ratio, **medians})
                rows[-1]["cpu_seconds_per_step"] = rounded(cpu)
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        markdown_header(
            ["model", "step", "thresholds", "CPU ms a step", "ratio", "page faults a step", "MiB"]
        )
    )
    for row in rows:
        cells = [f"{1000 * row['cpu_seconds']:.2f}", row["ratio"], f"{row['page_faults']:.0f}"]
        cells.append(f"{row['resident_megabytes']:.0f}")
        print(markdown_row([row["model"], row["method"], row["setting"], *cells]))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="processes for each setting")
    parser.add_argument("--steps", type=int, help="a process; default: 100 of the mlp, 2 of the study model")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the study model")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--here", nargs=6, help=argparse.SUPPRESS)  # in the processes that this one starts
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures."""
    args = parse_arguments(argv)
    if args.here:
        setting, model, method, *numbers = args.here
        if setting == BY_MALLOPT:
            keep_freed_memory()
        print(json.dumps(steps_here(model, method, *map(int, numbers))))
        return
    where = machine(threads=1)
    print(in_words(where))
    if platform.libc_ver()[0] != "glibc":
        print("this C library is not glibc: nothing to measure")
        return
    rows = measure(args)
    print_rows(rows)
    write_json(args.out, {"machine": where, "tunables": TUNABLES, "rows": rows})


if __name__ == "__main__":
    main()
