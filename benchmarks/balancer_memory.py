"""What balancing holds beyond the plain sum, in copies of the trunk's gradients: at the peak of a step, and kept.

Every allocation is counted (CPU) or the allocator asked (CUDA). The model has wide layers and a small batch, so that
next to the trunk's gradients nothing else is large, and steps are SGD's, which needs no memory of its own. The plain
sum has one copy of them at the peak; a method with K here has K + 1 in all.

    python benchmarks/balancer_memory.py --tasks 2 4 8 16 --peers torchjd
    python benchmarks/balancer_memory.py --device cuda --out runs/memory.json
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import workloads
from live_bytes import live_bytes
from measuring import begin, markdown_header, markdown_row, write_json
from selection import add_arguments, chosen_variants
from variants import PLAIN, Variant
from workloads import Workload

_BYTES = 4  # of a float32


@dataclass(frozen=True)
class Held:
    """Bytes that a variant has, its model included.

    Args:
        peak: the most at any moment of a step.
        kept: between steps.
        left: how many more there are after each step, until Python's garbage collector runs.
    """

    peak: int
    kept: int
    left: int


def held(variant: Variant, workload: Workload) -> Held:
    """Count what a variant has in its third step; the first two make its state."""
    device = workload.inputs.device
    made: list[Any] = []
    gc.collect()
    gc.freeze()  # what is there now, all modules that are in use, is not looked through again and again

    def first_steps() -> None:
        made.append(variant.steps(workload, "sgd"))
        next(made[0])
        next(made[0])

    first = live_bytes(first_steps, device)
    step: Callable[[], None] = lambda: next(made[0])  # noqa: E731
    third = live_bytes(step, device)
    return Held(first.end + third.peak, first.end, third.end)


def measure_workload(workload: Workload, variants: Sequence[Variant]) -> dict[str, Any]:
    """Return the figures of all variants on one workload."""
    copy_bytes = _BYTES * workload.trunk_numbers
    rows: list[dict[str, Any]] = []
    plain: Held | None = None
    for variant in variants:
        row: dict[str, Any] = {
            "name": variant.name,
            "source": variant.source,
            "method": variant.method,
            "form": variant.form,
        }
        try:
            found = held(variant, workload)
        except Exception as error:
            if not variant.may_fail:
                raise
            rows.append(row | {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
            continue
        plain = plain or found  # it comes first
        row["peak_copies"] = round((found.peak - plain.peak) / copy_bytes, 3)
        row["kept_copies"] = round((found.kept - plain.kept) / copy_bytes, 3)
        row["left_copies"] = round(found.left / copy_bytes, 3)
        rows.append(row | {"bytes": asdict(found)})
    return {
        "workload": workload.name,
        "tasks": len(workload.tasks),
        "trunk_numbers": workload.trunk_numbers,
        "copy_bytes": copy_bytes,
        "variants": rows,
    }


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Print a row a variant and a column a number of tasks."""
    header = [f"K = {result['tasks']}: peak (kept)" for result in results]
    print("\ncopies of the trunk's gradients beyond the plain sum's\n")
    print(markdown_header(["variant", *header]))
    for rows in zip(*(result["variants"] for result in results), strict=True):
        cells = [
            row.get("failure")
            or f"{row['peak_copies']:.2f} ({row['kept_copies']:.2f})"
            + (
                f" +{row['left_copies']:.2f} a step until garbage is collected"
                if row["left_copies"] > 0.01
                else ""
            )
            for row in rows
        ]
        print(markdown_row([rows[0]["name"], *cells]))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers",
        choices=["linear", "conv"],
        default="conv",
        help="linear: wide layers on few rows, whose gradients are kept as their factors; conv: no layer is such",
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--width", type=int, default=1024, help="hidden width of the wide mlp")
    parser.add_argument("--batch-size", type=int, default=4)
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.variants = chosen_variants(parser, args, timed=False)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print the table, and write the figures as they come."""
    args = parse_arguments(argv)
    if args.peers:
        warnings.simplefilter("ignore")  # theirs; ours give none
    where = begin(device=str(args.device))
    assert args.variants[0].name == PLAIN
    results = []
    for count in args.tasks:
        make = {"linear": workloads.wide, "conv": workloads.wide_conv}[args.layers]
        workload = make(count, width=args.width, batch_size=args.batch_size)
        results.append(measure_workload(workload.to(args.device), args.variants))
        write_json(args.out, {"machine": where, "results": results})
    print_results(results)


if __name__ == "__main__":
    main()
