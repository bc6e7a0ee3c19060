"""Tasks that have no labels in a batch."""

from __future__ import annotations

import copy

from torch import Tensor

from mtlbalance.testing.balancers.case import (
    TASKS,
    BalancerCase,
    delivers_a_combination,
    expect_sound,
    has_task_weights,
    reduced,
)
from mtlbalance.testing.checks import Checks
from mtlbalance.testing.expectations import expect, expect_close, expect_equal
from mtlbalance.testing.problem import along, make_problem

CHECKS: Checks[BalancerCase] = Checks()


@CHECKS.add()
def absent_tasks_have_weight_zero(case: BalancerCase) -> None:
    """A task that is missing, None or without samples has weight 0 (or NaN, as all), and its head gets no gradient."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    problem.train(balancer, 2)
    losses = problem.losses()
    value = problem.call(balancer, {"a": losses["a"], "b": None, "c": losses["c"][:0]})
    weights = balancer.get_weights()
    expect_sound(case, weights, "'a' alone is present")
    no_weight = not case.has_task_weights or weights["b"] == weights["c"] == 0.0
    expect(no_weight, f"expected weight 0 for 'b' and 'c'; found {weights}")
    found = dict(zip(map(id, problem.parameters()), problem.gradients(value), strict=True))
    for task, has_gradient in (("a", True), ("b", False), ("c", False)):
        for parameter in problem.heads[task].parameters():
            expect(
                (found[id(parameter)] is not None) is has_gradient,
                f"the head of {task!r}: expected {'a gradient' if has_gradient else 'no gradient'}",
            )


@CHECKS.add(applies=has_task_weights)
def present_tasks_share_the_budget(case: BalancerCase) -> None:
    """The present tasks share the whole budget; a single one has all of it, or a scale of its own (free_alone)."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    problem.train(balancer, 2)
    budget = float(len(TASKS)) if balancer.weight_sum == "K" else case.budget(balancer, len(TASKS))
    problem.call(balancer, {"a": problem.losses()["a"]})
    alone = balancer.get_weights()["a"]
    if balancer.free_alone:
        expect(alone > 0.0, f"the weight of a single present task: expected above 0; found {alone}")
    else:
        expect_close(alone, budget, "the weight of a single present task")
    losses = problem.losses()
    problem.call(balancer, {"a": losses["a"], "c": losses["c"]})
    weights = balancer.get_weights()
    expect(weights["b"] == 0.0, f"expected weight 0 for the absent 'b'; found {weights}")
    if balancer.weight_sum != "free":
        expect_close(weights["a"] + weights["c"], budget, "the sum of the weights of two present tasks")


@CHECKS.add(applies=delivers_a_combination)
def one_task_is_left_as_it_is(case: BalancerCase) -> None:
    """Where gradients are combined, a task alone moves the trunk along its own; without task weights, as far."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    found = problem.gradients(problem.call(balancer, {"b": problem.losses()["b"]}))
    single = problem.gradients(reduced(balancer, problem)["b"])
    in_trunk = len(list(problem.trunk.parameters()))
    factor = along(found[:in_trunk], single[:in_trunk]) if case.has_task_weights else 1.0
    expect(
        factor > 0.0, f"a single present task: expected its own direction; found {factor:.3g} of its gradient"
    )
    for one, other in zip(found[:in_trunk], single[:in_trunk], strict=True):
        assert one is not None
        assert other is not None
        expect_close(one, factor * other, "a trunk gradient of a single present task", rtol=1e-4, atol=1e-6)


@CHECKS.add()
def state_of_absent_tasks_waits(case: BalancerCase) -> None:
    """What is remembered of an absent task (a row of a state tensor with K rows) does not move."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    problem.train(balancer, 2)
    before = copy.deepcopy(balancer.state_dict())
    for _ in range(2):
        problem.call(balancer, {"a": problem.losses()["a"]})
    for name, saved in balancer.state_dict().items():
        if not isinstance(saved, Tensor) or name == "applied_weights":
            continue
        if saved.is_floating_point() and saved.shape[:1] == (len(TASKS),):
            expect_equal(saved[1:], before[name][1:], f"the state {name!r} of the absent 'b' and 'c'")


@CHECKS.add()
def a_task_may_join_later(case: BalancerCase) -> None:
    """A task absent at first starts, when it joins, where it would have started: its weight has not withered.

    Without task weights: its head gets its own gradient, and it counts in the value.
    """
    problem = make_problem()
    balancer = case.new(("a", "b"), warmup_steps=5)
    for _ in range(20):
        problem.call(balancer, {"a": problem.losses()["a"]})
    value = problem.call(balancer)
    weights = balancer.get_weights()
    expect_sound(case, weights, "once it has joined")
    if not case.has_task_weights:
        losses = reduced(balancer, problem)
        expect_close(value.item(), sum(loss.item() for loss in losses.values()), "the value, of both")
        found, own = problem.gradients(value)[-1], problem.gradients(losses["b"])[-1]
        expect_close(found, own, "the gradient of the head that has joined")
        return
    if balancer.weight_sum != "free":
        expect_close(
            sum(weights.values()), case.budget(balancer, 2), "the sum of the weights once it has joined"
        )
    problem.call(fresh := case.new(("a", "b"), warmup_steps=0))
    first = fresh.get_weights()["b"]
    if balancer.signed_weights or balancer.draws_weights:
        expect(weights["b"] != 0.0, "the weight of 'b' once it has joined: expected another than 0")
    else:
        expect(
            weights["b"] >= 0.1 * first > 0.0,
            f"the weight of 'b', absent in 20 calls: expected about {first:.4g}, as if from the start; "
            f"found {weights['b']:.4g}",
        )
