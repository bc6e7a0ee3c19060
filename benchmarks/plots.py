"""The plots of a results page; needs matplotlib, which only ``make bench`` installs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from figures import OURS, Figures, Row, best, own_methods, pick, value_of
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

BLUE, ORANGE, GREEN, GREY, LIGHT = "#1f5fa8", "#d8741a", "#3f8f4f", "#7a7a7a", "#dddddd"
COLOURS = {OURS: BLUE, "torchjd": ORANGE, "LibMTL": GREEN, "floor": GREY}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.dpi": 110,
    "savefig.bbox": "tight",
}
plt.rcParams.update(STYLE)
_PANELS = ("gaba", "pcgrad", "upgrad", "cagrad", "nash-mtl", "mgda", "aligned-mtl", "gradnorm")
_BARE = ("floor", "K backward passes", "")


def _ratio_axis(axis: Any, ticks: Sequence[float]) -> None:
    """Show ratios as plain numbers on a log axis."""
    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _ticks(
    low: float, high: float, candidates: Sequence[float] = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100)
) -> list[float]:
    return [tick for tick in candidates if low <= tick <= high]


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside the ends of lines on a log axis, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    step = (high / low) ** 0.05
    placed = 0.0
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(y, placed * step)
        axes.annotate(
            text,
            (x, y),
            xytext=(x * 1.08, placed),
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path


def steps_by_tasks(figures: Figures, path: Path) -> Path:
    """Ratio of a step against the number of tasks, a panel a method."""
    results = sorted(figures.workloads("steps_mlp"), key=lambda result: int(result["tasks"]))
    methods = [method for method in _PANELS if method in own_methods(results[0])]
    rows = -(-len(methods) // 4)
    figure, grid = plt.subplots(rows, 4, figsize=(13, 3.1 * rows + 0.4), sharex=True, squeeze=False)
    most = max(
        value_of(row)
        for result in results
        for row in result["variants"]
        if row["method"] in methods and "ratio" in row
    )
    for axes, method in zip(grid.flat, methods, strict=False):
        axes.set(title=method, xscale="log", yscale="log", ylim=(0.9, most * 1.15))
        lines: list[tuple[str, str, str, Callable[[Row], Row | None]]] = [
            ("K bare passes", GREY, ":", lambda result: pick(result, *_BARE))
        ]
        if method == "gaba":
            lines += [
                ("K+1 passes", BLUE, "--", lambda result: pick(result, OURS, "gaba", "K+1 passes")),
                ("exact", BLUE, "-", lambda result: pick(result, OURS, "gaba")),
                ("features", BLUE, "-.", lambda result: pick(result, OURS, "gaba", "features")),
                (
                    "every 10th",
                    BLUE,
                    (0, (1, 1)),
                    lambda result: pick(result, OURS, "gaba", "every 10th step"),
                ),  # type: ignore[list-item]
            ]
        else:
            lines.append((OURS, BLUE, "-", lambda result, m=method: pick(result, OURS, m)))  # type: ignore[misc]
            for peer in ("torchjd", "LibMTL"):
                lines.append((peer, COLOURS[peer], "-", lambda result, m=method, p=peer: best(result, p, m)))  # type: ignore[misc]
        ends = []
        for name, colour, style, find in lines:
            found = [(int(result["tasks"]), value_of(row)) for result in results if (row := find(result))]
            if found:
                axes.plot(
                    *zip(*found, strict=True),
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    linewidth=1.6 if colour == BLUE else 1.2,
                )
                ends.append((*found[-1], name, colour))
        _label_ends(axes, ends)
        axes.axhline(1, color=LIGHT, linewidth=1, zorder=0)
        _ratio_axis(axes.xaxis, [result["tasks"] for result in results])
        _ratio_axis(axes.yaxis, _ticks(0.9, most * 1.15, (1, 1.5, 2, 3, 5, 10, 20, 50)))
    for axes in list(grid.flat)[len(methods) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("tasks K")
    for axes in grid[:, 0]:
        axes.set_ylabel("step / plain sum's step")
    figure.subplots_adjust(wspace=0.55, hspace=0.25)
    return _save(figure, path)


def all_methods(figures: Figures, path: Path, tasks: int) -> Path:
    """Every method's ratio at one number of tasks, the peers beside."""
    result = next(result for result in figures.workloads("steps_mlp") if result["tasks"] == tasks)
    bare = pick(result, *_BARE)
    return _dots(
        result,
        path,
        "ratio",
        f"a step / plain sum's step ({result['workload']})",
        value_of(bare) if bare else None,
    )


