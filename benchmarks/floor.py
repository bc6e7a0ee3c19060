"""What balancing must cost at the least on this machine: FLOPs and bytes counted, at ceilings measured in the same run.

A floor is a ratio to the plain sum: (the plain step as measured + what a balanced step does beyond it, at the ceilings)
/ the plain step as measured.

Counted, operation by operation, as PyTorch performs them (counting.py):

- *Products* of matrices by their shapes, fused LSTM layers by theirs, and other FLOPs (convolutions, batched products)
  by torch's own formulas. One more task is one more pass from the features to the trunk's parameters; the heads'
  passes are in the plain step.
- *Bytes*: operands and results of all other operations, each once. For GABA's norms the K gradients are read once; in
  their weighted sum they are read again and one is written. AdamW reads p, g, m, v and writes p, m, v. What the plain
  step does and a balanced one does not, K - 1 sums of the features' gradients, is taken off.

The ceilings (ceilings.py) are taken alone, over and over, so that all is in the caches: every product as torch takes
it, by its BLAS; an LSTM layer with all that it does; for other FLOPs the fastest of these; for bytes copying blocks of
512 KiB to 128 MiB, each byte at the rate of a block that is no larger. *Any kernel*: a product also by oneDNN, which
torch takes for its LSTM but not for float32 layers. That is the floor of the not of torch on it.

Not counted, so that a real step lies above its floor: calls and allocations of operations, caches that hold other
numbers than those wanted, the operands of products, rules on K numbers.

Forms (floor_forms.py): *exact* makes all K gradients. *Factors* keeps those of linear layers as ghost.py does where
that is cheaper here: one QR of the layer's inputs and K products R·D in the place of K - 1 weight-gradient products.
*Outputs alone* leaves those out as well: no way to read norms from K passes down to the layers' outputs costs less.
*Features* moves K gradients of the features. *Every 10th step* is a tenth of the cheapest form that ends in exact
gradients.

    python benchmarks/floor.py --models mlp-heads wide study --out runs/floor.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from balancer_step import chosen_workloads
from ceilings import COPIED_BYTES, SQUARE, Ceilings, Seconds, copy_name, entries
from counting import StepCounts, count_step
from floor_forms import NUMBER_BYTES, factored_layers, forms
from measuring import (
    Ratio,
    begin,
    markdown_header,
    markdown_row,
    paired_ratio,
    rounded,
    write_json,
)
from rounds import Entry, Rounds, clock_of, measure
from variants import BARE, FLOORS, PLAIN
from workloads import Workload


def measure_workload(workload: Workload, rounds: Rounds) -> dict[str, Any]:
    """Count a workload's step, measure the ceilings beside it, and return its floors."""
    counts = count_step(workload)
    device = workload.inputs.device
    parts = (counts.trunk_forward, counts.heads_forward, counts.backward, counts.passes)
    products = {SQUARE, *(product for part in parts for product in part.products)}
    measured = {variant.name: Entry(variant.steps(workload, "adamw")) for variant in FLOORS}
    measured |= entries(products, counts.linear, device)
    measure(measured, PLAIN, rounds, clock_of(device))
    ceilings = Ceilings({name: np.asarray(entry.seconds) for name, entry in measured.items()})
    any_kernel = replace(ceilings, any_kernel=True)
    plain = ceilings.of(PLAIN)
    multiplying, moving = plain_at_the_ceilings(counts, ceilings, workload)
    return {
        **workload.described(),
        "plain_seconds": float(np.median(plain)),
        "flops": flops_of(counts),
        "plain_products": _ratio(multiplying, plain),
        "plain_moving": _ratio(moving, plain),
        "bare_passes": _ratio(ceilings.of(BARE), plain),
        "floors": floors(counts, ceilings, workload),
        "square": str(SQUARE),
        "products": [
            {
                "product": str(product),
                "flops": product.flops,
                "of_a_pass": counts.trunk_backward.products[product],
                "flops_per_second": ceilings.rate(product, product.flops),
                "flops_per_second_any_kernel": any_kernel.rate(product, product.flops),
            }
            for product in sorted(products, key=lambda product: (-product.flops, str(product)))
        ],
        "copies": [
            {"bytes": size, "bytes_per_second": ceilings.rate(copy_name(size), size)} for size in COPIED_BYTES
        ],
        "seconds": {name: rounded(entry.seconds) for name, entry in measured.items()},
    }


