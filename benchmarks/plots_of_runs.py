"""The plots of whole runs and of growth; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import OURS, Figures, Row, pick, value_of
from matplotlib import pyplot as plt
from plots import BLUE, GREEN, GREY, LIGHT, ORANGE, _label_ends, _ratio_axis, _save, _ticks

_COLOURS = {
    "K bare passes": GREY,
    "gaba": BLUE,
    "gaba, norms": "#5b8fcb",
    "gaba, every 10th step": "#5b8fcb",
    "gaba, features": "#9dbde0",
    "rlw": "#333333",
    "pcgrad": ORANGE,
    "mgda": GREEN,
    "upgrad": "#8a4fa3",
    "cagrad": "#b03a48",
    "nash-mtl": "#2a9aa0",
}


def growth(figures: Figures, path: Path) -> Path:
    """Ratio of a step against tasks, parameters and ranks, as far as they were measured."""
    scaling = figures.growth()
    parts = [part for part in ("tasks", "parameters", "ranks") if scaling.get(part)]
    figure, grid = plt.subplots(1, len(parts), figsize=(4.4 * len(parts), 3.6), squeeze=False)
    for axes, part in zip(grid.flat, parts, strict=True):
        lines = _of_ranks(scaling[part]) if part == "ranks" else _of_variants(scaling[part], part)
        top = max(y for points in lines.values() for _, y in points)
        axes.set(title=f"against {part}", xscale="log", yscale="log", ylim=(0.9, top * 1.2))
        ends = []
        for name, points in lines.items():
            colour = _COLOURS.get(name, "#9a7b1c")
            style = ":" if name == "K bare passes" else "-"
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=style,
                marker="o",
                markersize=3,
                linewidth=1.4,
            )
            ends.append((*points[-1], name, colour))
        _label_ends(axes, ends)
        axes.axhline(1, color=LIGHT, linewidth=1, zorder=0)
        _ratio_axis(axes.yaxis, _ticks(0.9, top * 1.2, (1, 1.5, 2, 3, 5, 10, 20, 50)))
        if part != "parameters":
            _ratio_axis(axes.xaxis, [result[part] for result in scaling[part]])
        axes.set_xlabel(
            {
                "tasks": "tasks K",
                "parameters": "numbers in the trunk",
                "ranks": "ranks (gloo, CPU time of the slowest)",
            }[part]
        )
    grid[0, 0].set_ylabel("step / plain sum's step")
    figure.subplots_adjust(wspace=0.75)
    return _save(figure, path)


def _of_variants(results: list[Row], part: str) -> dict[str, list[tuple[float, float]]]:
    key = "tasks" if part == "tasks" else "trunk_numbers"
    names = [(row["source"], row["method"], row["form"]) for row in results[0]["variants"]]
    lines = {}
    for source, method, form in names:
        if method == "plain sum":
            continue
        title = "K bare passes" if source != OURS else method + (f", {form}" if form else "")
        points = [
            (float(result[key]), value_of(row))
            for result in results
            if (row := pick(result, source, method, form))
        ]
        if points:
            lines[title] = points
    return lines


def _of_ranks(results: list[Row]) -> dict[str, list[tuple[float, float]]]:
    return {
        way: [(float(result["ranks"]), value_of(result["ways"][way], "cpu_ratio")) for result in results]
        for way in results[0]["ways"]
        if way != "plain sum"
    }


def end_to_end(figures: Figures, path: Path) -> Path:
    """The speed of a run beside the bare loop's, and where its time goes."""
    results = [
        result
        for part in ("end_to_end", "end_to_end_study")
        if part in figures
        for result in figures[part]["results"]
    ]
    figure, grid = plt.subplots(
        len(results), 2, figsize=(12.5, 2.9 * len(results)), squeeze=False, width_ratios=[1, 1.1]
    )
    for (left, right), result in zip(grid, results, strict=True):
        _speeds(left, result)
        _shares(right, result)
    figure.subplots_adjust(wspace=0.5, hspace=0.45)
    return _save(figure, path)


def _speeds(axes: Any, result: Row) -> None:
    ways = [way for way in result["speed"] if way != "bare loop"][::-1]
    for position, way in enumerate(ways):
        ratio = result["speed"][way]
        colour = BLUE if way == "mtlbalance run" else GREY
        axes.plot([ratio["low"], ratio["high"]], [position, position], color=colour, linewidth=2, alpha=0.5)
        axes.plot(ratio["median"], position, "o", color=colour, markersize=5)
        axes.annotate(
            f"{ratio['median']:.2f}",
            (ratio["median"], position),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=colour,
        )
    axes.set_yticks(range(len(ways)), ways)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=LIGHT, linewidth=1, zorder=0)
    axes.axvline(0.97, color=ORANGE, linewidth=1, linestyle=":", zorder=0)
    axes.set(
        title=f"{result['family']}: speed, the bare loop's is 1 (target: dotted)",
        ylim=(-0.6, len(ways) - 0.2),
    )


def _shares(axes: Any, result: Row) -> None:
    shares = {part: share for part, share in result["shares"].items() if share >= 0.001}
    parts = list(shares)[::-1]
    axes.barh(range(len(parts)), [100 * shares[part] for part in parts], color=BLUE, height=0.65)
    for position, part in enumerate(parts):
        axes.text(
            100 * shares[part] + 0.6, position, f"{100 * shares[part]:.1f} %", va="center", fontsize=7.5
        )
    axes.set_yticks(range(len(parts)), parts)
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_title(f"{result['family']}: where the wall time of an epoch goes")
