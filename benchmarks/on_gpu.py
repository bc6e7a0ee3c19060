"""What is to be measured on a GPU, as much of it as fits into one call; the next call goes on with what is missing.

    python benchmarks/on_gpu.py --device cuda --out runs/gpu                  # ten minutes
    python benchmarks/on_gpu.py --device cuda --out runs/gpu                  # what is left, and the runs further
    python benchmarks/on_gpu.py --device cuda --out runs/gpu --only tests ladder --again
    python benchmarks/on_gpu.py --device cpu --quick --out runs/gpu-quick     # does it work? seconds; no figures

It wants this repository, an environment with torch for CUDA and the dependencies in pyproject.toml, and no network.
Peers, tests and real data are measured where they are there: torchjd; pytest, hypothesis, and pytest-xdist for several
processes; NASA's files, by MTLBALANCE_CMAPSS_DIR. The package need not be installed: run it from the repository's root
with PYTHONPATH=.:examples/cmapss.

Every part has a log and a JSON file of its own in ``--out``, and a place in on_gpu.json, which says what is done. Parts
come in the order of PARTS (gpu_parts.py). Training runs get a first turn, and at the end what is left of ``--seconds``;
they go on from their checkpoints, and need their folders in ``--out`` for that. A part that failed is tried again.

It has run on a CPU only: no GPU was at hand when it was written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS
from gpu_turns import Part, Setting, Turn
from measuring import in_words, machine, markdown_header, markdown_row, write_json


def turns(names: Sequence[str]) -> Iterator[tuple[Part, float]]:
    """Yield the parts with the most seconds that each may have: a first turn, then all that is left."""
    chosen = [part for part in PARTS if part.name in names]
    yield from ((part, part.seconds) for part in chosen)
    yield from ((part, float("inf")) for part in chosen)


def take_turn(part: Part, setting: Setting, seconds: float) -> Turn:
    """Let a part have its turn; an error is what it has to tell, and does not keep the others from theirs."""
    if part.needs_cuda and not setting.on_cuda:
        return Turn("skipped", [], "needs CUDA")
    try:
        return part.take(setting, seconds)
    except subprocess.TimeoutExpired:
        return Turn("failed", [], f"took longer than {seconds:.0f} s")
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Turn("failed", [], f"{type(error).__name__}: {first}")


def print_table(parts: dict[str, Any]) -> None:
    """Print what is known of every part."""
    print(f"\n{markdown_header(['part', 'what', 'found'])}")
    for name, found in parts.items():
        for what, said in found["lines"]:
            print(markdown_row([name, what, said]))
        if found["state"] != "done" or found["note"]:
            print(markdown_row([name, "", f"{found['state']}: {found['note']}".removesuffix(": ")]))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--device", default="cuda", help="cuda | cuda:N | cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of all that is written")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help=" ".join(names)
    )
    parser.add_argument("--seconds", type=float, default=570.0, help="for this call, about")
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything work?")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Give the parts their turns, note what came of each at once, and print the table."""
    args = parse_arguments(argv)
    end = time.monotonic() + args.seconds
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"this torch ({torch.__version__}) finds no CUDA device", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.device, args.quick, args.out.resolve())
    notes = args.out / "on_gpu.json"
    parts: dict[str, Any] = json.loads(notes.read_text())["parts"] if notes.exists() else {}
    where = machine(torch.get_num_threads(), args.device)
    print(in_words(where))
    taken: set[str] = set()
    for part, most in turns(args.only):
        state = parts.get(part.name, {}).get("state")
        due = state in (None, "going on") or (part.name not in taken and (args.again or state != "done"))
        left = end - time.monotonic()
        if not due or (left < part.least and not args.quick):
            continue
        taken.add(part.name)
        start = time.monotonic()
        turn = take_turn(part, setting, min(most, left))
        seconds = time.monotonic() - start
        parts[part.name] = {
            "state": turn.state,
            "note": turn.note,
            "seconds": round(seconds, 1),
            "lines": turn.lines,
        }
        write_json(notes, {"machine": where, "parts": parts})
        print(f"{part.name}: {turn.state} {turn.note} ({seconds:.0f} s)", flush=True)
    print_table(parts)
    return int(any(parts.get(name, {}).get("state") == "failed" for name in args.only))


if __name__ == "__main__":
    sys.exit(main())
