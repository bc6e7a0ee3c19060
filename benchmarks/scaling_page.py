"""Write the tables of docs/scaling.md from cost_model.py.

    python benchmarks/scaling_page.py            # write
    python benchmarks/scaling_page.py --check    # exit 1 if a table is out of date

The table of what real ranks did is not among them: ``scaling_check.py --page docs/scaling.md`` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hardware as h100
from cost_model import (
    EVERY_10TH,
    EVERY_10TH_LOW_MEMORY,
    EXACT,
    FEATURES,
    GRAMIAN,
    GRAMIAN_LOW_MEMORY,
    LAST_LAYERS,
    LOSSES,
    LOW_MEMORY,
    NORMS,
    OPTIONS,
    PLAIN,
    STREAMING,
    Job,
    Option,
    Wrapper,
    cost,
    ratio,
)
from hardware import Hardware
from measuring import markdown_header, markdown_row

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
TASKS = 4
USES = 16_384  # samples times positions of a rank: eight sequences of 2,048
FEATURE_WIDTH = 4_096
HEAD_NUMBERS = 25_000  # of one task's head
RANKS = (1, 8, 64, 1024)
SHARED_NUMBERS = (1e7, 1e8, 1e9, 1e10, 1e11)
SHOWN = (LOSSES, EXACT, LOW_MEMORY, NORMS, EVERY_10TH, EVERY_10TH_LOW_MEMORY, LAST_LAYERS, FEATURES)
ONE_LINK = Hardware(links=1)


def job(ranks: int, shared_numbers: float, tasks: int = TASKS) -> Job:
    """Return what the page is about."""
    return Job(tasks, shared_numbers, tasks * HEAD_NUMBERS, USES * FEATURE_WIDTH, ranks, USES)


def wrapper_for(found: Job, hardware: Hardware) -> Wrapper | None:
    """Return DDP where the plain sum fits so, else FSDP2, and None where that does not fit either."""
    wrappers: tuple[Wrapper, ...] = ("DDP", "FSDP2") if found.ranks > 1 else ("DDP",)
    return next((each for each in wrappers if cost(PLAIN, found, hardware, each).fits), None)


def cell(option: Option, found: Job, hardware: Hardware) -> str:
    """Return the predicted ratio and memory, or why there is none."""
    wrapper = wrapper_for(found, hardware)
    if wrapper is None:
        return "model does not fit"
    if wrapper == "FSDP2" and not option.works_with_fsdp:
        return "refused: FSDP2"
    predicted = cost(option, found, hardware, wrapper)
    needed = f"{_short(predicted.total_bytes / 1e9)} GB"
    if not predicted.fits:
        return f"**does not fit** ({needed})"
    shown = f"{ratio(option, found, hardware, wrapper):.2f}, {needed}"
    return shown if wrapper == "DDP" else f"{shown} (FSDP2)"


def example_table() -> str:
    """Every option at 1e9 parameters on 64 GPUs."""
    found, hardware = job(64, 1e9), Hardware()
    lines = [
        markdown_header(
            [
                "K = 4, P = 1e9, 64 GPUs, DDP",
                "trunk passes",
                "sums over ranks",
                "sent by a rank, GB",
                "extra memory, GB",
                "step, ratio to the plain sum",
            ]
        )
    ]
    for option in OPTIONS:
        predicted = cost(option, found, hardware)
        lines.append(
            markdown_row(
                [
                    option.name,
                    f"{predicted.passes:.3g}",
                    f"{predicted.sums:.3g}",
                    _short(predicted.sent_bytes / 1e9),
                    _short(predicted.extra_bytes / 1e9),
                    f"{ratio(option, found, hardware):.2f}",
                ]
            )
        )
    return "\n".join(lines)


def sizes_table() -> str:
    """Options and sizes by GPUs; options that have nothing to show at a size have one row together."""
    lines = [markdown_header(["P", "option", *(_gpus(ranks) for ranks in RANKS)])]
    for numbers in SHARED_NUMBERS:
        jobs = [job(ranks, numbers) for ranks in RANKS]
        refused = all(wrapper_for(each, Hardware()) != "DDP" for each in jobs)
        if refused:
            cells = [cell(EXACT, each, Hardware()) for each in jobs]
            lines.append(markdown_row([_power(numbers), "all that read gradients of parameters", *cells]))
        for option in SHOWN:
            if option.works_with_fsdp or not refused:
                cells = [cell(option, each, Hardware()) for each in jobs]
                lines.append(markdown_row([_power(numbers), option.name, *cells]))
    return "\n".join(lines)


def links_table() -> str:
    """What a slower network makes of it."""
    named = [(ranks, hardware) for ranks in (64, 1024) for hardware in (Hardware(), ONE_LINK)]
    names = [
        f"{_gpus(ranks)}, {hardware.links} link{'s' * (hardware.links > 1)} a node"
        for ranks, hardware in named
    ]
    lines = [markdown_header(["K = 4, P = 1e9, DDP", *names])]
    for option in (*SHOWN, STREAMING):
        ratios = [f"{ratio(option, job(ranks, 1e9), hardware):.2f}" for ranks, hardware in named]
        lines.append(markdown_row([option.name, *ratios]))
    return "\n".join(lines)


def tasks_table() -> str:
    """What more tasks make of it."""
    counts = (2, 4, 8, 16, 32)
    lines = [markdown_header(["P = 1e9, 64 GPUs, DDP", *(f"K = {count}" for count in counts)])]
    for option in (*SHOWN, GRAMIAN, GRAMIAN_LOW_MEMORY, STREAMING):
        cells = [cell(option, job(64, 1e9, count), Hardware()) for count in counts]
        lines.append(markdown_row([option.name, *cells]))
    return "\n".join(lines)


def work_table() -> str:
    """What more or less work for each weight makes of it."""
    counts = (64, 1_024, 16_384, 262_144)
    header = ["K = 4, P = 1e8, 64 GPUs, DDP", *(f"{count:,} uses" for count in counts)]
    lines = [markdown_header(header)]
    for option in SHOWN:
        jobs = [replace(job(64, 1e8), uses=count, feature_numbers=count * FEATURE_WIDTH) for count in counts]
        lines.append(
            markdown_row([option.name, *(f"{ratio(option, each, Hardware()):.2f}" for each in jobs)])
        )
    return "\n".join(lines)


def assumptions_table() -> str:
    """The constants."""
    latencies = " / ".join(f"{1e6 * Hardware().sum_seconds(0, ranks):.0f}" for ranks in RANKS[1:])
    rows = [
        (
            "arithmetic",
            f"{h100.PEAK_FLOPS * h100.FLOPS_SHARE / 1e12:.0f} TFLOP/s",
            f"bfloat16 peak of an H100 SXM, {h100.PEAK_FLOPS / 1e12:.0f}, times a utilisation of {h100.FLOPS_SHARE}",
        ),
        (
            "GPU memory",
            f"{(h100.GPU_BYTES - h100.RESERVED_BYTES) / 1e9:.0f} GB for what is counted",
            f"{h100.GPU_BYTES / 1e9:.0f} GB less {h100.RESERVED_BYTES / 1e9:.0f} for activations and the allocator",
        ),
        ("memory traffic", f"{h100.MEMORY_BYTES_PER_S / 1e12:.1f} TB/s", "HBM3, 80 % of the data sheet"),
        (
            f"within {h100.NODE_RANKS} GPUs",
            f"{h100.NVLINK_BYTES_PER_S / 1e9:.0f} GB/s",
            "NVLink 4, one direction, 80 % of the data sheet",
        ),
        (
            "between nodes",
            f"{8 * h100.LINK_BYTES_PER_S / 1e9:.0f} GB/s a node",
            "eight 400 Gb/s links at 80 %; a table below has one",
        ),
        (
            "latency of a sum",
            f"{latencies} µs",
            "at 8, 64, 1,024 GPUs: launch and a tree's hops; the order of magnitude",
        ),
        (
            "work",
            f"{USES:,} uses of each weight a rank and step",
            "samples times positions, say eight sequences of 2,048; a table below has others",
        ),
        ("numbers", "float32 parameters and gradients", "bfloat16 arithmetic by autocast; AdamW"),
        ("heads", f"{HEAD_NUMBERS:,} numbers each", "linear"),
        (
            "features",
            f"{FEATURE_WIDTH:,} numbers a position, float32",
            "not pooled; pooled ones cost nothing",
        ),
    ]
    return "\n".join([markdown_header(["what", "value", "why"]), *(markdown_row(row) for row in rows)])


TABLES = {
    "assumptions": assumptions_table,
    "example": example_table,
    "sizes": sizes_table,
    "links": links_table,
    "tasks": tasks_table,
    "work": work_table,
}


def with_block(text: str, name: str, content: str) -> str:
    """Return ``text`` with what stands between ``<!-- name -->`` and ``<!-- end -->`` replaced."""
    start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
    before, rest = text.split(start, 1)
    _, after = rest.split(end, 1)
    return before + start + content + end + after


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    before = after = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        after = with_block(after, name, table())
    if before == after:
        return 0
    if "--check" in arguments:
        print("docs/scaling.md is out of date; run python benchmarks/scaling_page.py", file=sys.stderr)
        return 1
    PAGE.write_text(after, encoding="utf-8")
    return 0


def _gpus(ranks: int) -> str:
    return "1 GPU" if ranks == 1 else f"{ranks:,} GPUs"


def _power(numbers: float) -> str:
    return f"{numbers:.0e}".replace("e+", "e").replace("e0", "e")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"


if __name__ == "__main__":
    sys.exit(main())
