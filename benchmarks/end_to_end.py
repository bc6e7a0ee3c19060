"""Samples a second of ``mtlbalance run`` beside a bare hand-written loop of the same model and batches.

Whole runs take turns; of each, the epochs after the first count, with all that they hold: batches, steps, evaluation,
checkpoint, files. Then each part of a run is left out in turn, and one run is taken apart by the clock.

    python benchmarks/end_to_end.py --models mlp --rounds 8
    python benchmarks/end_to_end.py --models study --hidden-size 64 --steps 10 --out runs/end_to_end.json

Ratios are of CPU time on the CPU, and of wall time beside it, which the disk's waits are part of.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import methods
import run_plugin
import torch
from bare_loop import Model, train
from measuring import in_words, machine, markdown_header, markdown_row, paired_ratio, rounded, write_json
from run_parts import REST, WITHOUT, PartTimes, without
from run_plugin import STAMPS, RandomOptions, Stamp, draw, note_epoch, tasks_of

from mtlbalance.config import RunConfig, load_config
from mtlbalance.errors import MtlBalanceError
from mtlbalance.plugins import build_plugin
from mtlbalance.training.building import build_state
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.data import build_data
from mtlbalance.training.run import run_training
from mtlbalance.training.seeding import rng_state

RUN, BARE_LOOP = "mtlbalance run", "bare loop"
NO_EVALUATION = "without evaluation"
_HERE = Path(__file__).resolve().parent


class Setting:
    """A model, its data and the lengths of the runs."""

    def __init__(self, family: str, args: argparse.Namespace) -> None:
        self.family, self.args = family, args
        steps = args.steps or {"mlp": 180, "study": 12}[family]
        self.batch_size: int = args.batch_size
        self.samples, self.watched = steps * self.batch_size, args.watched
        self.shape = "rows" if family == "mlp" else "windows"

    def overrides(self) -> list[str]:
        """Return what the config says of the backbone."""
        if self.family == "mlp":
            return ["backbone.name=mlp", f"backbone.hidden_sizes={[self.args.width] * 3}"]
        return ["backbone.name=cnn-bilstm-attention", f"backbone.hidden_size={self.args.hidden_size}"]

    def config(self, folder: Path, *more: str) -> RunConfig:
        """Return a run's config."""
        path = folder / "run.toml"
        path.write_text(
            'plugins = ["run_plugin", "mtlbalance_cmapss"]\n[dataset]\nname = "random"\n'
            f'shape = "{self.shape}"\nsamples = {self.samples}\nwatched = {self.watched}\n'
            f'[backbone]\nname = "mlp"\n[balancer]\nname = "{self.args.balancer}"\n'
            f"[training]\nepochs = {self.args.epochs}\nbatch_size = {self.batch_size}\n"
            f'[run]\ndevice = "{self.args.device}"\n'
        )
        return load_config(path, [*self.overrides(), *more])


def epoch_times(stamps: Sequence[Stamp], device: torch.device) -> tuple[float, float]:
    """Return the mean time of an epoch after the first: as ratios are taken of it, and of the wall's clock."""
    count, first, last = len(stamps) - 1, stamps[0], stamps[-1]
    wall = (last.wall_seconds - first.wall_seconds) / count
    return (wall if device.type == "cuda" else (last.cpu_seconds - first.cpu_seconds) / count), wall


def run(setting: Setting, folder: Path, *more: str, part: str = "") -> list[Stamp]:
    """Take one run to its end, without one of its parts, and return its stamps."""
    STAMPS.clear()
    config = setting.config(folder, *more)
    with without(part) if part else nullcontext(), tempfile.TemporaryDirectory(dir=folder) as out:
        try:
            run_training(config, out=Path(out) / "run", quiet=True)
        except MtlBalanceError:
            if not part or len(STAMPS) < setting.args.epochs:
                raise  # else the results want what was left out, which is after all epochs
    return list(STAMPS)


