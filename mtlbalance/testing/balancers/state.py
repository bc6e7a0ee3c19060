"""State: tensors, complete, its own, and safe inside a model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Balancer
from mtlbalance.errors import StateMismatchError
from mtlbalance.testing.balancers.case import TASKS, BalancerCase
from mtlbalance.testing.checks import Checks
from mtlbalance.testing.expectations import expect, expect_equal, expect_error
from mtlbalance.testing.problem import make_problem

STEPS = 6  # two measurements with a warm-up of 2 and update_every=3

CHECKS: Checks[BalancerCase] = Checks()


@CHECKS.add()
def state_is_tensors(case: BalancerCase) -> None:
    """state_dict() holds tensors only, under names that are attributes, and loads with weights_only=True."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    problem.train(balancer, 2)
    for key, value in _through_a_file(balancer).items():
        expect(
            isinstance(value, Tensor),
            f"state_dict()[{key!r}]: expected a tensor; found {type(value).__name__}",
        )
        owner: object = balancer
        for part in key.split("."):  # torch.distributed.checkpoint looks every key up
            expect(
                hasattr(owner, part), f"state_dict()[{key!r}]: expected an attribute of that name; found none"
            )
            owner = getattr(owner, part)


@CHECKS.add()
def state_continues_bit_for_bit(case: BalancerCase) -> None:
    """Saved after any step and loaded into a fresh instance, training goes on as if uninterrupted, to the last bit."""
    options: dict[str, Any] = {"warmup_steps": 2, "update_every": 3}
    problem, twin = make_problem(TASKS), make_problem(TASKS)
    expected = problem.train(case.new(TASKS, **options), STEPS)
    balancer = case.new(TASKS, **options)
    optimizer = twin.optimizer(balancer)
    for step in range(STEPS):
        optimizer.zero_grad()
        twin.call(balancer).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        expect_equal(
            balancer.get_weights(),
            expected[step],
            f"the weights of step {step + 1}, its state saved and loaded",
        )
        state, moments = _through_a_file(balancer), optimizer.state_dict()
        balancer = case.new(TASKS, **options)
        balancer.load_state_dict(state)
        optimizer = twin.optimizer(balancer)
        optimizer.load_state_dict(moments)
        expect_equal(
            balancer.get_weights(),
            expected[step],
            f"get_weights() after loading the state of step {step + 1}",
        )
    for one, other in zip(twin.parameters(), problem.parameters(), strict=True):
        expect_equal(
            one, other, f"the model's parameters after {STEPS} steps, the state saved and loaded in each"
        )


def _through_a_file(balancer: Balancer) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(balancer.state_dict(), buffer)
    buffer.seek(0)
    loaded: dict[str, Tensor] = torch.load(buffer, weights_only=True)
    return loaded


@CHECKS.add()
def a_state_of_other_tasks_is_refused(case: BalancerCase) -> None:
    """Loading a state of other tasks is a StateMismatchError that names both; one with missing keys is refused too."""
    state = case.new(("a", "b")).state_dict()
    other = case.new(("a", "x"))
    for says in ("('a', 'b')", "('a', 'x')"):
        expect_error(
            StateMismatchError, says, "the state of other tasks", lambda: other.load_state_dict(state)
        )
    fresh = case.new(("a", "b"))
    expect_error(RuntimeError, "task_names", "an empty state", lambda: fresh.load_state_dict({}))


@CHECKS.add()
def copies_go_on_alike(case: BalancerCase) -> None:
    """A deep copy and a pickled copy continue as the original does, and share nothing with it."""
    copying: dict[str, Callable[[Balancer], Balancer]] = {
        "copy.deepcopy": copy.deepcopy,
        "pickle": lambda balancer: pickle.loads(pickle.dumps(balancer)),
    }
    for how, copied in copying.items():
        problem, twin = make_problem(), make_problem()
        balancer = case.new(("a", "b"), warmup_steps=1)
        problem.train(balancer, 2)
        twin.train(case.new(("a", "b"), warmup_steps=1), 2)
        second = copied(balancer)
        expected = problem.train(balancer, 2)
        for one, other in zip(twin.train(second, 2), expected, strict=True):
            expect_equal(one, other, f"the weights of two more steps of a copy by {how}")
        for ours, theirs in zip(twin.parameters(), problem.parameters(), strict=True):
            expect_equal(ours, theirs, f"the model's parameters after two more steps of a copy by {how}")


@CHECKS.add()
def state_inside_a_model(case: BalancerCase) -> None:
    """As a part of a model it is saved and loaded with it, and model.half() leaves the precision of its state."""
    problem = make_problem()
    balancer = case.new(("a", "b"), warmup_steps=0)
    problem.train(balancer, 2)
    outer = nn.ModuleDict({"trunk": nn.Linear(2, 2), "balancer": balancer})
    loaded = case.new(("a", "b"), warmup_steps=0)
    nn.ModuleDict({"trunk": nn.Linear(2, 2), "balancer": loaded}).load_state_dict(outer.state_dict())
    expect_equal(loaded.get_weights(), balancer.get_weights(), "the weights loaded with a model")
    before = copy.deepcopy(balancer.state_dict())
    outer.half()
    for key, saved in balancer.state_dict().items():
        expect_equal(saved, before[key], f"the state {key!r} after model.half()")
