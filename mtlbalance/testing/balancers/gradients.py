"""What ``backward()`` leaves in ``.grad``, and what may be passed as shared."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from mtlbalance.errors import SharedParametersError
from mtlbalance.testing.balancers.case import (
    TASKS,
    BalancerCase,
    delivers_a_combination,
    delivers_a_weighted_sum,
    prescribed,
    reads_gradients,
    reduced,
)
from mtlbalance.testing.checks import Checks
from mtlbalance.testing.expectations import expect, expect_close, expect_error
from mtlbalance.testing.problem import Gradients, Problem, along, make_problem

CHECKS: Checks[BalancerCase] = Checks()


def expect_gradients(problem: Problem, found: Gradients, expected: Gradients, what: str) -> None:
    """Raise unless every parameter has the expected gradient, or none where none is expected."""
    names = [
        *(f"trunk.{name}" for name, _ in problem.trunk.named_parameters()),
        *(f"heads.{name}" for name, _ in problem.heads.named_parameters()),
    ]
    for name, one, other in zip(names, found, expected, strict=True):
        if one is None or other is None:
            expect(one is other, f"{what}: {name}: one gradient is None; found {one}, expected {other}")
        else:
            expect_close(
                one, other, f"{what}: {name}.grad", rtol=2e-4, atol=1e-5 * float(other.abs().max()) + 1e-6
            )


@CHECKS.add(applies=delivers_a_weighted_sum)
def every_grad_is_the_weighted_sum(case: BalancerCase) -> None:
    """Every .grad is Σ applied·∂L; that of a head alone is ∂L where the class says scale_heads = False."""
    for delivery in ("auto", "direct", "weighted_sum", "low_memory", "batched"):
        problem = make_problem(TASKS)
        balancer = case.new(warmup_steps=0, beta=0.3, delivery=delivery)
        for call in range(2):
            found = problem.gradients(problem.call(balancer))
            expected = prescribed(balancer, problem, balancer.get_weights())
            expect_gradients(problem, found, expected, f"call {call + 1} (delivery={delivery!r})")


@CHECKS.add(applies=delivers_a_combination)
def heads_get_their_own_gradient(case: BalancerCase) -> None:
    """Where gradients are combined, each head gets its own task's, times a positive number; 1 without task weights."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    in_trunk = len(list(problem.trunk.parameters()))
    for call in range(2):
        found = problem.gradients(problem.call(balancer))[in_trunk:]
        for k, task in enumerate(TASKS):
            own = problem.gradients(reduced(balancer, problem)[task])[in_trunk:]
            factor = along(found, own) if case.has_task_weights else 1.0
            expect(
                factor > 0.0, f"the head of {task!r}: expected its own direction; found {factor:.3g} of it"
            )
            for one, other in zip(found[2 * k : 2 * k + 2], own[2 * k : 2 * k + 2], strict=True):
                assert one is not None
                assert other is not None
                what = f"call {call + 1}: a gradient of the head of {task!r}"
                expect_close(one, factor * other, what, rtol=1e-4, atol=1e-6)


@CHECKS.add()
def backward_may_be_scaled_and_accumulated(case: BalancerCase) -> None:
    """What is returned may be multiplied (GradScaler) or divided, and adds up in .grad over calls (accumulation)."""
    problem = make_problem()
    balancer = case.new(("a", "b"), warmup_steps=100)
    twin = copy.deepcopy(balancer)
    found = problem.gradients(problem.call(balancer) * 1024.0)
    plain = problem.gradients(problem.call(twin))
    expect_gradients(problem, found, _sum([plain], 1024.0), "backward() of 1024 times the value")
    halves = [problem.call(balancer) / 2.0 for _ in range(2)]
    wholes = [problem.gradients(problem.call(twin)) for _ in range(2)]
    for half in halves:
        half.backward()  # type: ignore[no-untyped-call]
    accumulated = [parameter.grad for parameter in problem.parameters()]
    what = "two calls, each divided by 2, without zero_grad() between"
    expect_gradients(problem, accumulated, _sum(wholes, 0.5), what)


def _sum(gradients: Sequence[Gradients], factor: float) -> Gradients:
    """Return ``factor`` times the sum; None where no term has a gradient."""
    total: Gradients = []
    for column in zip(*gradients, strict=True):
        given = [gradient for gradient in column if gradient is not None]
        total.append(factor * torch.stack(given).sum(dim=0) if given else None)
    return total


@CHECKS.add()
def the_graph_may_be_kept(case: BalancerCase) -> None:
    """With retain_graph=True in the call, terms may be added outside, and backward may come twice."""
    problem = make_problem()
    balancer = case.new(("a", "b"), warmup_steps=0)
    twin = copy.deepcopy(balancer)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        features = problem.trunk(problem.inputs)
        kept = problem.call(balancer, problem.per_sample(features), retain_graph=True)
        return kept, features.square().mean()

    value, _ = call()
    value.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    expected = problem.gradients(problem.call(twin))
    expect_gradients(problem, problem.gradients(value), expected, "the second backward()")
    value, term = call()
    found = problem.gradients(value + term)
    own = problem.gradients(problem.call(twin))
    of_term = problem.gradients(problem.trunk(problem.inputs).square().mean())
    expect_gradients(problem, found, _sum([own, of_term], 1.0), "a term outside the mapping")