def bare(setting: Setting, folder: Path) -> list[Stamp]:
    """Take the bare loop with the model that the config describes."""
    STAMPS.clear()
    config = setting.config(folder)
    options = config.dataset.options
    assert isinstance(options, RandomOptions)
    device, tasks, data = setting.args.device, tasks_of(options), build_data(config)
    torch.manual_seed(config.run.seed)
    backbone: Any = build_plugin(config.backbone.registration, config.backbone.options, data.inputs, tasks)
    heads = getattr(backbone, "heads", None) or torch.nn.ModuleDict(
        {task.name: torch.nn.Linear(backbone.feature_size, task.outputs) for task in tasks}
    )
    scalar = {task.name: task.kind == "regression" and task.outputs == 1 for task in tasks}
    model = Model(backbone.trunk, heads, scalar).to(device)
    balancer = build_plugin(config.balancer.registration, config.balancer.options, tasks).to(device)

    def on_device(count: int, seed: int) -> Any:
        inputs, targets = draw(options, count, seed)
        return inputs.to(device), {task: target.to(device) for task, target in targets.items()}

    train(
        model,
        balancer,
        on_device(options.samples, 0),
        on_device(options.watched, 1),
        epochs=setting.args.epochs,
        batch_size=setting.batch_size,
    )
    return list(STAMPS)


def ways(setting: Setting, folder: Path, *, parts: bool) -> dict[str, Callable[[], list[Stamp]]]:
    """Return what is compared."""
    found: dict[str, Callable[[], list[Stamp]]] = {
        BARE_LOOP: lambda: bare(setting, folder),
        RUN: lambda: run(setting, folder),
    }
    if not parts:
        return found

    def leaving_out(part: str) -> Callable[[], list[Stamp]]:
        return lambda: run(setting, folder, part=part)

    found |= {f"without {part}": leaving_out(part) for part in WITHOUT}
    found[NO_EVALUATION] = lambda: run(setting, folder, "dataset.watched=1")
    found["through a DataLoader"] = lambda: run(setting, folder, "dataset.in_memory=false")
    found["without deterministic algorithms"] = lambda: run(setting, folder, "run.deterministic=false")
    return found


def taken_apart(setting: Setting, folder: Path) -> dict[str, float]:
    """Return the share of each part in the wall time of a run's epochs."""
    times = PartTimes()

    def note() -> None:
        note_epoch()
        if len(STAMPS) == 1:
            times.seconds.clear()  # the first epoch is left out

    with times.watching(), patch.object(run_plugin, "note_epoch", note):
        stamps = run(setting, folder)
    seconds = stamps[-1].wall_seconds - stamps[0].wall_seconds
    shares = {part: taken / seconds for part, taken in times.seconds.items()}
    return {**dict(sorted(shares.items(), key=lambda item: -item[1])), REST: 1.0 - sum(shares.values())}


def measure_setting(setting: Setting, rounds: int, *, parts: bool) -> dict[str, Any]:
    """Return the figures of one model."""
    device = setting.args.device
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compared = ways(setting, folder, parts=parts)
        times: dict[str, list[float]] = {way: [] for way in compared}
        walls: dict[str, list[float]] = {way: [] for way in compared}
        order, shuffler = list(compared), random.Random(0)
        bare(setting, folder)
        for _ in range(rounds):
            shuffler.shuffle(order)
            for way in order:
                counted, wall = epoch_times(compared[way](), device)
                times[way].append(counted)
                walls[way].append(wall)
        shares = taken_apart(setting, folder)
    found: dict[str, Any] = {
        "family": setting.family,
        "balancer": setting.args.balancer,
        "steps_per_epoch": setting.samples // setting.batch_size,
        "batch_size": setting.batch_size,
        "watched": setting.watched,
        "samples_per_second": {way: round(setting.samples / median(wall)) for way, wall in walls.items()},
        "speed": {way: paired_ratio(times[BARE_LOOP], times[way]) for way in compared},
        "wall_speed": {way: paired_ratio(walls[BARE_LOOP], walls[way]) for way in compared},
        "time_to_run": {way: paired_ratio(times[way], times[RUN]) for way in compared},
        "seconds_per_epoch": {way: rounded(values) for way, values in times.items()},
        "shares": shares,
    }
    return found


