"""The section of a results page on floors: which targets lie below what balancing must cost on the machine."""

from __future__ import annotations

from collections.abc import Iterator

from figures import OURS, Figures, Row, pick, with_interval
from page_steps import cell, table
from targets import gaba_bounds

_FLOORS = {  # the lowest first
    "any_kernel": "what the machine can",
    "products": "torch's products",
    "products_and_bytes": "torch's products and bytes",
}
_EXACT_FORMS = ("", "factors", "outputs alone")


def floor_section(figures: Figures) -> Iterator[str]:
    """Floors beside targets, then where they come from: a step's parts, and the ceilings."""
    if "floor" not in figures:
        return
    results = list(figures.workloads("floor"))
    yield "## What the floor is"
    yield (
        "Ratios to the plain sum, of GABA: the plain step as measured, and what a balanced step must do beyond it, "
        "counted operation by operation and taken at ceilings measured in the same rounds ([how](../../floor.py)). "
        "Products as torch takes them; by any kernel: products and bytes with each product by the faster of torch's "
        "BLAS and oneDNN. K bare passes are of the same rounds; by hand and measured are those of the other sections, "
        "of another run. A target below the floor is bold."
    )
    heading = ["model", "form", "target", "floor by products", "and bytes", "by any kernel", "K bare passes"]
    rows = [row for result in results for row in _floor_rows(figures, result)]
    yield table([*heading, "by hand", "measured", "the target lies"], rows)
    yield (
        "Factors: as ghost.py has them, where they spare anything here. Outputs alone: its K passes down to what the "
        "linear layers put out, without anything that norms are read from; no exact method by K such passes costs less."
    )
    yield (
        "The plain step: FLOPs of its parts, in millions, and how much of its time its products take at their ceilings "
        "as torch takes them, and moving its bytes (AdamW's included). The rest is calls, caches that hold other "
        "numbers, and memory asked for and given back."
    )
    yield table(
        [
            "model",
            "ms",
            "trunk forward",
            "heads",
            "trunk backward = a task more",
            "products",
            "bytes",
            "rest",
        ],
        [_part_row(result) for result in results],
    )
    yield "The ceilings: most of a trunk's backward pass, a large product, and copying (bytes read and written):"
    yield table(
        ["rows x inner x columns, operands", "GFLOP/s as torch takes it", "by any kernel"],
        list(_product_rows(results)),
    )
    yield table(["copied", "GB/s"], list(_copy_rows(results)))


def _floor_rows(figures: Figures, result: Row) -> Iterator[list[object]]:
    bounds = gaba_bounds(result)
    steps = next(
        (
            row
            for row in (*figures.workloads("steps_study", "steps_models"), *figures.finest("steps_solvers"))
            if row["workload"] == result["workload"]
        ),
        None,
    )
    taken = "factors" if any(floor["form"] == "factors" for floor in result["floors"]) else ""
    for floor in result["floors"]:
        form = floor["form"]
        bound = bounds.get("" if form in _EXACT_FORMS else form)
        if bound is None:
            continue
        judged = form == taken or bool(form)  # all gradients are made only where that is the cheaper form
        verdict, below = _judged(bound, result, floor) if judged else ("(see factors)", False)
        ours = pick(steps, OURS, "gaba", "" if form == taken else form) if steps else None
        yield [
            result["workload"],
            form or "exact",
            f"**{bound:g}**" if below else f"{bound:g}",
            with_interval(floor["products"]),
            with_interval(floor["products_and_bytes"]),
            with_interval(floor["any_kernel"]),
            with_interval(result["bare_passes"]) if not form else "",
            cell(pick(steps, "floor", "gaba by hand")) if steps and not form else "",
            cell(ours) if ours and (form or not taken) else "",
            verdict,
        ]


def _judged(bound: float, result: Row, floor: Row) -> tuple[str, bool]:
    """Return where a target lies, and whether that is below the floor; within its interval it is at the floor."""
    for key, what in _FLOORS.items():
        if bound < floor[key]["low"]:
            return f"below {what} by {floor[key]['median'] - bound:.2f}", True
        if bound <= floor[key]["high"]:
            return f"at {what}", False
    above = f"above by {bound - floor['products_and_bytes']['median']:.2f}"
    if not floor["form"] and bound < result["bare_passes"]["low"]:
        above += ", but below K bare passes"
    return above, False


def _part_row(result: Row) -> list[object]:
    millions = {name: flops / 1e6 for name, flops in result["flops"].items()}
    products, moving = result["plain_products"]["median"], result["plain_moving"]["median"]
    return [
        result["workload"],
        f"{1000 * result['plain_seconds']:.2f}",
        f"{millions['trunk_forward']:.0f}",
        f"{millions['heads_forward'] + millions['heads_backward']:.0f}",
        f"{millions['trunk_backward']:.0f}",
        *(f"{100 * share:.0f} %" for share in (products, moving, 1 - products - moving)),
    ]


def _product_rows(results: list[Row]) -> Iterator[list[object]]:
    """Yield what is a tenth of a trunk's backward pass, and the large product, with the range over workloads."""
    shown: dict[str, list[Row]] = {}
    for result in results:
        for product in result["products"]:
            share = product["flops"] * product["of_a_pass"] / result["flops"]["trunk_backward"]
            if share > 0.1 or product["product"] == result["square"]:
                shown.setdefault(product["product"], []).append(product)
    for name, products in shown.items():
        keys = ("flops_per_second", "flops_per_second_any_kernel")
        yield [name, *(_range([product[key] / 1e9 for product in products]) for key in keys)]


def _copy_rows(results: list[Row]) -> Iterator[list[object]]:
    for copies in zip(*(result["copies"] for result in results), strict=True):
        size = copies[0]["bytes"]
        name = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        yield [name, _range([copy["bytes_per_second"] / 1e9 for copy in copies])]


def _range(rates: list[float]) -> str:
    low, high = f"{min(rates):.0f}", f"{max(rates):.0f}"
    return low if low == high else f"{low} to {high}"