@CHECKS.add()
def frozen_and_unused_parameters(case: BalancerCase) -> None:
    """A frozen or unused shared parameter gets no gradient and disturbs no other."""
    problem = make_problem(
        TASKS, lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
    )
    frozen = next(problem.trunk.parameters()).requires_grad_(False)
    unused = nn.Parameter(torch.ones(4))
    balancer, without = (
        case.new(warmup_steps=0),
        case.new(warmup_steps=0),
    )  # the latter: without the unused one
    for _ in range(2):
        value = problem.call(balancer, shared_params=[*problem.trunk.parameters(), unused])
        found = problem.gradients(value)
        expect(
            frozen.grad is None and unused.grad is None,
            "expected no gradient for frozen and unused parameters",
        )
        expected = (
            prescribed(balancer, problem, balancer.get_weights())
            if not case.combines
            else problem.gradients(problem.call(without))
        )
        expect_gradients(problem, found, expected, "beside a frozen and an unused parameter")


@CHECKS.add()
def bfloat16_models(case: BalancerCase) -> None:
    """With parameters and losses in bfloat16 the gradients are finite and in bfloat16, and nothing is counted."""
    problem = make_problem(dtype=torch.bfloat16)
    balancer = case.new(("a", "b"), warmup_steps=0)
    for gradient in problem.gradients(problem.call(balancer)):
        assert gradient is not None
        expect(
            gradient.dtype == torch.bfloat16 and bool(gradient.isfinite().all()),
            f"expected finite gradients in bfloat16; found {gradient.dtype}, finite: {gradient.isfinite().all()}",
        )
    expect(balancer.num_nonfinite == 0, "num_nonfinite: expected 0; a bfloat16 step was counted")


@CHECKS.add(applies=reads_gradients)
def representations_may_be_shared(case: BalancerCase) -> None:
    """shared_params may be the features where trunk meets heads, or is an error if the class says needs_parameters."""
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    features = problem.trunk(problem.inputs)
    losses = problem.per_sample(features)
    if case.facts.needs_parameters:
        what = "features as shared_params"
        expect_error(
            SharedParametersError,
            "parameters",
            what,
            lambda: problem.call(balancer, losses, shared_params=features),
        )
        return
    found = problem.gradients(problem.call(balancer, losses, shared_params=features))
    if case.combines:  # of features, which is not that of parameters
        finite = all(gradient is not None and bool(gradient.isfinite().all()) for gradient in found)
        expect(finite, "features as shared_params: expected finite gradients everywhere")
        return
    expected = prescribed(balancer, problem, balancer.get_weights())
    expect_gradients(problem, found, expected, "features as shared_params")


@CHECKS.add(applies=reads_gradients)
def shared_params_can_be_found(case: BalancerCase) -> None:
    """With model= alone the shared parameters are found, and the weights are those of passing them."""
    problem = make_problem(TASKS)
    model = nn.ModuleList([problem.trunk, problem.heads])
    told, finding = case.new(warmup_steps=0), case.new(warmup_steps=0)
    expected = problem.gradients(problem.call(told))
    found = problem.gradients(problem.call(finding, shared_params=None, model=model))
    expect_close(finding.get_weights(), told.get_weights(), "the weights with model= alone")
    expect_gradients(problem, found, expected, "model= alone")


@CHECKS.add(applies=reads_gradients)
def wrong_shared_params_say_what_to_pass(case: BalancerCase) -> None:
    """Missing, empty, frozen, unrelated or mistyped shared_params are errors at once, and say what to pass."""
    problem = make_problem()
    wrong: dict[str, tuple[object, str]] = {
        "no shared_params": (None, "needs shared_params"),
        "an empty list": ([], "empty"),
        "an iterator that is used up": (iter(()), "used up"),
        "a module that no loss depends on": (nn.Linear(2, 2), "task 'a' does not depend"),
        "a frozen module": (nn.Linear(2, 2).requires_grad_(False), "none of the 2 tensors"),
        "named_parameters()": (list(problem.trunk.named_parameters()), "named_parameters"),
        "a list of floats": ([1.0], "holds a float"),
        "a number": (3, "is a int"),
    }
    for what, (shared, says) in wrong.items():
        for options in ({}, {"update_every": 7}):  # also where the first call measures nothing
            balancer = case.new(("a", "b"), **options)
            expect_error(
                SharedParametersError,
                says,
                f"{what} {options or ''}".strip(),
                lambda balancer=balancer, shared=shared: problem.call(balancer, shared_params=shared),  # type: ignore[misc]
            )
            expect(balancer.calls == 0, f"{what}: expected no call to be counted; found {balancer.calls}")
