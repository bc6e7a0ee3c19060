"""What goes wrong in real training, for every method: nothing is poisoned, and it is counted where it was measured."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from mtlbalance.balancers.gradient_balancer import GradientBalancer
from mtlbalance.errors import NonFiniteWarning

PAIR = ("a", "b")
OPTIONS = {"warmup_steps": 0, "beta": 1e-9, "max_weight": 1.0}

DRAWS_BY_CALL = {"graddrop"}  # its seed is the number of the call

situation = pytest.mark.situation


@situation("NaN gradient")
def test_a_gradient_that_is_not_finite_under_finite_losses(method, make, problem):
    """It is delivered, so that a scaler skips the step; only methods that measure gradients can count it."""
    p = problem(PAIR)
    balancer = make(method, PAIR, **OPTIONS)
    p.train(balancer, 2)
    corner = torch.sqrt(0.0 * p.trunk[0].weight.sum())  # 0, and its slope is infinite
    losses = p.losses()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = p.call(balancer, {"a": losses["a"] + corner, "b": losses["b"]})
    assert math.isfinite(value.item())
    assert not p.gradients(value)[0].isfinite().all()
    measured = isinstance(balancer, GradientBalancer)
    assert balancer.num_nonfinite == int(measured)
    assert [item.category for item in caught] == [NonFiniteWarning] * int(measured)
    for weights in p.train(balancer, 3):  # warnings are errors here
        assert all(map(math.isfinite, weights.values())) is balancer.has_task_weights
    assert all(parameter.isfinite().all() for parameter in p.parameters())
    assert all(value.isfinite().all() for value in balancer.parameters())


@situation("NaN in the first step")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_does_not_start_from_what_is_not_finite(method, make, problem, bad):
    """After a bad first step, training goes on as if it had begun with the second."""
    p, q = problem(PAIR), problem(PAIR)
    late, fresh = (make(method, PAIR, **OPTIONS) for _ in range(2))
    losses = p.losses()
    with pytest.warns(NonFiniteWarning):
        p.call(late, {"a": losses["a"] * bad, "b": losses["b"]})
    fresh.calls = late.calls if method in DRAWS_BY_CALL else 0
    if late.generator is not None and late.draws_weights:
        fresh.load_state_dict(
            copy.deepcopy(late.state_dict())
        )  # a draw in every call: the next one is another
    found, expected = p.train(late, 3), q.train(fresh, 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=not late.has_task_weights)
    for one, other in zip(p.parameters(), q.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@situation("absent for 1,000 steps")
def test_a_task_that_joins_after_a_thousand_steps(method, make, problem):
    """Its state waited, so it starts where it would have started at first; what the others know is kept."""
    balancer, fresh = (make(method, PAIR, warmup_steps=0) for _ in range(2))
    theta = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    target = torch.zeros(1)

    def call(chosen, tasks):
        losses = {"a": (theta.square().sum() + 1.0).reshape(1), "b": (2.0 * theta[:2].exp().sum()).reshape(1)}
        losses = {task: losses[task] for task in tasks}
        return chosen(losses, shared_params=[theta], targets={"a": target, "b": target})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of learned weights that nobody trains
        for _ in range(1000):
            call(balancer, "a")
    state = balancer.state_dict()
    assert all(value.isfinite().all() or value.isnan().any() for value in state.values())
    total = call(balancer, "ab")
    total.backward()
    assert theta.grad.isfinite().all()
    assert balancer.num_nonfinite == 0
    call(fresh, "ab")
    ours, theirs = balancer.get_weights(), fresh.get_weights()
    if not balancer.has_task_weights:
        return
    assert ours["b"] != 0.0 or theirs["b"] == 0.0
    if not balancer.signed_weights and theirs["b"] > 0:
        assert ours["b"] > 0.1 * theirs["b"]
    if balancer.weight_sum != "free":
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=1e-5)
