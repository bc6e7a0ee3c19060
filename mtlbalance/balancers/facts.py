"""What can be said of a method in one row of a table, read off an instance and never written by hand."""

from __future__ import annotations

from mtlbalance.balancers.base import Balancer

_OF_EVERY_BALANCER = {"applied_weights", "nonfinite_calls", "solved_present"}
_SUMS = {"free": "not fixed", "given": "as given", "none": "no weights"}


FACT_HEADINGS = {
    "reads": "reads",
    "passes": "trunk passes",
    "memory": "extra memory (trunk gradients)",
    "host": "copied to the host",
    "heads": "heads get",
    "sum": "weights sum to",
    "state": "state beyond the base's",
    "learned": "learned parameters",
}


def method_facts(balancer: Balancer) -> dict[str, str]:
    """Return what a method reads, costs and keeps, by the column of a table.

    ``passes`` are backward passes through the trunk in a step that measures, for K tasks; ``memory`` is what a
    step holds beyond the plain sum's, in copies of the trunk's gradients; ``sum`` is what the applied weights
    sum to.
    """
    state = [name for name, _ in balancer.named_buffers(recurse=False) if name not in _OF_EVERY_BALANCER]
    if balancer.generator is not None:
        state.append("generator")
    learned = [name for name, _ in balancer.named_parameters(recurse=False)]
    return {
        "reads": balancer.reads,
        "passes": balancer.passes,
        "memory": balancer.extra_memory,
        "state": ", ".join(state) or "none",
        "learned": ", ".join(learned) or "none",
        "heads": balancer.heads_get or ("weighted" if balancer.scale_heads else "own gradient"),
        "sum": _SUMS.get(balancer.weight_sum, balancer.weight_sum),
        "host": "K×K numbers a measured step" if balancer.copies_to_host else "nothing",
    }
