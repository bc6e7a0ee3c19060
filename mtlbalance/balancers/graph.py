"""Reading an autograd graph: which leaves does each task reach, and which do several tasks share?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Node: TypeAlias = Any  # the C++ nodes of autograd have no common Python base
Edge: TypeAlias = tuple[Node, int]

_PASS_THROUGH = ("_DDPSinkBackward", "BackwardHookFunctionBackward")


@dataclass(frozen=True)
class Reach:
    """What losses reach without passing through the shared tensors.

    Args:
        own: for each loss, the leaves that no other loss reaches (its head, its criterion).
        several: the other leaves, those that two or more losses reach.
    """

    own: list[list[Tensor]]
    several: list[Tensor]


def trace(losses: Sequence[Tensor], shared: Sequence[Tensor] = ()) -> Reach:
    """Walk the graphs of the losses down to their leaves, stopping at ``shared``.

    Each node is visited at most twice, whatever the number of losses: once by the first loss that
    reaches it, and once more if it lies below a node where two losses meet.
    """
    stops = _edges_of(shared)
    first_by: dict[Node, int] = {}
    meetings: list[Node] = []
    for index, loss in enumerate(losses):
        pending = _roots(loss, stops)
        while pending:
            node = pending.pop()
            if node in first_by:
                if first_by[node] != index:
                    meetings.append(node)
                continue
            first_by[node] = index
            pending.extend(_next_nodes(node, stops))
    shared_ids = {id(tensor) for tensor in shared}
    several = {id(leaf): leaf for leaf in leaves_below(meetings, stops) if id(leaf) not in shared_ids}
    own: list[list[Tensor]] = [[] for _ in losses]
    for node, index in first_by.items():
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in shared_ids and id(leaf) not in several:
            own[index].append(leaf)
    for index, loss in enumerate(losses):
        if loss.is_leaf and loss.requires_grad and id(loss) not in shared_ids:
            own[index].append(loss)  # a loss that is itself a parameter
    return Reach(own, list(several.values()))


def leaves_below(nodes: Iterable[Node], stops: frozenset[Edge] = frozenset()) -> list[Tensor]:
    """Return the leaves reached from ``nodes`` without crossing an edge in ``stops``."""
    leaves: list[Tensor] = []
    for node in nodes_below(nodes, stops):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
    return leaves


def nodes_below(nodes: Iterable[Node], stops: frozenset[Edge] = frozenset()) -> set[Node]:
    """Return ``nodes`` and every node reached from them without crossing an edge in ``stops``."""
    seen: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(_next_nodes(node, stops))
    return seen


def _edges_of(tensors: Iterable[Tensor]) -> frozenset[Edge]:
    return frozenset((tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None)


def _roots(loss: Tensor, stops: frozenset[Edge]) -> list[Node]:
    edge = _through((loss.grad_fn, loss.output_nr), stops)
    return [] if edge[0] is None or edge in stops else [edge[0]]


def _next_nodes(node: Node, stops: frozenset[Edge]) -> Iterator[Node]:
    for edge in node.next_functions:
        followed = _through(edge, stops)
        if followed[0] is not None and followed not in stops:
            yield followed[0]


def _through(edge: Edge, stops: frozenset[Edge]) -> Edge:
    """Follow an edge through nodes that hand each output's gradient to the input of the same number.

    DistributedDataParallel and module hooks put such a node around all outputs of a module; taken as a
    whole, every task would seem to reach every head.
    """
    while edge not in stops and type(edge[0]).__name__ in _PASS_THROUGH:
        edge = edge[0].next_functions[edge[1]]
    return edge


def come_for_free(leaves: Sequence[Tensor], losses: Sequence[Tensor], shared: Sequence[Tensor]) -> bool:
    """Return whether a pass down to ``shared`` runs every operation that ``leaves`` feed into anyway.

    True for a normalisation left out of ``shared``; False for the layers below a shared layer, which a probe
    would otherwise not enter. Leaves that are no parameters, such as inputs that require a gradient, hang
    below the first layer and are taken as free.
    """
    stops = _edges_of(shared)
    nodes = nodes_below([node for loss in losses for node in _roots(loss, stops)], stops)
    users: dict[Node, list[Node]] = {}
    for node in nodes:
        for below in _next_nodes(node, frozenset()):
            users.setdefault(below, []).append(node)
    shared_ids = {id(tensor) for tensor in shared}
    pending = [node for node in nodes if id(getattr(node, "variable", None)) in shared_ids]
    pending += [node for node in nodes if any(_through(edge, stops) in stops for edge in node.next_functions)]
    run: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in run:
            run.add(node)
            pending.extend(users.get(node, []))
    wanted = {id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter)}
    ends = [node for node in nodes if id(getattr(node, "variable", None)) in wanted]
    return all(user in run for node in ends for user in users.get(node, []))


def reaches(loss: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Return whether ``loss`` depends on at least one of ``tensors``."""
    wanted = {id(tensor) for tensor in tensors if tensor.is_leaf}
    nodes = nodes_below(_roots(loss, frozenset()))
    below = any(tensor.grad_fn in nodes for tensor in tensors if tensor.grad_fn is not None)
    return below or id(loss) in wanted or any(id(leaf) in wanted for leaf in leaves_below(nodes))


def casts_to_half(losses: Iterable[Tensor]) -> bool:
    """Return whether float16 values lie between the losses and their leaves, as under autocast."""
    nodes = nodes_below([node for loss in losses for node in _roots(loss, frozenset())])
    return any(
        metadata.dtype == torch.float16
        for node in nodes
        if type(node).__name__ == "ToCopyBackward0"
        for metadata in node._input_metadata
    )


def obstacle_to_direct_delivery(shared: Sequence[Tensor], others: Sequence[Tensor]) -> str:
    """Say why measured gradients cannot be handed over as they are, or return an empty string.

    Gradients are handed over at the shared tensors and at the leaves ``others``. From a representation
    the backward pass goes on into the trunk, so nothing that it reaches there may be handed over as well.
    """
    for tensor in (*shared, *others):
        if tensor._backward_hooks:
            return (
                "a hook registered on a tensor (register_hook) would run in the probe and again at delivery"
            )
    representations = [tensor for tensor in shared if tensor.grad_fn is not None]
    if not representations:
        return ""
    trunk = nodes_below(
        node for tensor in representations for node in _next_nodes(tensor.grad_fn, frozenset())
    )
    if any(tensor.grad_fn in trunk for tensor in representations):
        return "one of the representations in shared_params is computed from another"
    below = {id(leaf) for leaf in leaves_below(trunk)}
    if any(id(tensor) in below for tensor in (*shared, *others)):
        return "a parameter is used both before and after the representations in shared_params"
    return ""
