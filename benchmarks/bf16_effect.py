"""What training in bfloat16 does to results: runs on C-MAPSS in pairs, and task gradients on the same weights.

Every seed is trained three times: in float32, with ``training.precision = "bf16"``, and in float32 with a learning
rate larger by one part in a million. The last tells how far runs drift apart that differ by rounding alone, which is
what a difference of bfloat16 has to be held against. What is compared is the last epoch, so that nothing is selected.

    MTLBALANCE_CMAPSS_DIR=/folder/with/train_FD001.txt python benchmarks/bf16_effect.py --seeds 5 --epochs 10

Finished runs are kept in --runs and read again.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from measuring import in_words, machine, markdown_header, markdown_row, write_json
from scipy import stats
from torch import Tensor

from mtlbalance.config import RunConfig, load_config
from mtlbalance.inference import load_run
from mtlbalance.training.building import build_state
from mtlbalance.training.data import build_data
from mtlbalance.training.losses import TaskLosses
from mtlbalance.training.precision import Precision, autocast
from mtlbalance.training.run import run_training
from mtlbalance.training.seeding import seed_everything

CMAPSS = Path(__file__).resolve().parents[1] / "examples" / "cmapss"
FP32: Precision = "fp32"
BF16: Precision = "bf16"
NUDGED = "fp32, nudged"
ARMS: dict[str, list[str]] = {
    FP32: [],
    NUDGED: ["training.lr=0.001000001"],
    BF16: ["training.precision=bf16"],
}
NO_DROPOUT = ["backbone.dropout=0.0", "backbone.attention_dropout=0.0"]  # its masks depend on the precision
METRICS = ("rmse_last", "rmse_all", "health_accuracy")
BATCHES = 4


def config_of(args: argparse.Namespace, seed: int, *more: str) -> RunConfig:
    """Return a run's config: the example's small one, on one subset."""
    overrides = [
        f"run.seed={seed}",
        f"dataset.subset={args.subset}",
        "dataset.source=nasa",
        f"backbone.hidden_size={args.hidden_size}",
        f"training.epochs={args.epochs}",
        f"training.batch_size={args.batch_size}",
        *args.overrides,
    ]
    return load_config(CMAPSS / "quickstart.toml", [*overrides, *more])


def folder_of(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return where a run lies."""
    runs: Path = args.runs
    return runs / arm.replace(", ", "_") / f"seed_{seed}"


