"""Tables of a results page: whole runs, growth, the allocator and imports."""

from __future__ import annotations

from collections.abc import Iterator

from figures import OURS, Figures, Row, pick, value_of, with_interval
from page_steps import cell, table

_STUDY_STEPS, _STUDY_BATCH = 210, 256  # an epoch of examples/cmapss/fd002_gaba.toml
_STUDY_SAMPLES_A_SECOND = 31_625  # on its GPU, as it reports


def run_section(figures: Figures) -> Iterator[str]:
    """Whole runs."""
    parts = ("end_to_end", "end_to_end_speed", "end_to_end_study")
    results = list(figures.workloads(*parts))
    if not results:
        return
    yield "## `mtlbalance run` beside a bare hand-written loop"
    yield (
        "Same model, balancer, batches, optimizer, clipping, weight average and evaluation; the bare loop has no "
        "checks, checkpoints, files or statistics. Speed: the bare loop's CPU time over the run's, by epochs after "
        "the first."
    )
    for result in results:
        shape = f"{result['steps_per_epoch']} steps of {result['batch_size']} an epoch"
        yield f"{result['family']}, {result['balancer']}, {shape}, {result['watched']} samples evaluated:"
        rows = [
            [way, rate, with_interval(result["speed"][way], 3), with_interval(result["time_to_run"][way], 3)]
            for way, rate in result["samples_per_second"].items()
        ]
        yield table(["", "samples a second", "speed to the bare loop", "time to the whole run's"], rows)
    checkpoint = next(figures[part]["checkpoint"] for part in reversed(parts) if part in figures)
    yield checkpoint_words(figures, checkpoint)


def checkpoint_words(figures: Figures, checkpoint: Row) -> str:
    """Return what a checkpoint costs, and as a share of the study's epoch."""
    seconds, cpu = checkpoint["wall_seconds"], checkpoint["cpu_seconds"]
    epochs = {
        "at the samples a second that the study reports of its GPU": _STUDY_STEPS
        * _STUDY_BATCH
        / _STUDY_SAMPLES_A_SECOND
    }
    for result in figures.workloads("steps_study"):
        row = pick(result, OURS, "gaba")
        if row:
            epochs["on this CPU, one thread"] = _STUDY_STEPS * value_of(row) * result["plain_seconds"]
    shares = [
        f"{100 * seconds / (epoch + seconds):.1f} % of one {where} ({epoch:.3g} s)"
        for where, epoch in epochs.items()
    ]
    millions = checkpoint["parameters"] / 1e6
    return (
        f"A checkpoint of the study's model ({millions:.1f} M parameters; {checkpoint['megabytes']:.0f} MB, and the "
        f"best weights anew) takes {seconds:.2f} s, {cpu:.2f} s of it CPU time. Of its epoch of {_STUDY_STEPS} steps "
        f"that is {', '.join(shares)}."
    )


def growth_section(figures: Figures) -> Iterator[str]:
    """Growth with tasks, parameters and ranks."""
    scaling = figures.growth()
    if not scaling:
        return
    yield "## Growth"
    for part, key in (("tasks", "tasks"), ("parameters", "trunk_numbers")):
        results = scaling.get(part) or []
        if results:
            names = [(row["source"], row["method"], row["form"]) for row in results[0]["variants"]]
            rows = [
                [
                    method + (f", {form}" if form else ""),
                    *(cell(pick(r, source, method, form)) for r in results),
                ]
                for source, method, form in names
                if method != "plain sum"
            ]
            label = "K" if part == "tasks" else "P"
            yield table([part, *(f"{label} = {float(result[key]):.3g}" for result in results)], rows)
    if scaling.get("ranks"):
        ranks = scaling["ranks"]
        yield (
            f"Ranks (gloo, {ranks[0]['tasks']} tasks): CPU time of the slowest rank to the plain sum's on as many "
            "ranks, and in brackets what the balancer sends a step, in copies of the trunk's gradients:"
        )
        rows = [
            [
                way,
                *(
                    f"{with_interval(r['ways'][way]['cpu_ratio'])} ({r['ways'][way]['sent_copies']:.2f})"
                    for r in ranks
                ),
            ]
            for way in ranks[0]["ways"]
        ]
        yield table(["", *(f"{result['ranks']} ranks" for result in ranks)], rows)


def other_section(figures: Figures) -> Iterator[str]:
    """Allocator and imports."""
    if "allocator" in figures and figures["allocator"].get("rows"):
        yield "## The C library's memory thresholds"
        yield f"`GLIBC_TUNABLES={figures['allocator']['tunables']}`, or `mallopt` with the same values:"
        rows = [
            [
                r["model"],
                r["method"],
                r["setting"],
                f"{1000 * r['cpu_seconds']:.2f}",
                with_interval(r["ratio"]),
                f"{r['page_faults']:.0f}",
                f"{r['resident_megabytes']:.0f}",
            ]
            for r in figures["allocator"]["rows"]
        ]
        yield table(
            ["model", "step", "thresholds", "CPU ms a step", "ratio", "page faults a step", "MiB resident"],
            rows,
        )
    if "import_time" in figures:
        found = figures["import_time"]
        yield "## Imports"
        rows = [[f"`{statement}`", with_interval(ratio)] for statement, ratio in found["ratios"].items()]
        yield table(["statement", "CPU time to `import torch`"], rows)
