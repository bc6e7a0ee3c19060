"""What balancing adds to a training step, as a ratio to the plain sum; all methods, the peers beside them.

A step is forward, balancing, backward and AdamW. Everything runs in one process on one thread, in interleaved rounds;
a ratio pairs the CPU times of one round (on CUDA: wall time until the device has finished).

    python benchmarks/balancer_step.py --models mlp --tasks 2 4 8 16
    python benchmarks/balancer_step.py --models study --methods gaba pcgrad --peers torchjd
    python benchmarks/balancer_step.py --peers torchjd libmtl --libmtl ~/src/LibMTL --out runs/steps.json
    python benchmarks/balancer_step.py --models mlp-heads --methods gaba --ways compiled compiled+fused

A variant is measured until its 95 % interval lies within --tolerance of its median (times the ratio, above 1), within
the bounds on rounds and on --seconds. With --processes all of that is done in several, and their medians are pooled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads
from measuring import in_words, machine, markdown_header, markdown_row, pooled_ratio, rounded, write_json
from rounds import Entry, Rounds, clock_of, measure
from selection import add_arguments, chosen_variants
from variants import BARE, BY_HAND, FUSED_PLAIN, PLAIN, OptimizerForm, Variant
from ways import WORDS, Way, in_ways, parse_way
from workloads import Workload

MODELS = ("mlp", "mlp-heads", "wide", "resnet", "study")


def chosen_workloads(args: argparse.Namespace) -> Iterator[Workload]:
    """Yield what was asked for."""
    if "mlp" in args.models:
        for count in args.tasks:
            yield workloads.mlp(count, width=args.width, batch_size=args.batch_size)
    if "mlp-heads" in args.models:
        for count in args.tasks:
            yield workloads.mlp(
                count, width=args.width, batch_size=args.batch_size, head_width=args.width // 4
            )
    if "wide" in args.models:
        for batch_size in args.wide_batch_sizes:
            yield workloads.wide(4, width=args.wide_width, batch_size=batch_size)
    if "resnet" in args.models:
        yield workloads.resnet(3, channels=args.channels, batch_size=min(args.batch_size, 32))
    if "study" in args.models:
        yield workloads.study(hidden_size=args.hidden_size, batch_size=args.batch_size)


def measure_workload(
    workload: Workload, variants: Sequence[Variant], rounds: Rounds, optimizer: OptimizerForm
) -> dict[str, Any]:
    """Return the figures of all variants on one workload."""
    entries = {
        variant.name: Entry(
            variant.steps(workload, optimizer),
            variant.multiple_of,
            may_fail=variant.may_fail,
        )
        for variant in variants
    }
    measure(entries, PLAIN, rounds, clock_of(workload.inputs.device))
    seconds = {name: [entry.seconds] for name, entry in entries.items() if not entry.failure}
    failures = {name: entry.failure for name, entry in entries.items() if entry.failure}
    steps = {name: entry.slice_steps for name, entry in entries.items()}
    return {
        **workload.described(),
        **_compared(variants, seconds, failures),
        "steps_per_slice": steps,
    }


def _compared(
    variants: Sequence[Variant], seconds: Mapping[str, Sequence[Sequence[float]]], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Return the figures that are made of the seconds of all variants, by process and round."""
    baseline = seconds[PLAIN]
    rows = []
    for variant in variants:
        name = variant.name
        row: dict[str, Any] = {
            "name": name,
            "source": variant.source,
            "method": variant.method,
            "form": variant.form,
        }
        if name in failures:
            row["failure"] = failures[name]
        else:
            row["ratio"] = pooled_ratio(seconds[name], baseline)
            row["to_bare_passes"] = pooled_ratio(seconds[name], seconds[BARE])
            if variant.plain != PLAIN:
                row["to_plain_alike"] = pooled_ratio(seconds[name], seconds[variant.plain])
            row["seconds_per_step"] = [rounded(one) for one in seconds[name]]
        rows.append(row)
    plain_seconds = float(np.median([second for one in baseline for second in one]))
    return {"plain_seconds": plain_seconds, "variants": rows}


