"""What a sweep adds to its runs: CPU time and wall time a run, beside bare runs of the same configs.

Bare runs are `mtlbalance run` one after another; the sweep has the same runs, some at a time. CPU times are those
of whole process trees, so that the sweep's include its driver and its table.

    python benchmarks/sweep_overhead.py --runs 8 200
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import machine, markdown_header, markdown_row, write_json

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["training.epochs=1", "training.warmup_epochs=0"]


@dataclass(frozen=True)
class Cost:
    """What a number of runs cost together."""

    runs: int
    cpu_seconds: float
    wall_seconds: float

    def __str__(self) -> str:
        return f"{self.cpu_seconds / self.runs:.2f} / {self.wall_seconds / self.runs:.2f}"


def cost_of(commands: list[list[str]], runs: int) -> Cost:
    """Run commands one after another, and return what their process trees cost."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return Cost(runs, cpu, time.perf_counter() - start)


def write_sweep(folder: Path, count: int) -> Path:
    """Write a sweep of ``count`` tiny runs that differ by their seed."""
    base = folder / "toy.toml"
    base.write_text((EXAMPLES / "toy.toml").read_text(encoding="utf-8"), encoding="utf-8")
    seeds = ", ".join(f"{{ run.seed = {seed} }}" for seed in range(count))
    short = ", ".join(["training.epochs = 1", "training.warmup_epochs = 0"])
    sweep = folder / f"tiny_{count}.toml"
    sweep.write_text(
        f'base = "toy.toml"\n\n[axes]\nlength = [{{ {short} }}]\nseed = [{seeds}]\n', encoding="utf-8"
    )
    return sweep


def measure(count: int, slots: int, folder: Path) -> dict[str, Cost]:
    """Return the costs of planning, of running, and of asking again when all is done."""
    mtlbalance = [sys.executable, "-m", "mtlbalance", "sweep"]
    sweep = write_sweep(folder, count)
    runs = [str(sweep), "--out", str(folder / f"runs_{count}_{slots}")]
    start = [*mtlbalance, "run", *runs, "--per-device", str(slots)]
    return {
        "plan": cost_of([[*start, "--dry-run"]], count),
        "run": cost_of([start], count),
        "again": cost_of([start], count),
    }


def main() -> None:
    """Measure, print the table as it grows, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", type=int, default=[8, 40], help="numbers of runs of the sweeps")
    parser.add_argument("--slots", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--bare", type=int, default=8, help="number of bare runs (default: 8)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()

    print(markdown_header(["", "runs", "CPU / wall s a run", "plan, CPU s", "all finished, CPU s"]))
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy = [sys.executable, "-m", "mtlbalance", "run", str(EXAMPLES / "toy.toml"), *SHORT]
        bare = cost_of(
            [[*toy, f"run.seed={seed}", "--out", str(folder / f"bare_{seed}")] for seed in range(args.bare)],
            args.bare,
        )
        print(markdown_row(["bare runs, one after another", bare.runs, bare, "-", "-"]), flush=True)
        results["bare"] = asdict(bare)
        for count in args.runs:
            costs = measure(count, args.slots, folder)
            cells = [costs["run"], f"{costs['plan'].cpu_seconds:.2f}", f"{costs['again'].cpu_seconds:.2f}"]
            print(markdown_row([f"sweep, {args.slots} at a time", count, *cells]), flush=True)
            results[f"sweep {count}"] = {step: asdict(cost) for step, cost in costs.items()}
            write_json(args.out, {"machine": machine(1), "slots": args.slots, "results": results})


if __name__ == "__main__":
    main()
