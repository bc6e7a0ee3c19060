"""Reading an autograd graph: which leaves does each task reach, and which do several tasks share?"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Node: TypeAlias = Any  # the C++ nodes of autograd have no common Python base
Edge: TypeAlias = tuple[Node, int]

_LEAF = "AccumulateGrad"
# Nodes that hand each output's gradient to the input of the same number. DistributedDataParallel and module
# hooks put one around all outputs of a module; taken as a whole, every task would seem to reach every head.
_PASS_THROUGH = ("_DDPSinkBackward", "BackwardHookFunctionBackward")
# Nodes that truly mix all outputs of a model with all its parameters, heads included.
_OPAQUE = ("CompiledFunctionBackward", "BroadcastBackward")
# A linear layer multiplies by its transposed weight: where that comes in, and the name under which its input is saved.
PRODUCTS = {"AddmmBackward0": (2, "mat1"), "MmBackward0": (1, "self")}


class Reach(NamedTuple):
    """What losses reach without passing through the shared tensors.

    Args:
        own: for each loss, the leaves that no other loss reaches (its head, its criterion).
        several: the other leaves, those that two or more losses reach.
        opaque: whether some of ``several`` hang on a node that hides who reaches them (a compiled model).
        products: the nodes of linear layers.
    """

    own: list[list[Tensor]]
    several: list[Tensor]
    opaque: bool
    products: list[Node]


@dataclass
class Walk:
    """Nodes reached from some edges, and the stopping edges that were met on the way."""

    stops: frozenset[Edge] = frozenset()
    nodes: set[Node] = field(default_factory=set)
    met: set[Edge] = field(default_factory=set)

    def down(self, edges: Iterable[Edge]) -> Walk:
        """Go down from ``edges`` as far as the stops allow."""
        stops, nodes, pending = self.stops, self.nodes, list(edges)
        while pending:
            edge = pending.pop()
            node = edge[0]
            if stops and edge in stops:
                self.met.add(edge)
            elif node is not None and node not in nodes:
                name = type(node).__name__
                if name in _PASS_THROUGH:
                    pending.append(node.next_functions[edge[1]])
                    continue
                nodes.add(node)
                if name != _LEAF:  # which has nothing below
                    pending += node.next_functions
        return self

    def enter(self, edges: Iterable[Edge]) -> Iterator[Node]:
        """Yield the nodes that the edges lead to, beyond nodes that only pass gradients on."""
        for edge in edges:
            while not self._stop(edge) and _passes(edge[0]):
                edge = edge[0].next_functions[edge[1]]
            if edge not in self.stops and edge[0] is not None:
                yield edge[0]

    def _stop(self, edge: Edge) -> bool:
        if self.stops and edge in self.stops:
            self.met.add(edge)
            return True
        return False

    def leaves(self) -> list[Tensor]:
        """Return the leaves among the nodes."""
        return [leaf for node in self.nodes if (leaf := _leaf(node)) is not None]


def trace(losses: Sequence[Tensor], shared: Sequence[Tensor] = ()) -> Reach:
    """Walk the graphs of the losses down to their leaves, stopping at ``shared``.

    Each node is visited at most twice, whatever the number of losses: once by the first loss that
    reaches it, and once more if it lies below a node where two losses meet. Nearly all of the time goes
    into asking nodes for what lies below them, so that is done once.
    """
    stops = _edges_of(shared)
    below_of: dict[Node, Sequence[Edge]] = {}
    first_by: dict[Node, int] = {}
    meetings: set[Node] = set()
    leaf_nodes: list[Node] = []
    products: list[Node] = []
    for index, loss in enumerate(losses):
        pending = [_edge(loss)]
        while pending:
            edge = pending.pop()
            node = edge[0]
            if node is None or (stops and edge in stops):
                continue
            first = first_by.get(node)
            if first is not None:
                if first != index:
                    meetings.add(node)
                continue
            name = type(node).__name__
            if name in _PASS_THROUGH:
                pending.append(node.next_functions[edge[1]])
                continue
            first_by[node] = index
            if name == _LEAF:
                leaf_nodes.append(node)
                continue
            below_of[node] = below = node.next_functions
            pending += below
            if name in PRODUCTS:
                products.append(node)
    met = _descendants(meetings, below_of, first_by, stops)
    shared_ids = {id(tensor) for tensor in shared}
    own: list[list[Tensor]] = [[] for _ in losses]
    several: list[Tensor] = []
    for node in leaf_nodes:
        leaf: Tensor = node.variable
        # Not what was frozen after the forward pass, nor what was asked for.
        if leaf.requires_grad and id(leaf) not in shared_ids:
            (several if node in met else own[first_by[node]]).append(leaf)
    for index, loss in enumerate(losses):
        if loss.is_leaf and loss.requires_grad and id(loss) not in shared_ids:
            own[index].append(loss)  # a loss that is itself a parameter
    opaque = bool(several) and any(type(node).__name__ in _OPAQUE for node in met)
    return Reach(own, several, opaque, products)


def _descendants(
    nodes: Iterable[Node],
    below_of: Mapping[Node, Sequence[Edge]],
    known: Container[Node],
    stops: frozenset[Edge],
) -> set[Node]:
    """Return ``nodes`` and all below them, as far as the stops allow; what is not known passes gradients on."""
    found = set(nodes)
    pending = [edge for node in found for edge in below_of.get(node, ())]
    while pending:
        edge = pending.pop()
        node = edge[0]
        if node is None or node in found or (stops and edge in stops):
            continue
        if node in known:
            found.add(node)
            pending += below_of.get(node, ())
        else:
            pending.append(node.next_functions[edge[1]])
    return found


def reaches(loss: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Return whether ``loss`` depends on at least one of ``tensors``."""
    wanted = {id(tensor) for tensor in tensors}
    walk = Walk(_edges_of(tensors)).down([_edge(loss)])
    return bool(walk.met) or id(loss) in wanted or any(id(leaf) in wanted for leaf in walk.leaves())