def memory(figures: Figures, path: Path, tasks: int) -> Path:
    """Every method's memory at one number of tasks, the peers beside."""
    result = next(result for result in figures.workloads("memory") if result["tasks"] == tasks)
    text = f"copies of the trunk's gradients beyond the plain sum's, at the peak of a step (K = {tasks})"
    return _dots(result, path, "peak_copies", text, None)


def _rule_rows(axes: Axes, count: int) -> None:
    """Draw a faint line behind each row."""
    axes.hlines(
        range(count), 0, 1, transform=axes.get_yaxis_transform(), color="#f0f0f0", linewidth=1, zorder=0
    )


def _dots(result: Row, path: Path, key: str, text: str, floor: float | None) -> Path:
    """Draw a row a method and a dot a library, cheapest at the top; ratios on a log axis."""
    found = {method: pick(result, OURS, method) for method in own_methods(result)}
    ours = {method: value_of(row, key) for method, row in found.items() if row}
    methods = sorted(ours, key=lambda method: ours[method], reverse=True)
    figure, axes = plt.subplots(figsize=(8.5, 0.21 * len(methods) + 1.1))
    _rule_rows(axes, len(methods))
    for source, marker in (("LibMTL", "^"), ("torchjd", "s"), (OURS, "o")):
        points = []
        for position, method in enumerate(methods):
            row = found[method] if source == OURS else best(result, source, method, key)
            if row:
                points.append((value_of(row, key), position))
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                color=COLOURS[source],
                marker=marker,
                s=26 if source == OURS else 20,
                label=source,
                zorder=3 if source == OURS else 2,
                alpha=0.95,
            )
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=text, ylim=(-0.7, len(methods) - 0.3))
    if key == "ratio":
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        _ratio_axis(axes.xaxis, _ticks(low, high))
        axes.axvline(1, color=LIGHT, linewidth=1, zorder=0)
    if floor is not None:
        axes.axvline(floor, color=GREY, linewidth=1, linestyle=":", zorder=0)
        axes.text(
            floor, len(methods) - 0.2, "K bare passes", color=GREY, fontsize=8, ha="center", va="bottom"
        )
    axes.legend(frameon=False, loc="upper right", handletextpad=0.1)
    return _save(figure, path)


def models(figures: Figures, path: Path) -> Path:
    """GABA's forms and the peers' PCGrad on every model."""
    results = [
        result
        for result in figures.workloads("steps_study", "steps_models", "steps_mlp_linear", "steps_mlp")
        if pick(result, OURS, "gaba")
    ]
    marks: list[tuple[str, str, str, Callable[[Row], Row | None]]] = [
        ("K bare passes", GREY, "|", lambda result: pick(result, *_BARE)),
        ("LibMTL PCGrad", GREEN, "^", lambda result: best(result, "LibMTL", "pcgrad")),
        ("torchjd PCGrad", ORANGE, "s", lambda result: best(result, "torchjd", "pcgrad")),
        ("GABA, K+1 passes", BLUE, "x", lambda result: pick(result, OURS, "gaba", "K+1 passes")),
        ("GABA, exact", BLUE, "o", lambda result: pick(result, OURS, "gaba")),
        (
            "GABA, every 10th step",
            "#7fa9d6",
            "D",
            lambda result: pick(result, OURS, "gaba", "every 10th step"),
        ),
        ("GABA, features", "#7fa9d6", "v", lambda result: pick(result, OURS, "gaba", "features")),
    ]
    figure, axes = plt.subplots(figsize=(8.5, 0.34 * len(results) + 1.3))
    _rule_rows(axes, len(results))
    for name, colour, marker, find in marks:
        points = [
            (value_of(row), len(results) - 1 - index)
            for index, result in enumerate(results)
            if (row := find(result))
        ]
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                s=60 if marker == "|" else 24,
                label=name,
            )
    axes.set_yticks(range(len(results)), [result["workload"] for result in reversed(results)])
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="log", xlabel="a step / plain sum's step", ylim=(-0.7, len(results) - 0.3))
    low, high = axes.get_xlim()
    _ratio_axis(axes.xaxis, _ticks(low, high))
    axes.axvline(1, color=LIGHT, linewidth=1, zorder=0)
    axes.legend(
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncol=4,
        fontsize=8,
        handletextpad=0.1,
        columnspacing=1,
    )
    return _save(figure, path)