def train(args: argparse.Namespace, arm: str, seed: int) -> dict[str, float]:
    """Train, or read what was trained; return what the last epoch came to."""
    folder = folder_of(args, arm, seed)
    run_training(config_of(args, seed, *ARMS[arm]), out=folder, quiet=True)
    results = json.loads((folder / "results.json").read_text())
    with (folder / "gradient_stats.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    found = {name: float(results["final_metrics"][name]) for name in METRICS}
    found |= {f"weight_{task}": float(row[f"applied_{task}"]) for task in ("rul", "health")}
    found |= {f"grad_norm_{task}": float(row[f"grad_norm_{task}"]) for task in ("rul", "health")}
    return found


def difference(arm: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Return the mean paired difference over seeds with its 95 % interval by Student's t."""
    pairs = [a - b for a, b in zip(arm, baseline, strict=True)]
    mean, half = fmean(pairs), float("nan")
    if len(pairs) > 1:
        half = float(stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def task_gradients(
    model: torch.nn.Module, losses: TaskLosses, batch: Any, precision: Precision
) -> dict[str, Tensor]:
    """Return each task's gradient of the trunk, flat and in float64."""
    inputs, targets = batch
    shared = list(model.get_submodule("trunk").parameters())
    with autocast(precision, inputs.device):
        found = losses(model(inputs), targets)
    return {
        task: torch.cat(
            [g.flatten().double() for g in torch.autograd.grad(loss.mean(), shared, retain_graph=True)]
        )
        for task, loss in found.items()
    }


def compare_gradients(args: argparse.Namespace, seed: int, moment: str) -> list[dict[str, Any]]:
    """Return how far the task gradients of both precisions are from those of float64, batch by batch.

    The weights are those of the run in float32, at its beginning or at its end; there is no dropout.
    """
    config = config_of(args, seed, *NO_DROPOUT)
    data = build_data(config)
    seed_everything(seed)
    model: torch.nn.Module = build_state(config, data, torch.device("cpu")).model
    if moment == "at the end":
        model.load_state_dict(load_run(folder_of(args, FP32, seed), weights="live").model.state_dict())
    exact, losses = build_state(config, data, torch.device("cpu")).model.double(), TaskLosses(data.tasks)
    exact.load_state_dict(model.state_dict())
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(seed)
    train_set: Any = data.train
    for _ in range(BATCHES):
        drawn = torch.randint(len(train_set), (args.batch_size,), generator=generator)
        inputs, targets, _ = train_set[drawn]
        doubled = {
            k: target.double() if target.is_floating_point() else target for k, target in targets.items()
        }
        reference = task_gradients(exact, losses, (inputs.double(), doubled), FP32)
        precisions: tuple[Precision, ...] = (FP32, BF16)
        for precision in precisions:
            found = task_gradients(model, losses, (inputs, targets), precision)
            row: dict[str, Any] = {"seed": seed, "moment": moment, "precision": precision}
            for task, expected in reference.items():
                gradient = found[task]
                cosine = gradient @ expected / (gradient.norm() * expected.norm())
                row[task] = {
                    "norm": float(expected.norm()),
                    "norm_error": float(gradient.norm() / expected.norm() - 1),
                    "one_minus_cosine": float(1 - cosine),
                }
            row["weight_error"] = _weight_of_first(found) - _weight_of_first(reference)
            rows.append(row)
    return rows


def _weight_of_first(gradients: Mapping[str, Tensor]) -> float:
    """Return GABA's weight of the first of two tasks, before it is smoothed."""
    first, second = (float(gradient.norm()) for gradient in gradients.values())
    return second / (first + second)


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return medians and extremes over seeds and batches."""
    found = []
    for moment, precision in product(("at the start", "at the end"), (FP32, BF16)):
        chosen = [row for row in rows if (row["moment"], row["precision"]) == (moment, precision)]
        one: dict[str, Any] = {"moment": moment, "precision": precision}
        for task in ("rul", "health"):
            errors = [abs(row[task]["norm_error"]) for row in chosen]
            one[task] = {
                "norm": median(row[task]["norm"] for row in chosen),
                "norm_error_median": median(errors),
                "norm_error_most": max(errors),
                "one_minus_cosine_most": max(row[task]["one_minus_cosine"] for row in chosen),
            }
        one["weight_error_most"] = max(abs(row["weight_error"]) for row in chosen)
        found.append(one)
    return found


def print_tables(
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    differences: Mapping[str, Any],
    gradients: Sequence[Mapping[str, Any]],
) -> None:
    """Print both tables."""
    names = list(runs[FP32][0])
    print(markdown_header(["last epoch", FP32, *(f"{arm} - fp32 (95 %)" for arm in (NUDGED, BF16))]))
    for name in names:
        cells = [f"{fmean(run[name] for run in runs[FP32]):.4g}"]
        for arm in (NUDGED, BF16):
            one = differences[arm][name]
            cells.append(f"{one['mean']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g})")
        print(markdown_row([name, *cells]))
    print()
    heading = [
        "weights",
        "precision",
        "task",
        "gradient norm",
        "its error: median",
        "most",
        "1 - cosine: most",
    ]
    print(markdown_header([*heading, "error of the weight: most"]))
    for row in gradients:
        for task in ("rul", "health"):
            one = row[task]
            cells = [f"{one['norm']:.3g}", f"{one['norm_error_median']:.1e}", f"{one['norm_error_most']:.1e}"]
            cells += [f"{one['one_minus_cosine_most']:.1e}", f"{row['weight_error_most']:.1e}"]
            print(markdown_row([row["moment"], row["precision"], task, *cells]))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value, of the config of all runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--subset", default="FD001")
    parser.add_argument("--hidden-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--runs", type=Path, default=Path("runs/bf16_effect"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, print the tables, and write the figures."""
    args = parse_arguments(argv)
    sys.path.insert(0, str(CMAPSS))
    torch.set_num_threads(1)
    where = machine(threads=1)
    print(in_words(where))
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for arm, found in runs.items():
            found.append(train(args, arm, seed))
        for moment in ("at the start", "at the end"):
            rows += compare_gradients(args, seed, moment)
    differences = {
        arm: {
            name: difference([run[name] for run in runs[arm]], [run[name] for run in runs[FP32]])
            for name in runs[FP32][0]
        }
        for arm in (NUDGED, BF16)
    }
    gradients = summary_of(rows)
    print_tables(runs, differences, gradients)
    options = {key: value for key, value in vars(args).items() if key not in ("runs", "out")}
    content = {"machine": where, "options": options, "runs": runs, "differences": differences}
    write_json(args.out, content | {"gradients": gradients})


if __name__ == "__main__":
    main()
