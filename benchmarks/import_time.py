"""What `from mtlbalance import GABALoss` costs beside `import torch`: fresh processes, in turn, CPU time.

python benchmarks/import_time.py --rounds 15 --out runs/benchmarks/import_time.json
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measuring import machine, markdown_header, markdown_row, paired_ratio, write_json

BASELINE = "import torch"
STATEMENTS = (BASELINE, "from mtlbalance import GABALoss", "import mtlbalance.cli.app")


def cpu_seconds(statement: str) -> float:
    """Return the user and system time that a fresh interpreter takes for a statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="fresh processes for each statement (default: 15)"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in interleaved rounds and print the table."""
    args = parse_arguments(argv)
    seconds: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for statement in STATEMENTS:
        cpu_seconds(statement)  # bytecode and file caches are warm from here on
    for index in range(args.rounds):
        for offset in range(len(STATEMENTS)):  # every statement comes first equally often
            statement = STATEMENTS[(index + offset) % len(STATEMENTS)]
            seconds[statement].append(cpu_seconds(statement))

    ratios = {statement: paired_ratio(seconds[statement], seconds[BASELINE]) for statement in STATEMENTS}
    print(markdown_header(["statement", "CPU s (median)", "ratio to `import torch` (95 %)"]))
    for statement in STATEMENTS:
        print(markdown_row([f"`{statement}`", f"{np.median(seconds[statement]):.3f}", ratios[statement]]))
    write_json(args.out, {"machine": machine(threads=1), "seconds": seconds, "ratios": ratios})


if __name__ == "__main__":
    main()
