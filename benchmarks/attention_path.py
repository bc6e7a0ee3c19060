"""What PyTorch's ways to compute attention cost on this CPU, in float32 and under bfloat16 autocast.

A step is forward and backward of one ``nn.MultiheadAttention`` with 8 heads and without dropout, every position asking
all others. With dropout there is nothing to choose: on a CPU PyTorch then takes the MATH path itself.

    python benchmarks/attention_path.py --widths 128 512 --lengths 30 128 512
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from measuring import begin, markdown_header, markdown_row, paired_ratio, rounded, write_json
from rounds import Entry, Rounds, clock_of, measure
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CHOSEN, MATH = "PyTorch's choice", "MATH"
PATHS = (CHOSEN, MATH)
PRECISIONS = ("fp32", "bf16")
BASELINE = f"fp32, {CHOSEN}"
HEADS = 8


def steps(width: int, length: int, samples: int, precision: str, path: str) -> Iterator[None]:
    """Pass through the layer, there and back."""
    layer = nn.MultiheadAttention(width, HEADS, batch_first=True)
    inputs = torch.randn(samples, length, width, requires_grad=True)
    while True:
        with _precision(precision), _path(path):
            outputs, _ = layer(inputs, inputs, inputs, need_weights=False)
        outputs.float().square().mean().backward()
        yield


def _precision(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _path(path: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH) if path == MATH else nullcontext()


def measure_shape(width: int, length: int, positions: int, rounds: Rounds) -> dict[str, Any]:
    """Return the figures of one width and length; ``positions`` in all, so that lengths compare."""
    samples = max(1, positions // length)
    entries = {
        f"{precision}, {path}": Entry(steps(width, length, samples, precision, path))
        for precision in PRECISIONS
        for path in PATHS
    }
    measure(entries, BASELINE, rounds, clock_of(torch.device("cpu")))
    seconds = {name: entry.seconds for name, entry in entries.items()}
    return {
        "width": width,
        "length": length,
        "samples": samples,
        "ratios": {name: paired_ratio(found, seconds[BASELINE]) for name, found in seconds.items()},
        "bf16_math_to_choice": paired_ratio(seconds[f"bf16, {MATH}"], seconds[f"bf16, {CHOSEN}"]),
        "seconds_per_step": {name: rounded(found) for name, found in seconds.items()},
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 512])
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[30, 128, 512], help="positions of a sample"
    )
    parser.add_argument("--positions", type=int, default=2048, help="of a batch")
    parser.add_argument("--rounds", type=int, nargs=2, default=[5, 20], metavar=("LEAST", "MOST"))
    parser.add_argument("--seconds", type=float, default=10.0, help="for a shape, beyond the least rounds")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures."""
    args = parse_arguments(argv)
    where = begin()
    least, most = args.rounds
    rounds = Rounds(least, most, budget_seconds=args.seconds)
    shapes = [(width, length) for width in args.widths for length in args.lengths]
    results = [measure_shape(width, length, args.positions, rounds) for width, length in shapes]
    names = list(results[0]["ratios"])
    print(markdown_header(["width", "length", *names, "bf16: MATH to PyTorch's choice"]))
    for result in results:
        ratios = [result["ratios"][name] for name in names]
        print(markdown_row([result["width"], result["length"], *ratios, result["bf16_math_to_choice"]]))
    write_json(args.out, {"machine": where, "results": results})


if __name__ == "__main__":
    main()