def in_processes(argv: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Measure in several processes one after another, each with other copies of everything, and pool their figures."""
    found = []
    for index in range(args.processes):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "figures.json"
            command = [sys.executable, __file__, *argv, "--processes", "1", "--out", str(out)]
            print(f"process {index + 1} of {args.processes}", flush=True)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(json.loads(out.read_text()))
    pooled: dict[str, Any] = found[0]
    for place, result in enumerate(pooled["results"]):
        rows = [{row["name"]: row for row in one["results"][place]["variants"]} for one in found]
        failures = {n: row["failure"] for of in rows for n, row in of.items() if "failure" in row}
        names = [name for name in rows[0] if name not in failures]
        seconds = {name: [of[name]["seconds_per_step"][0] for of in rows] for name in names}
        result |= _compared(args.variants, seconds, failures)
        print_result(result)
    return pooled


def print_result(result: dict[str, Any]) -> None:
    """Print one workload's table, cheapest first."""
    print(f"\n{result['workload']}: plain sum {1000 * result['plain_seconds']:.2f} ms a step\n")
    measured = [row for row in result["variants"] if "ratio" in row]
    alike = any("to_plain_alike" in row for row in measured)
    heading = ["variant", "ratio to the plain sum", "to K backward passes", "rounds"]
    print(markdown_header([*heading, *(["to the plain sum made so"] if alike else [])]))
    for row in sorted(measured, key=lambda row: row["ratio"].median):
        ratio = row["ratio"]
        cells = [f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})", row["to_bare_passes"]]
        cells += [sum(map(len, row["seconds_per_step"])), *([row.get("to_plain_alike", "")] if alike else [])]
        print(markdown_row([row["name"], *cells]))
    for row in result["variants"]:
        if "failure" in row:
            print(markdown_row([row["name"], row["failure"], "-", "-", *(["-"] if alike else [])]))


def _way(text: str) -> Way:
    try:
        return parse_way(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--tasks", nargs="+", type=int, default=[2, 4, 8, 16], help="numbers of tasks of the mlps"
    )
    parser.add_argument("--width", type=int, default=256, help="hidden width of the mlps")
    parser.add_argument("--wide-width", type=int, default=1024, help="hidden width of the wide mlp")
    parser.add_argument("--wide-batch-sizes", nargs="+", type=int, default=[32, 64, 256])
    parser.add_argument("--channels", type=int, default=32, help="of the resnet's first block")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the study model (256: 3.5 M)")
    parser.add_argument("--batch-size", type=int, default=256, help="of the mlps and the study model")
    parser.add_argument(
        "--exact-only", action="store_true", help="leave out the other forms of our methods, such as features"
    )
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True) for everything measured")
    parser.add_argument(
        "--ways",
        nargs="+",
        type=_way,
        default=[],
        metavar="WAY",
        help=f"measure everything in these ways, too: {', '.join(WORDS)}, or several joined by '+'",
    )
    parser.add_argument("--rounds", type=int, nargs=2, default=[10, 60], metavar=("LEAST", "MOST"))
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="for a workload, beyond the least rounds"
    )
    parser.add_argument(
        "--slice-seconds", type=float, default=0.03, help="about how long one runs in a round"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--processes", type=int, default=1, help="measure in so many, one after another, and pool"
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    missing = {way: way.missing(args.device) for way in args.ways}
    args.left_out = {way.name: why for way, why in missing.items() if why}
    ways = [way for way, why in missing.items() if not why]
    variants = chosen_variants(parser, args)
    if args.exact_only:
        variants = [v for v in variants if v.source != "mtlbalance" or not v.form]
    args.variants = in_ways([FUSED_PLAIN, BY_HAND, *variants], ways)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print each workload's table, and write the figures as they come."""
    args = parse_arguments(argv)
    if args.peers:
        warnings.simplefilter("ignore")  # theirs; ours give none
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = machine(args.threads, str(args.device))
    print(in_words(where) + (", fused AdamW" if args.fused else ""))
    for name, missing in args.left_out.items():
        print(f"left out: {name}: {missing}")
    if args.ways and len(args.left_out) == len(args.ways):
        print("nothing is left to measure")
        return
    if args.processes > 1:
        given = sys.argv[1:] if argv is None else argv
        write_json(args.out, in_processes(given, args))
        return
    least, most = args.rounds
    rounds = Rounds(least, most, args.tolerance, args.slice_seconds, args.seconds)
    results = []
    for workload in chosen_workloads(args):
        result = measure_workload(
            workload.to(args.device), args.variants, rounds, "fused" if args.fused else "adamw"
        )
        print_result(result)
        results.append(result)
        write_json(args.out, {"machine": where, "fused_adamw": args.fused, "results": results})


if __name__ == "__main__":
    main()
