"""Write the page of a results folder: the machine, the targets, tables and plots, all from its JSON files.

    python benchmarks/page.py benchmarks/results/2026-11-21-amd-epyc-2-cores

Without matplotlib the page has no plots, and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from figures import Figures
from measuring import in_words
from page_floor import floor_section
from page_precision import precision_section
from page_runs import growth_section, other_section, run_section
from page_steps import memory_section, model_section, step_section, target_section, way_section

NO_PLOTS = "The plots are left out: matplotlib is not installed here (`pip install --group bench`)."
Section = Callable[[Figures], Iterator[str]]


def draw(figures: Figures) -> dict[Section, list[str]]:
    """Draw what can be drawn into the folder; return the files' names by the section that shows them."""
    import plots
    import plots_of_runs

    folder = figures.folder
    counts = [int(result["tasks"]) for result in figures.workloads("steps_mlp")]
    drawn: dict[Section, list[Path]] = {}
    if counts:
        middle = 8 if 8 in counts else max(counts)
        drawn[step_section] = [plots.all_methods(figures, folder / "methods.png", middle)]
        if len(counts) > 1:
            drawn[step_section].insert(0, plots.steps_by_tasks(figures, folder / "steps_by_tasks.png"))
        drawn[model_section] = [plots.models(figures, folder / "models.png")]
    held = [int(result["tasks"]) for result in figures.workloads("memory")]
    if held:
        drawn[memory_section] = [plots.memory(figures, folder / "memory.png", 8 if 8 in held else max(held))]
    if figures.growth():
        drawn[growth_section] = [plots_of_runs.growth(figures, folder / "growth.png")]
    if "end_to_end" in figures:
        drawn[run_section] = [plots_of_runs.end_to_end(figures, folder / "end_to_end.png")]
    return {section: [path.name for path in paths] for section, paths in drawn.items()}


SECTIONS: tuple[Section, ...] = (
    target_section,
    floor_section,
    step_section,
    model_section,
    way_section,
    precision_section,
    memory_section,
    run_section,
    growth_section,
    other_section,
)


def write(folder: Path) -> Path:
    """Write a folder's page and plots; return the page's path."""
    figures = Figures(folder)
    can_draw = find_spec("matplotlib") is not None
    shown = draw(figures) if can_draw else {}
    parts = [
        f"# {folder.name}",
        f"Measured on: {in_words(figures.machine())}. How to read it: [benchmarks](../../README.md). What was "
        "tried, with what was expected and found: [a table](../../README.md#what-was-tried-and-what-is-left).",
        *figures.commits(),
    ]
    if not can_draw:
        parts.append(NO_PLOTS)
    for section in SECTIONS:
        written = list(section(figures))
        pictures = [
            f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in shown.get(section, [])
        ]
        parts += [*written[:1], *pictures, *written[1:]]
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the JSON files lie")
    args = parser.parse_args(argv)
    if not any(args.folder.glob("*.json")):
        print(f"error: there are no figures in {args.folder}; `make bench` writes them", file=sys.stderr)
        return 2
    print(write(args.folder))
    if find_spec("matplotlib") is None:
        print(NO_PLOTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
