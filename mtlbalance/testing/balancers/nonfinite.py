"""NaN and infinity: counted, said once, and kept out of the state."""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer
from mtlbalance.errors import NonFiniteWarning
from mtlbalance.testing.balancers.case import BalancerCase, current, expect_sound, reads_gradients
from mtlbalance.testing.checks import Checks
from mtlbalance.testing.expectations import expect, expect_equal
from mtlbalance.testing.problem import Problem, make_problem

PAIR = ("a", "b")

CHECKS: Checks[BalancerCase] = Checks()


def _bad_call(problem: Problem, balancer: Balancer, bad: float) -> tuple[Tensor, list[str]]:
    """Call with the loss of 'a' times ``bad``; return the value, and the warnings of non-finite steps."""
    losses = problem.losses()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = problem.call(balancer, {"a": losses["a"] * bad, "b": losses["b"]})
    return value, [str(item.message) for item in caught if issubclass(item.category, NonFiniteWarning)]


def _expect_unmoved(case: BalancerCase, balancer: Balancer, before: dict[str, Tensor], what: str) -> None:
    counters = {"nonfinite_calls", "applied_weights", *balancer._counters}
    for key, saved in balancer.state_dict().items():
        drawn = key == "generator" and case.facts.draws_weights  # its draws must not depend on the losses
        if key not in counters and not drawn:
            expect_equal(saved, before[key], f"the state {key!r} after {what}")


@CHECKS.add()
def a_bad_loss_never_reaches_the_state(case: BalancerCase) -> None:
    """After a NaN or infinite loss the state is as before, the last good weights are applied, and training goes on."""
    for bad in (math.nan, math.inf):
        problem = make_problem()
        balancer = case.new(PAIR, warmup_steps=0, beta=0.5)
        problem.train(balancer, 3)
        before, weights = copy.deepcopy(balancer.state_dict()), current(balancer)
        value, _ = _bad_call(problem, balancer, bad)
        _expect_unmoved(case, balancer, before, f"a loss of {bad}")
        if case.has_task_weights:
            expect_equal(
                balancer.get_weights(), weights, f"the weights applied to a loss of {bad}: the last good ones"
            )
        problem.gradients(value)
        for later in problem.train(balancer, 3):
            expect_sound(case, later, f"after a loss of {bad}")
        finite = all(bool(parameter.isfinite().all()) for parameter in problem.parameters())
        expect(finite, f"after a loss of {bad}: expected finite parameters from the next steps; found others")


@CHECKS.add()
def what_is_not_finite_is_delivered(case: BalancerCase) -> None:
    """A NaN or infinite loss shows in the value and in the gradients, so that a GradScaler skips the step."""
    for bad in (math.nan, math.inf):
        problem = make_problem()
        balancer = case.new(PAIR, warmup_steps=0)
        problem.train(balancer, 2)
        value, _ = _bad_call(problem, balancer, bad)
        expect(
            not math.isfinite(value.item()),
            f"the value for a loss of {bad}: expected it; found {value.item()}",
        )
        delivered = [g for g in problem.gradients(value) if g is not None]
        expect(
            not all(bool(gradient.isfinite().all()) for gradient in delivered),
            f"the gradients for a loss of {bad}: expected NaN or infinity among them; all are finite",
        )


@CHECKS.add()
def bad_steps_are_counted_and_said_once(case: BalancerCase) -> None:
    """Every non-finite call counts in num_nonfinite; the first one warns (NonFiniteWarning), later ones do not."""
    problem = make_problem()
    balancer = case.new(PAIR, warmup_steps=0)
    problem.train(balancer, 2)
    expect_equal(balancer.num_nonfinite, 0, "num_nonfinite before")
    done = "what was computed was delivered" if not case.has_task_weights else "last good weights"
    for count, expected in ((1, 1), (2, 0), (3, 0)):
        _, said = _bad_call(problem, balancer, math.nan)
        expect_equal(balancer.num_nonfinite, count, f"num_nonfinite after {count} non-finite calls")
        expect(len(said) == expected, f"non-finite call {count}: expected {expected} warnings; found {said}")
        expect(
            all(done in text for text in said),
            f"the warning: expected it to say what was done ({done!r}); it says {said}",
        )


@CHECKS.add()
def the_first_call_may_be_bad(case: BalancerCase) -> None:
    """A non-finite first call applies the weights that the method starts with, and is not what it starts from."""
    problem = make_problem()
    balancer, untouched = case.new(PAIR, warmup_steps=0), case.new(PAIR, warmup_steps=0)
    fresh = balancer.get_weights()
    _bad_call(problem, balancer, math.nan)
    expect_equal(balancer.get_weights(), fresh, "the weights applied in a non-finite first call")
    problem.call(balancer)
    problem.call(untouched)
    if not case.facts.draws_weights:
        expect_equal(balancer.get_weights(), untouched.get_weights(), "the weights of the call after it")


@CHECKS.add(applies=reads_gradients)
def a_bad_gradient_never_reaches_the_state(case: BalancerCase) -> None:
    """A task gradient that is NaN although the losses are finite is counted, and the state stays as it was."""
    problem = make_problem()
    balancer = case.new(PAIR, warmup_steps=0)
    problem.train(balancer, 2)
    before, weights = copy.deepcopy(balancer.state_dict()), current(balancer)
    losses = problem.losses()
    corner = torch.sqrt(0.0 * next(problem.trunk.parameters()).sum())  # 0, and its slope is infinite
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        value = problem.call(balancer, {"a": losses["a"] + corner, "b": losses["b"]})
    bad = [g for g in problem.gradients(value) if g is not None and not bool(g.isfinite().all())]
    expect(bad, "a NaN gradient under a finite loss: expected it to be delivered; all that was is finite")
    expect_equal(balancer.num_nonfinite, 1, "num_nonfinite after a NaN gradient under a finite loss")
    _expect_unmoved(case, balancer, before, "a NaN gradient under a finite loss")
    if not case.facts.draws_weights and case.has_task_weights:
        expect_equal(balancer.get_weights(), weights, "the weights applied to it: the last good ones")
