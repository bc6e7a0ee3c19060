"""What a call issues follows from its phase, so that one CUDA graph can stand for all calls of a phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtlbalance.balancers.base import Balancer
from mtlbalance.testing.balancers.case import BalancerCase
from mtlbalance.testing.checks import Checks
from mtlbalance.testing.expectations import expect

CHECKS: Checks[BalancerCase] = Checks()

_CALLS = 13  # past the warm-up, and three measurements


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation: its name, the shapes it is given, and the constants."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note it."""
        kwargs = kwargs or {}
        self.found.append(f"{func}{_shown(args)}{_shown(list(kwargs.items()))}")
        return func(*args, **kwargs)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


def operations_of_calls(balancer: Balancer, calls: int) -> list[list[str]]:
    """Return the operations of so many training calls with their backward passes, on the meta device.

    There the host can know no number, as on a GPU.
    """
    trunk = nn.Linear(4, 3, device="meta")
    heads = {task: nn.Linear(3, 1, device="meta") for task in balancer.tasks}
    targets = {task: torch.zeros(5, device="meta") for task in balancer.tasks}
    found = []
    for _ in range(calls):
        features = trunk(torch.zeros(5, 4, device="meta"))
        losses = {task: head(features).squeeze(-1) for task, head in heads.items()}
        with Operations() as operations:
            balancer(losses, shared_params=trunk, targets=targets).backward()
        for parameter in (*trunk.parameters(), *balancer.parameters()):
            parameter.grad = None
        for head in heads.values():
            head.zero_grad()
        found.append(operations.found)
    return found


def stays_off_graphs(case: BalancerCase) -> str:
    """Say why its calls are never captured."""
    return case.facts.obstacle_to_graphs()


@CHECKS.add(applies=stays_off_graphs)
def calls_of_a_phase_are_alike(case: BalancerCase) -> None:
    """Calls of one phase() issue the same operations with the same constants, and move host counters by as much."""
    balancer = case.new(warmup_steps=3, update_every=4)
    seen: dict[Any, tuple[int, list[str], dict[str, int]]] = {}
    for call in range(_CALLS):
        phase, before = balancer.phase(), balancer.host_counters()
        (operations,) = operations_of_calls(balancer, 1)
        moves = balancer.counters_since(before)
        expect(moves["calls"] == 1, f"expected a call to count as one; it moved calls by {moves['calls']}")
        if call == 0:
            continue  # state is sized, and follows the losses to their device
        first, expected, expected_moves = seen.setdefault(phase, (call, operations, moves))
        different = [pair for pair in zip(operations, expected, strict=False) if pair[0] != pair[1]]
        expect(
            operations == expected,
            f"expected calls {first} and {call}, both of phase {phase}, to issue the same operations; the second "
            f"issued {different[0][0] if different else f'{len(operations)} operations'}, the first "
            f"{different[0][1] if different else len(expected)}; say by phase() what the host decides",
        )
        expect(
            moves == expected_moves,
            f"expected calls {first} and {call}, both of phase {phase}, to move counters alike; found "
            f"{expected_moves} and {moves}",
        )
