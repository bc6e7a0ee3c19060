"""What the weights are: for any number of tasks, in any order, and at the edges of the method's domain."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from mtlbalance.errors import BalancerError, NonFiniteWarning
from mtlbalance.testing.balancers.case import (
    TASKS,
    BalancerCase,
    expect_sound,
    tells_tasks_apart_by_name_alone,
)
from mtlbalance.testing.checks import Checks
from mtlbalance.testing.expectations import expect, expect_close, expect_error
from mtlbalance.testing.problem import along, make_problem

CHECKS: Checks[BalancerCase] = Checks()


@CHECKS.add()
def any_number_of_tasks(case: BalancerCase) -> None:
    """One, two or five tasks: the weights are finite and sum to what the class says; a single task has all of it."""
    for count in (1, 2, 5):
        tasks = tuple("abcde"[:count])
        problem = make_problem(tasks)
        balancer = case.new(tasks, warmup_steps=0)
        for weights in problem.train(balancer, 3):
            expect_sound(case, weights, f"{count} tasks")
            fixed = balancer.weight_sum != "free" or (count == 1 and not balancer.free_alone)
            if fixed and case.has_task_weights:
                budget = case.budget(balancer, count)
                expect_close(
                    sum(weights.values()), budget, f"the sum of {count} weights {weights}", rtol=1e-5
                )
        finite = all(bool(parameter.isfinite().all()) for parameter in problem.parameters())
        expect(finite, f"{count} tasks: expected a model with finite parameters after three steps")


@CHECKS.add(applies=tells_tasks_apart_by_name_alone)
def weights_are_alike_at_first(case: BalancerCase) -> None:
    """Before the first call, all tasks have the same weight, and it is a positive number; NaN if it has none."""
    weights = case.new().get_weights()
    if not case.has_task_weights:
        expect_sound(case, weights, "get_weights() before the first call")
        return
    expect(
        len(set(weights.values())) == 1 and weights["a"] > 0,
        f"get_weights() before the first call: expected the same for all tasks; found {weights}",
    )


@CHECKS.add(applies=tells_tasks_apart_by_name_alone)
def weights_follow_the_tasks(case: BalancerCase) -> None:
    """Weights belong to names: with the tasks in another order, every task has the weight that it had.

    And where gradients are combined, the trunk gets the gradient that it got.
    """
    # A method that draws an order of tasks is symmetric only where there is one order.
    names = TASKS if case.facts.generator is None else TASKS[:2]
    problem = make_problem(names)
    forwards, backwards = (case.new(order, warmup_steps=0, max_weight=1.0) for order in (names, names[::-1]))
    for _ in range(3):
        first, second = (problem.gradients(problem.call(one)) for one in (forwards, backwards))
        if case.combines:
            for one, other in zip(first, second, strict=True):
                assert one is not None
                assert other is not None
                what = f"a gradient with the tasks {names[::-1]}"
                expect_close(other, one, what, rtol=1e-3, atol=1e-5)
        found = {task: backwards.get_weights()[task] for task in names}
        expect_close(
            found, forwards.get_weights(), f"the weights for the tasks {names[::-1]}", rtol=1e-3, atol=1e-5
        )


@CHECKS.add(applies=tells_tasks_apart_by_name_alone)
def identical_tasks_are_treated_alike(case: BalancerCase) -> None:
    """Two tasks with one loss pull the trunk along their one gradient; short of the Gramian, they weigh alike."""
    problem = make_problem()
    balancer = case.new(("a", "b"), warmup_steps=0, max_weight=1.0)
    trunk = len(list(problem.trunk.parameters()))
    problem.targets["b"] = problem.targets["a"]
    shared = list(problem.trunk.parameters())
    if case.combines:  # it must have all that they share, and they share a head here
        shared += problem.heads["a"].parameters()
    for _ in range(2):
        losses = problem.losses()
        both = {"a": losses["a"], "b": losses["a"] * 1.0}
        value = problem.call(balancer, both, shared_params=shared)
        weights = balancer.get_weights()
        expect_sound(case, weights, "identical tasks")
        if balancer.reads in ("nothing", "losses", "gradient norms"):
            expect_close(weights["b"], weights["a"], "the weight of the second of two identical tasks")
        found = problem.gradients(value)[:trunk]
        single = problem.gradients(problem.losses()["a"].mean())[:trunk]
        total = sum(weights.values())
        if case.combines:  # along it, and how far is the method's own affair
            total = along(found, single)
            expect(
                total > 0.0,
                f"identical tasks: expected a trunk gradient along theirs; found {total:.3g} of it",
            )
        for one, other in zip(found, single, strict=True):
            assert one is not None
            assert other is not None
            expect_close(one, total * other, "a trunk gradient of two identical tasks", rtol=1e-3, atol=1e-5)


@CHECKS.add()
def a_task_without_pull_breaks_nothing(case: BalancerCase) -> None:
    """A task whose gradient is zero leaves all weights and gradients finite, and is not counted as non-finite."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    for _ in range(2):
        losses = problem.losses()
        value = problem.call(balancer, losses | {"b": 0.0 * losses["b"] + 1.0})
        expect_sound(case, balancer.get_weights(), "one zero gradient")
        finite = all(bool(g.isfinite().all()) for g in problem.gradients(value) if g is not None)
        expect(finite, "one zero gradient: expected finite gradients; found NaN or infinity")
    expect(balancer.num_nonfinite == 0, "one zero gradient: expected num_nonfinite 0; it was counted")


