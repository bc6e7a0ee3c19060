"""Tables of a results page on bfloat16: what it does to results, and the ways to compute attention in it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from figures import Figures, with_interval
from page_steps import table


def precision_section(figures: Figures) -> Iterator[str]:
    """The effect on results, and attention."""
    parts = [*_effect(figures), *_attention(figures)]
    if parts:
        yield "## What bfloat16 does to results, and attention in it"
        yield from parts


def _effect(figures: Figures) -> Iterator[str]:
    if "bf16_effect" not in figures:
        return
    found = figures["bf16_effect"]
    options, runs, differences = found["options"], found["runs"], found["differences"]
    arms = list(differences)
    yield (
        f"GABA on C-MAPSS {options['subset']}, the example's small model with hidden size {options['hidden_size']}, "
        f"{options['epochs']} epochs of batches of {options['batch_size']}, {options['seeds']} seeds: means of the "
        "last epoch in float32, and mean paired differences (95 % by Student's t). Nudged: float32 with a learning "
        "rate larger by one part in a million, which shows how far rounding alone drives runs apart."
    )
    rows = [
        [
            name,
            f"{fmean(run[name] for run in runs['fp32']):.4g}",
            *(_signed(differences[a][name]) for a in arms),
        ]
        for name in runs["fp32"][0]
    ]
    yield table(["last epoch", "fp32", *(f"{arm} - fp32" for arm in arms)], rows)
    yield (
        "Task gradients on the same weights and batches (those of the runs in float32, without dropout), held against "
        "float64; the weight is GABA's of the first task, before it is smoothed:"
    )
    heading = ["weights", "precision", "task", "gradient norm", "its relative error: median", "most"]
    errors = [
        [
            row["moment"],
            row["precision"],
            task,
            f"{row[task]['norm']:.3g}",
            *(f"{row[task][key]:.1e}" for key in ("norm_error_median", "norm_error_most")),
            f"{row[task]['one_minus_cosine_most']:.1e}",
            f"{row['weight_error_most']:.1e}",
        ]
        for row in found["gradients"]
        for task in ("rul", "health")
    ]
    yield table([*heading, "1 - cosine: most", "error of the weight: most"], errors)


def _signed(difference: dict[str, float]) -> str:
    return f"{difference['mean']:+.3g} ({difference['low']:+.3g} to {difference['high']:+.3g})"


def _attention(figures: Figures) -> Iterator[str]:
    if "attention_path" not in figures:
        return
    results = figures["attention_path"]["results"]
    yield (
        "One self-attention layer of 8 heads without dropout, forward and backward, to PyTorch's choice in float32; "
        "with dropout PyTorch takes MATH by itself:"
    )
    names = list(results[0]["ratios"])
    rows: list[list[object]] = []
    for result in results:
        cells = [with_interval(result["ratios"][name]) for name in names]
        cells.append(with_interval(result["bf16_math_to_choice"]))
        rows.append([result["width"], result["length"], *cells])
    yield table(["width", "length", *names, "bf16: MATH to PyTorch's choice"], rows)
