"""Run all benchmarks one after another, each in a process of its own; figures go to one folder.

    make bench                                # the full form: about half an hour
    python benchmarks/suite.py --quick        # minutes: smaller models, fewer rounds, wider intervals
    taskset -c 1 python benchmarks/suite.py --libmtl ~/src/LibMTL --out runs/bench

The folder is benchmarks/results/<date>-<machine>/ for the full form, runs/benchmarks/ for the quick one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from measuring import machine

HERE = Path(__file__).resolve().parent
Part = tuple[str, str, list[str]]  # (name of its figures, script, arguments)


def parts(*, quick: bool, peers: Sequence[str]) -> list[Part]:
    """Return what is run, in order."""
    beside = [*peers]
    if quick:
        small = ["--rounds", "4", "8", "--tolerance", "0.03"]
        return [
            ("import_time", "import_time.py", ["--rounds", "3"]),
            ("balancer_memory", "balancer_memory.py", ["--tasks", "2", "8", "--width", "256", *beside]),
            ("steps_mlp", "balancer_step.py", ["--models", "mlp", "--tasks", "2", "8", *small, *beside]),
        ]
    return [
        ("import_time", "import_time.py", ["--rounds", "15"]),
        ("balancer_memory", "balancer_memory.py", beside),
        ("steps_mlp", "balancer_step.py", ["--models", "mlp", "--rounds", "10", "40", *beside]),
    ]


def results_folder(*, quick: bool) -> Path:
    """Return where the figures go by default."""
    if quick:
        return HERE.parent / "runs" / "benchmarks"
    where = machine(threads=1)
    name = re.sub(r"[^a-z0-9]+", "-", f"{where['cpu']} {where['cpus']} cores".lower()).strip("-")
    return HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{name}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="minutes instead of half an hour")
    parser.add_argument("--libmtl", type=Path, metavar="PATH", help="a checkout of LibMTL to measure beside")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts only")
    parser.add_argument("--out", type=Path, help="folder of the figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; a part that fails is named at the end, and the others are run."""
    args = parse_arguments(argv)
    peers = ["--peers", "torchjd", *([] if args.libmtl is None else ["libmtl", "--libmtl", str(args.libmtl)])]
    out = args.out or results_folder(quick=args.quick)
    failed = []
    for name, script, arguments in parts(quick=args.quick, peers=peers):
        if args.only and name not in args.only:
            continue
        start = time.monotonic()
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / script), *arguments, "--out", str(out / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