def reached(losses: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of ``tensors`` that at least one of ``losses`` depends on, also by way of another of them."""
    walk = Walk().down(_edge(loss) for loss in losses)
    leaves = {id(leaf) for leaf in walk.leaves()}
    return [t for t in tensors if (id(t) in leaves if t.grad_fn is None else t.grad_fn in walk.nodes)]


def come_for_free(leaves: Sequence[Tensor], losses: Sequence[Tensor], shared: Sequence[Tensor]) -> bool:
    """Return whether a pass down to ``shared`` runs every operation that ``leaves`` feed into anyway.

    True for a normalisation left out of ``shared``; False for the layers below a shared layer, which a probe
    would otherwise not enter. Leaves that are no parameters, such as inputs that require a gradient, hang
    below the first layer and are taken as free.
    """
    walk = Walk(_edges_of(shared)).down(_edge(loss) for loss in losses)
    users: dict[Node, list[Node]] = {}
    run: set[Node] = set()
    shared_ids = {id(tensor) for tensor in shared}
    pending = [node for node in walk.nodes if id(_leaf(node)) in shared_ids]
    for node in walk.nodes:
        step = Walk(walk.stops)
        for below in step.enter(node.next_functions):
            users.setdefault(below, []).append(node)
        if step.met:
            pending.append(node)
    while pending:
        node = pending.pop()
        if node not in run:
            run.add(node)
            pending.extend(users.get(node, []))
    wanted = {id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter)}
    ends = [node for node in walk.nodes if id(_leaf(node)) in wanted]
    return all(user in run for node in ends for user in users.get(node, []))


def obstacle_to_direct_delivery(shared: Sequence[Tensor], others: Sequence[Tensor]) -> str:
    """Say why measured gradients cannot be handed over as they are, or return an empty string.

    Gradients are handed over at the shared tensors and at the leaves ``others``. From a representation
    the backward pass goes on into the trunk, so nothing that it reaches there may be handed over as well.
    """
    representations = [tensor for tensor in shared if tensor.grad_fn is not None]
    if not representations:
        return ""
    trunk = Walk(_edges_of(representations)).down(
        edge for tensor in representations for edge in _edges_below(_edge(tensor))
    )
    if trunk.met:
        return "one of the representations in shared_params is computed from another"
    below = {id(leaf) for leaf in trunk.leaves()}
    if any(id(tensor) in below for tensor in (*shared, *others)):
        return "a parameter is used both before and after the representations in shared_params"
    return ""


def casts_to_half(losses: Iterable[Tensor]) -> bool:
    """Return whether float16 values lie between the losses and their leaves, as under autocast."""
    nodes = Walk().down(_edge(loss) for loss in losses).nodes
    return any(metadata.dtype == torch.float16 for node in nodes for metadata in node._input_metadata)


def has_static_graph(losses: Iterable[Tensor]) -> bool:
    """Return whether a loss comes out of ``DistributedDataParallel(static_graph=True)``."""
    seen: set[Node] = set()
    pending = [loss.grad_fn for loss in losses]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "_DDPSinkBackward":
            module: Any = getattr(node, "ddp_weakref", lambda: None)()
            if getattr(module, "static_graph", False):
                return True
        pending.extend(below for below, _ in node.next_functions)
    return False


def beyond(edge: Edge) -> Edge:
    """Return where an edge leads, beyond nodes that only pass gradients on."""
    while _passes(edge[0]):
        edge = edge[0].next_functions[edge[1]]
    return edge


def _edge(tensor: Tensor) -> Edge:
    return (tensor.grad_fn, tensor.output_nr)


def _edges_of(tensors: Iterable[Tensor]) -> frozenset[Edge]:
    return frozenset(_edge(tensor) for tensor in tensors if tensor.grad_fn is not None)


def _edges_below(edge: Edge) -> Sequence[Edge]:
    node, number = edge
    if type(node).__name__ in _PASS_THROUGH:
        return [node.next_functions[number]]
    below: Sequence[Edge] = node.next_functions
    return below


def _passes(node: Node) -> bool:
    return type(node).__name__ in _PASS_THROUGH


def _leaf(node: Node) -> Tensor | None:
    """Return the leaf that a node accumulates into, unless it was frozen after the forward pass."""
    if type(node).__name__ != _LEAF:
        return None
    leaf: Tensor = node.variable
    return leaf if leaf.requires_grad else None