def checkpoint_cost(args: argparse.Namespace, times: int = 5) -> dict[str, Any]:
    """Return what a checkpoint of the study's model costs, and as a share of epochs of several lengths."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = Setting("study", args)
        config = setting.config(folder, f"backbone.hidden_size={args.checkpoint_hidden_size}")
        state = build_state(config, build_data(config), torch.device(args.device))
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()  # so that there is all that a run would save
        state.epoch = 0
        checkpoints, cpu, wall = Checkpoints(folder / "checkpoints"), [], []
        for _ in range(times):
            before = time.process_time(), time.perf_counter()
            state.best.update(state.epoch, -float(state.epoch))
            checkpoints.save(state, [rng_state()], is_best=True)
            cpu.append(time.process_time() - before[0])
            wall.append(time.perf_counter() - before[1])
            state.epoch += 1
        size = sum(path.stat().st_size for path in checkpoints.folder.glob(f"epoch_{state.epoch - 1:05d}*"))
    return {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "megabytes": round(size / 1e6, 1),
        "cpu_seconds": median(cpu),
        "wall_seconds": median(wall),
    }


def print_result(result: dict[str, Any]) -> None:
    """Print one model's tables."""
    steps = f"{result['steps_per_epoch']} steps of {result['batch_size']} an epoch"
    print(f"\n{result['family']}, {result['balancer']}, {steps}, {result['watched']} samples evaluated\n")
    print(
        markdown_header(
            ["", "samples a second", "speed to the bare loop", "by the wall's clock", "time to the run"]
        )
    )
    for way in result["speed"]:
        ratios = [result[key][way] for key in ("speed", "wall_speed", "time_to_run")]
        cells = [f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})" for ratio in ratios]
        print(markdown_row([way, result["samples_per_second"][way], *cells]))
    parts = ", ".join(f"{part} {100 * share:.1f} %" for part, share in result["shares"].items())
    print(f"\nwhere a run's time goes: {parts}", flush=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=["mlp", "study"], default=["mlp", "study"])
    parser.add_argument("--balancer", default="gaba", choices=methods.METHODS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--epochs", type=int, default=4, help="of each run; the first is left out (default: 4)"
    )
    parser.add_argument("--steps", type=int, help="an epoch; default: 180 of the mlp, 12 of the study model")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--watched", type=int, default=259, help="samples evaluated in every epoch")
    parser.add_argument("--width", type=int, default=256, help="of the mlp's three hidden layers")
    parser.add_argument("--hidden-size", type=int, default=64, help="of the study model (its own: 256)")
    parser.add_argument("--checkpoint-hidden-size", type=int, default=256)
    parser.add_argument("--no-parts", action="store_true", help="compare run and bare loop alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    if args.epochs < 2:
        parser.error("--epochs must be at least 2: the first epoch is left out")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write the figures as they come."""
    args = parse_arguments(argv)
    sys.path.insert(0, str(_HERE.parent / "examples" / "cmapss"))
    torch.set_num_threads(args.threads)
    where = machine(args.threads, str(args.device))
    print(in_words(where))
    checkpoint = checkpoint_cost(args)
    print(
        "a checkpoint of the study model:",
        ", ".join(f"{key} {value:.4g}" for key, value in checkpoint.items()),
    )
    results = []
    for family in args.models:
        result = measure_setting(Setting(family, args), args.rounds, parts=not args.no_parts)
        print_result(result)
        results.append(result)
        write_json(args.out, {"machine": where, "checkpoint": checkpoint, "results": results})


if __name__ == "__main__":
    main()
