"""Tables of a results page: cells, and the sections on targets, steps and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from figures import OURS, Figures, Row, best, own_methods, pick, value_of, with_interval
from measuring import markdown_header, markdown_row
from targets import Outcome, outcomes

FORMS = ("", "every 10th step", "features", "K+1 passes")


def table(heading: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    return "\n".join([markdown_header([str(cell) for cell in heading]), *(markdown_row(row) for row in rows)])


def cell(row: Row | None) -> str:
    """Return a variant's ratio with its interval, or a dash."""
    return "-" if row is None else with_interval(row["ratio"])


def short(row: Row | None) -> str:
    """Return a variant's ratio alone, or a dash."""
    return "-" if row is None else f"{value_of(row):.2f}"


def target_section(figures: Figures) -> Iterator[str]:
    """The targets, a row each and a column where it was measured."""
    found = list(outcomes(figures))
    if not found:
        return
    yield "## Targets"
    met = sum(outcome.met for outcome in found)
    yield (
        f"{met} of {len(found)} figures keep to their target by the median; those that do not are bold. Where a part "
        "measured few methods of the mlp in many rounds, its figures are here, not those of all methods further down."
    )
    alone = [outcome for outcome in found if not outcome.where or outcome.where.endswith("run")]
    cells = {(o.what, o.where): _judged(o) for o in found if o not in alone}
    places = list(dict.fromkeys(place for _, place in cells))
    rows = [
        [what, *(cells.get((what, place), "") for place in places)]
        for what in dict.fromkeys(what for what, _ in cells)
    ]
    if rows:
        yield table(["measured (target)", *places], rows)
    yield "\n".join(f"- {o.what}{', ' if o.where else ''}{o.where}: {_judged(o)}" for o in alone)


def _judged(outcome: Outcome) -> str:
    """Return a figure with its target, bold where it does not keep to it."""
    text = f"{outcome.ratio.median:.2f}"
    if abs(outcome.ratio.median - outcome.bound) < 0.05:
        text = f"{outcome.ratio.median:.3f}"
    sign = "≥" if outcome.least else "≤"
    return f"{text if outcome.met else f'**{text}**'} ({sign} {outcome.bound:g})"


def step_section(figures: Figures) -> Iterator[str]:
    """What a step costs with every method."""
    results = sorted(figures.workloads("steps_mlp"), key=lambda result: int(result["tasks"]))
    if not results:
        return
    yield "## A training step, every method"
    yield (
        "Forward, balancing, backward and AdamW, as a ratio to the plain sum of the losses: median over rounds (95 % "
        "bootstrap interval), in the order of the last column."
    )
    heading = ["method", *(f"K = {result['tasks']}" for result in results)]
    methods = sorted(
        own_methods(results[-1]), key=lambda m: value_of(pick(results[-1], OURS, m) or {"ratio": 0.0})
    )
    rows: list[list[object]] = [
        ["plain sum, ms a step", *(f"{1000 * r['plain_seconds']:.2f}" for r in results)]
    ]
    rows.append(
        ["plain sum, fused AdamW", *(cell(pick(r, "floor", "plain sum", "fused AdamW")) for r in results)]
    )
    rows.append(
        [
            "K backward passes and nothing else",
            *(cell(pick(r, "floor", "K backward passes")) for r in results),
        ]
    )
    if any(pick(r, "floor", "gaba by hand") for r in results):
        rows.append(
            [
                "gaba written out by hand, without any check",
                *(cell(pick(r, "floor", "gaba by hand")) for r in results),
            ]
        )
    rows += [
        [f"**{method}**", *(cell(pick(result, OURS, method)) for result in results)] for method in methods
    ]
    yield table(heading, rows)
    yield from peer_tables(results)


def peer_tables(results: Sequence[Row]) -> Iterator[str]:
    """Ours beside the peers', where they have the method."""
    methods = [
        m
        for m in own_methods(results[-1])
        if any(best(r, peer, m) for r in results for peer in ("torchjd", "LibMTL"))
    ]
    if not methods:
        return
    yield "### Beside torchjd and LibMTL"
    yield (
        "ours / torchjd / LibMTL; of each peer the cheapest of its forms (torchjd: differentiated at once, one after "
        "another, or by its autogram engine). - : it does not have the method, or it failed."
    )
    rows = [
        [
            method,
            *(
                " / ".join(
                    short(best(result, source, method) if source != OURS else pick(result, OURS, method))
                    for source in (OURS, "torchjd", "LibMTL")
                )
                for result in results
            ),
        ]
        for method in methods
    ]
    yield table(["method", *(f"K = {result['tasks']}" for result in results)], rows)
    failures = {
        (row["name"], row["failure"]) for result in results for row in result["variants"] if "failure" in row
    }
    if failures:
        lines = "\n".join(f"- {name}: {failure}" for name, failure in sorted(failures))
        yield f"<details><summary>what failed</summary>\n\n{lines}\n\n</details>"