def flops_of(counts: StepCounts) -> dict[str, int]:
    """Return the FLOPs of the plain step's parts."""
    return {
        "trunk_forward": counts.trunk_forward.flops,
        "heads_forward": counts.heads_forward.flops,
        "heads_backward": counts.backward.flops - counts.trunk_backward.flops,
        "trunk_backward": counts.trunk_backward.flops,
    }


def plain_at_the_ceilings(
    counts: StepCounts, ceilings: Ceilings, workload: Workload
) -> tuple[Seconds, Seconds]:
    """Return what the plain step's products take, and what moving its bytes takes, AdamW's included."""
    parts = (counts.trunk_forward, counts.heads_forward, counts.backward)
    moved: Counter[int] = Counter()
    for part in parts:
        moved.update(part.moved)
    numbers = sum(parameter.numel() for parameter in workload.model.parameters())
    moved[4 * numbers * NUMBER_BYTES] += 7 * numbers * NUMBER_BYTES
    products = np.sum([ceilings.multiplying(part) for part in parts], axis=0)
    return products, ceilings.moving(moved)


def floors(counts: StepCounts, ceilings: Ceilings, workload: Workload) -> list[dict[str, Any]]:
    """Return each form's floor: by its products alone, with the bytes, and both by any kernel."""
    plain = ceilings.of(PLAIN)
    factored = factored_layers(counts, len(workload.tasks), ceilings)
    fastest = forms(counts, workload, replace(ceilings, any_kernel=True), factored)
    return [
        {
            "form": form,
            "products": _ratio(plain + beyond.products, plain),
            "products_and_bytes": _ratio(plain + beyond.products + beyond.moving, plain),
            "any_kernel": _ratio(plain + fastest[form].products + fastest[form].moving, plain),
        }
        for form, beyond in forms(counts, workload, ceilings, factored).items()
    ]


def _ratio(seconds: Seconds, plain: Seconds) -> Ratio:
    return paired_ratio(seconds.tolist(), plain.tolist())


def print_result(result: dict[str, Any]) -> None:
    """Print a workload's counts, ceilings and floors."""
    parts = ", ".join(
        f"{name.replace('_', ' ')} {flops / 1e6:.1f}" for name, flops in result["flops"].items()
    )
    print(f"\n{result['workload']}: plain sum {1000 * result['plain_seconds']:.2f} ms a step\n")
    print(f"MFLOP: {parts}")
    print(f"of the plain step: products {result['plain_products']}, bytes {result['plain_moving']}")
    for product in result["products"]:
        if product["of_a_pass"] or product["product"] == str(SQUARE):
            rates = [product[key] / 1e9 for key in ("flops_per_second", "flops_per_second_any_kernel")]
            times = f"{product['of_a_pass']} in a pass of the trunk"
            print(f"{product['product']}: {rates[0]:.0f} GFLOP/s, by any kernel {rates[1]:.0f}; {times}")
    for copy in result["copies"]:
        print(f"{copy_name(copy['bytes'])}: {copy['bytes_per_second'] / 1e9:.0f} GB/s")
    print(f"K backward passes: {result['bare_passes']}\n")
    print(markdown_header(["form", "floor by products", "and bytes", "by any kernel"]))
    for floor in result["floors"]:
        cells = [floor[key] for key in ("products", "products_and_bytes", "any_kernel")]
        print(markdown_row([floor["form"] or "exact", *cells]))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["mlp-heads", "wide", "study"]
    parser.add_argument("--models", nargs="+", choices=["mlp", *models], default=models)
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8, 16], help="of the mlps")
    parser.add_argument("--width", type=int, default=256, help="hidden width of the mlps")
    parser.add_argument("--wide-width", type=int, default=1024, help="hidden width of the wide mlp")
    parser.add_argument("--wide-batch-sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--hidden-size", type=int, default=256, help="of the study model (256: 3.5 M)")
    parser.add_argument("--batch-size", type=int, default=256, help="of the mlps and the study model")
    parser.add_argument("--rounds", type=int, default=15, help="that everything gets")
    parser.add_argument("--slice-seconds", type=float, default=0.03, help="of one entry in a round")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, measure, print each workload's floors, and write the figures as they come."""
    args = parse_arguments(argv)
    where = begin(device=str(args.device))
    rounds = Rounds(args.rounds, args.rounds, slice_seconds=args.slice_seconds)
    results = []
    for workload in chosen_workloads(args):
        result = measure_workload(workload.to(args.device), rounds)
        print_result(result)
        results.append(result)
        write_json(args.out, {"machine": where, "results": results})


if __name__ == "__main__":
    main()
