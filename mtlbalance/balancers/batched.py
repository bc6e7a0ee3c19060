"""The tasks' passes through the trunk as one, batched over tasks: ``delivery="batched"``.

Each task is differentiated down to where it meets others, one after another, so that heads cost what they always do.
What arrives there is stacked, and the trunk is passed once for all, by vmap over its backward operations. Where tasks
meet in places of which one leads to another, such as a penalty on the trunk's weights in each loss, all is passed
together, heads too. The gradients are the same, to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlbalance.balancers.base import Call
from mtlbalance.balancers.graph import Edge, Node, Walk, beyond
from mtlbalance.balancers.probe import Plan
from mtlbalance.balancers.signals import Gradients, require_related, task_gradients
from mtlbalance.errors import InvalidArgumentError

Rows = dict[int, Gradients]


def batched_gradients(
    call: Call, plan: Plan, scales_K: Tensor | None, tasks: Sequence[str]
) -> tuple[Rows, Rows]:
    """Return the gradients of several tasks of ``plan.shared`` and ``plan.several``, and those of their own leaves.

    Args:
        call: whose losses are differentiated.
        plan: by what they are: leaves, as of representations there is nothing to batch.
        scales_K: what the losses are multiplied by before, or None.
        tasks: their names, for messages.

    Raises:
        InvalidArgumentError: an operation of the trunk cannot be batched.
        SharedParametersError: a task reaches none of the shared tensors.
    """
    losses = call.losses
    if scales_K is not None:
        losses = {index: loss * scales_K[index] for index, loss in losses.items()}
    found = _together(losses, plan, retain_graph=call.retain_graph or not plan.direct)
    width = len(plan.shared) + len(plan.several)
    for index, row in found.items():
        require_related(tasks[index], row, plan.shared)
    return {i: row[:width] for i, row in found.items()}, {i: row[width:] for i, row in found.items()}


def _together(losses: Mapping[int, Tensor], plan: Plan, *, retain_graph: bool) -> Rows:
    """Return each task's gradients as ``Plan.ends_of`` has them."""
    shared = [*plan.shared, *plan.several]
    nodes_of = [Walk().down([(loss.grad_fn, loss.output_nr)]).nodes for loss in losses.values()]
    found: list[dict[int, Tensor | None]] = [{} for _ in losses]  # by task, then by a leaf's id
    frontier = _frontier(nodes_of, list(losses.values()))
    if frontier is None:
        outputs: Sequence[Tensor | GradientEdge] = list(losses.values())
        arriving = [[torch.ones_like(o) if o is loss else None for o in outputs] for loss in losses.values()]
        leaves = [*shared, *(leaf for own in plan.own.values() for leaf in own)]
    else:
        outputs = [GradientEdge(*edge) for edge in frontier]
        under = {id(leaf) for leaf in Walk().down(frontier).leaves()}
        leaves = [tensor for tensor in shared if id(tensor) in under]
        above = [tensor for tensor in shared if id(tensor) not in under]
        arriving = []
        for place, (index, loss) in enumerate(losses.items()):
            ends = [*above, *plan.own[index]]
            keep = retain_graph or place + 1 < len(losses)  # DDP's node, or a hook's, lies above all heads
            gradients = task_gradients(loss, [*outputs, *ends], retain_graph=keep)
            arriving.append(gradients[: len(outputs)])
            found[place] |= {id(end): g for end, g in zip(ends, gradients[len(outputs) :], strict=True)}
    passed = _pass_together(outputs, arriving, leaves, retain_graph=retain_graph)
    for place, (loss, nodes) in enumerate(zip(losses.values(), nodes_of, strict=True)):
        reached = {id(loss), *(id(leaf) for leaf in Walk(nodes=nodes).leaves())}
        for leaf, gradient_K in zip(leaves, passed, strict=True):
            if gradient_K is not None and id(leaf) in reached:
                found[place][id(leaf)] = gradient_K[place]
    return {
        index: [found[place].get(id(tensor)) for tensor in (*shared, *plan.own[index])]
        for place, index in enumerate(losses)
    }


def _frontier(nodes_of: Sequence[set[Node]], losses: Sequence[Tensor]) -> list[Edge] | None:
    """Return the edges from what one task alone runs to what several run; None if one of them leads to another."""
    tasks_at = Counter(node for nodes in nodes_of for node in nodes)
    edges: dict[Edge, None] = {}
    for loss, nodes in zip(losses, nodes_of, strict=True):
        alone = [node for node in nodes if tasks_at[node] == 1]
        for edge in [
            (loss.grad_fn, loss.output_nr),
            *(edge for node in alone for edge in node.next_functions),
        ]:
            reached = beyond(edge)
            if tasks_at[reached[0]] > 1:
                edges[reached] = None
    meetings = {node for node, _ in edges}
    below = Walk().down(edge for node in meetings for edge in node.next_functions).nodes
    return None if meetings & below else list(edges)


def _pass_together(
    outputs: Sequence[Tensor | GradientEdge],
    arriving: Sequence[Gradients],
    leaves: Sequence[Tensor],
    *,
    retain_graph: bool,
) -> Sequence[Tensor | None]:
    """Differentiate the leaves by what arrives at the outputs, for all tasks at once: (K, …) each."""
    stacked, used = [], []
    for output, column in zip(outputs, zip(*arriving, strict=True), strict=True):
        like = next((gradient for gradient in column if gradient is not None), None)
        if like is not None:
            used.append(output)
            stacked.append(torch.stack([torch.zeros_like(like) if g is None else g for g in column]))
    if not used or not leaves:
        return [None] * len(leaves)
    try:
        return torch.autograd.grad(
            used,  # type: ignore[arg-type]  # tensors or edges, all of one kind
            leaves,
            stacked,
            is_grads_batched=True,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise InvalidArgumentError(
            f"delivery='batched' is not possible: torch cannot pass this trunk for all tasks at once ({first}), as "
            "with cuDNN's recurrent layers and modules compiled by torch.compile; use delivery='auto'"
        ) from error