def model_section(figures: Figures) -> Iterator[str]:
    """GABA's forms on every model."""
    results = [
        r
        for r in figures.workloads("steps_study", "steps_models", "steps_mlp_linear", "steps_mlp")
        if pick(r, OURS, "gaba")
    ]
    if not results:
        return
    yield "## GABA's forms, every model"
    heading = ["model", "plain sum", "K bare passes", "exact", *FORMS[1:], "torchjd PCGrad", "LibMTL PCGrad"]
    rows: list[list[object]] = []
    for result in results:
        cells: list[object] = [result["workload"], f"{1000 * result['plain_seconds']:.1f} ms"]
        cells.append(cell(pick(result, "floor", "K backward passes")))
        cells += [cell(pick(result, OURS, "gaba", form)) for form in FORMS]
        rows.append([*cells, *(cell(best(result, peer, "pcgrad")) for peer in ("torchjd", "LibMTL"))])
    yield table(heading, rows)
    fused = list(figures.workloads("steps_mlp_fused"))
    if fused:
        yield "With `AdamW(fused=True)` on both sides of the ratio:"
        rows = [
            [
                r["workload"],
                f"{1000 * r['plain_seconds']:.2f} ms",
                *(cell(pick(r, OURS, "gaba", form)) for form in FORMS),
            ]
            for r in fused
        ]
        yield table(["model", "plain sum", "exact", *FORMS[1:]], rows)


def way_section(figures: Figures) -> Iterator[str]:
    """Fused AdamW, compiled modules and bfloat16."""
    results = list(figures.workloads("steps_compiled", "steps_bf16", "steps_bf16_large"))
    if not results:
        return
    yield "## Fused AdamW, compiled modules, bfloat16"
    yield (
        "Each cell: ratio to the plain sum as it is, then to the plain sum made in the same way. Compiled: trunk and "
        "each head by `torch.compile`; bf16: forward and losses under autocast; MATH attention: "
        "`sdpa_kernel(SDPBackend.MATH)` around them."
    )
    heading = ["", "plain sum", "K bare passes", "exact", *FORMS[1:3]]
    variants = [("floor", "plain sum", ""), ("floor", "K backward passes", "")]
    variants += [(OURS, "gaba", form) for form in FORMS[:3]]
    for result in results:
        rows: list[list[object]] = []
        for way in ("", *ways_of(result)):
            rows.append([way or "as it is"])
            for source, method, form in variants:
                row = pick(result, source, method, ", ".join(filter(None, (form, way))))
                alike = with_interval(row["to_plain_alike"]) if row and "to_plain_alike" in row else ""
                rows[-1].append(" / ".join(filter(None, (cell(row), alike))))
        yield f"{result['workload']}, plain sum {1000 * result['plain_seconds']:.2f} ms:"
        yield table(heading, rows)


def ways_of(result: Row) -> list[str]:
    """Return the ways in which a workload's plain sum was measured beside itself."""
    return [
        row["form"] for row in result["variants"] if row["method"] == "plain sum" and "to_plain_alike" in row
    ]


def memory_section(figures: Figures) -> Iterator[str]:
    """What balancing holds."""
    parts = {
        "memory": "Convolutions, as for any layer that is not a wide linear one on few rows:",
        "memory_linear": "Wide linear layers on few rows, whose gradients are kept as their factors:",
    }
    if not any(part in figures for part in parts):
        return
    yield "## Memory"
    yield (
        "Copies of the trunk's gradients beyond the plain sum's, at the peak of a step, counted allocation by "
        "allocation; in brackets what is kept between steps. Ours / torchjd (cheapest form) / LibMTL."
    )
    for part, text in parts.items():
        if part in figures:
            yield text
            yield memory_table(list(figures.workloads(part)))


def memory_table(results: Sequence[Row]) -> str:
    """Return the table of one kind of trunk."""

    def held(row: Row | None) -> str:
        if row is None:
            return "-"
        kept = f" ({row['kept_copies']:.0f})" if row["kept_copies"] >= 0.5 else ""
        return f"{row['peak_copies']:.1f}{kept}"

    methods = own_methods(results[-1])
    rows: list[list[object]] = []
    for method in methods:
        cells = [
            " / ".join(
                held(pick(r, OURS, method) if s == OURS else best(r, s, method, "peak_copies"))
                for s in (OURS, "torchjd", "LibMTL")
            )
            for r in results
        ]
        rows.append([method, *(cell.removesuffix(" / - / -") for cell in cells)])
    others = [("gaba", form) for form in (*FORMS[1:], "low memory")] + [("pcgrad", "low memory")]
    forms = [[f"{m}, {form}", *(held(pick(r, OURS, m, form)) for r in results)] for m, form in others]
    return table(["method", *(f"K = {result['tasks']}" for result in results)], [*rows, *forms])