@CHECKS.add()
def all_losses_may_be_zero(case: BalancerCase) -> None:
    """All losses 0: a finite value, zero gradients, positive weights; counted if it needs_positive_losses."""
    theta = torch.ones(3, requires_grad=True)
    balancer = case.new(("a", "b"), warmup_steps=0)
    losses = {"a": 0.0 * theta, "b": (0.0 * theta).sum()}
    own = balancer.sample_weights_of(losses, {}, {"targets": dict.fromkeys("ab", torch.ones(3))})
    losses["b"] = 0.0 * theta if "b" in own else losses["b"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if case.facts.needs_positive_losses else "error", NonFiniteWarning)
        value = balancer(losses, shared_params=[theta], targets=dict.fromkeys("ab", torch.ones(3)))
    value.backward()
    expect(math.isfinite(value.item()), f"the value: expected a finite number; found {value.item()}")
    weights = balancer.get_weights()
    expect_sound(case, weights, "all losses 0")
    positive = not case.has_task_weights or min(weights.values()) > 0
    expect(positive, f"the weights: expected positive ones; found {weights}")
    if not tells_tasks_apart_by_name_alone(case):
        expect_close(weights["b"], weights["a"], "the weight of 'b', against that of 'a'")
    gradient = theta.grad
    expect(gradient is not None and not gradient.any(), f"the gradient: expected zeros; found {gradient}")
    counted = int(case.facts.needs_positive_losses)
    expect(
        balancer.num_nonfinite == counted,
        f"num_nonfinite: expected {counted}, as needs_positive_losses says; found {balancer.num_nonfinite}",
    )


@CHECKS.add()
def losses_without_a_graph(case: BalancerCase) -> None:
    """Losses that require no gradient are weighed; a method that reads gradients says which task has none."""
    balancer = case.new(("a", "b"), warmup_steps=0)
    problem = make_problem()

    def call(missing: str) -> Tensor:
        losses = problem.losses()
        return problem.call(balancer, losses | {task: losses[task].detach() for task in missing})

    if case.reads_gradients:
        expect_error(
            BalancerError, "'b' does not require a gradient", "a loss without a graph", lambda: call("b")
        )
        expect(balancer.calls == 0, f"expected no call to be counted; found calls = {balancer.calls}")
        return
    value = call("ab")
    expect(math.isfinite(value.item()), f"the value: expected a finite number; found {value.item()}")
    expect_sound(case, balancer.get_weights(), "losses without a graph")
