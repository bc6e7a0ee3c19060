"""Run all benchmarks one after another, each in a process of its own; figures go to one folder.

    make bench                                # the full form: about an hour
    python benchmarks/suite.py --quick        # minutes: smaller models, fewer rounds, wider intervals
    taskset -c 1 python benchmarks/suite.py --libmtl ~/src/LibMTL --out runs/bench

The folder is benchmarks/results/<date>-<machine>/ for the full form, runs/benchmarks/ for the quick one.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import page
from measuring import machine

HERE = Path(__file__).resolve().parent
# Name of the figures -> command; PEERS stands for the peers' options.
FULL = {
    "import_time": "import_time.py --rounds 15",
    "memory": "balancer_memory.py PEERS",
    "memory_linear": "balancer_memory.py --layers linear PEERS",
    "steps_mlp": "balancer_step.py --models mlp-heads --rounds 6 60 --seconds 60 PEERS",
    "floor": "floor.py --rounds 25",
    "steps_solvers": "balancer_step.py --models mlp-heads --processes 7 --rounds 8 100 --seconds 10 --tolerance 0.003 "
    "--methods gaba pcgrad mgda cagrad nash-mtl fairgrad upgrad aligned-mtl",
    "steps_losses": "balancer_step.py --models mlp-heads --processes 7 --rounds 12 400 --seconds 7 --tolerance 0.003 "
    "--methods fixed uncertainty dwa rlw famo",
    "steps_mlp_linear": "balancer_step.py --models mlp --rounds 6 60 --seconds 20 PEERS --methods fixed gaba pcgrad",
    "steps_mlp_fused": "balancer_step.py --models mlp-heads --fused --rounds 6 60 --seconds 15 --methods fixed gaba",
    "steps_compiled": "balancer_step.py --models mlp-heads --rounds 6 60 --seconds 20 --methods gaba --ways fused "
    "compiled compiled+fused",
    "steps_bf16": "balancer_step.py --models study --hidden-size 64 --rounds 4 8 --seconds 30 --methods gaba "
    "--ways fused bf16 bf16+math bf16+fused",
    "steps_bf16_large": "balancer_step.py --models study --exact-only --rounds 3 5 --seconds 20 --methods gaba --ways "
    "bf16 bf16+math bf16+fused",
    "steps_models": "balancer_step.py --models wide resnet --rounds 4 30 --seconds 40 PEERS --methods fixed famo gaba "
    "pcgrad mgda upgrad nash-mtl",
    "steps_study": "balancer_step.py --models study --rounds 4 6 --methods fixed gaba pcgrad PEERS",
    "end_to_end": "end_to_end.py --models mlp --rounds 5 --epochs 3 --steps 120",
    "end_to_end_speed": "end_to_end.py --models mlp --rounds 30 --epochs 3 --steps 120 --no-parts",
    "end_to_end_study": "end_to_end.py --models study --hidden-size 32 --batch-size 64 --steps 40 --watched 64 "
    "--epochs 5 --rounds 16 --no-parts",
    "scaling": "scaling.py --only tasks ranks",
    "scaling_parameters": "scaling.py --only parameters",
    "allocator": "allocator.py --rounds 3 --hidden-size 128",
    "attention_path": "attention_path.py --seconds 5 --rounds 5 12",
}
_ON_CPU_ALONE = ("import_time.py", "allocator.py", "attention_path.py", "floor.py")
QUICK = {
    "import_time": "import_time.py --rounds 3",
    "memory": "balancer_memory.py --tasks 2 8 --width 256 PEERS",
    "steps_mlp": "balancer_step.py --models mlp-heads --tasks 2 8 --rounds 4 30 --seconds 12 PEERS --methods fixed "
    "uncertainty gaba pcgrad mgda upgrad",
    "floor": "floor.py --models mlp-heads wide --tasks 2 8 --rounds 8",
    "end_to_end": "end_to_end.py --models mlp --rounds 3 --epochs 3 --steps 40 --no-parts",
    "scaling": "scaling.py --tasks 2 32 --parameters 1e6 --ranks 2 --methods gaba --seconds 5",
}


def commands(*, quick: bool, libmtl: Path | None, device: str = "cpu") -> dict[str, list[str]]:
    """Return script and arguments by the name of the figures; on a GPU without the parts that know no device."""
    peers = ["--peers", "torchjd", *([] if libmtl is None else ["libmtl", "--libmtl", str(libmtl)])]
    found = {}
    for name, command in (QUICK if quick else FULL).items():
        words = [peers if word == "PEERS" else [word] for word in shlex.split(command)]
        found[name] = [word for part in words for word in part]
    if device != "cpu":
        found = {name: words for name, words in found.items() if words[0] not in _ON_CPU_ALONE}
        found["scaling"] += ["--only", "tasks"]  # its ranks are gloo's
        found = {name: [*words, "--device", device] for name, words in found.items()}
    return found


def results_folder(*, quick: bool, device: str = "cpu") -> Path:
    """Return where the figures go by default."""
    if quick:
        return HERE.parent / "runs" / "benchmarks"
    where = machine(1, device)
    called = where.get("gpu", f"{where['cpu']} {where['cpus']} cores")
    name = re.sub(r"[^a-z0-9]+", "-", str(called).lower()).strip("-")
    return HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{name}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="minutes instead of an hour")
    parser.add_argument("--libmtl", type=Path, metavar="PATH", help="a checkout of LibMTL to measure beside")
    parser.add_argument("--only", nargs="+", choices=list(FULL), metavar="PART", help="run these parts only")
    parser.add_argument("--device", default="cpu", help="cpu | cuda | cuda:N")
    parser.add_argument("--out", type=Path, help="folder of the figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; a part that fails is named at the end, and the others are run."""
    args = parse_arguments(argv)
    out = args.out or results_folder(quick=args.quick, device=args.device)
    failed = []
    planned = commands(quick=args.quick, libmtl=args.libmtl, device=args.device)
    for name, (script, *arguments) in planned.items():
        if args.only and name not in args.only:
            continue
        start = time.monotonic()
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / script), *arguments, "--out", str(out / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s\n", flush=True)
    page.main([str(out)])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
