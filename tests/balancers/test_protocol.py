"""What the contract promises of every balancer: the conformance kit over the registry, and what only we know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtlbalance.plugins.manager import load_plugins
from mtlbalance.testing import BALANCER_CHECKS, BalancerCase, Check
from mtlbalance.testing.balancers.registered import registered_balancer

REGISTRY = load_plugins(entry_points=False)
BALANCERS = REGISTRY.names("balancer")
TASKS = ("a", "b", "c")
REQUIRED = {"biased_task": "a", "target_cap": 10.0}


def case_of(method: str) -> BalancerCase:
    registration = REGISTRY.get("balancer", method)
    fields = registration.config.model_fields
    return registered_balancer(registration, {key: REQUIRED[key] for key in REQUIRED if key in fields})


SITUATIONS = {  # of docs/compatibility.md, by the checks that try them
    "a_bad_loss_never_reaches_the_state": "NaN or Inf loss",
    "what_is_not_finite_is_delivered": "NaN or Inf loss",
    "bad_steps_are_counted_and_said_once": "NaN or Inf loss",
    "a_bad_gradient_never_reaches_the_state": "NaN gradient",
    "the_first_call_may_be_bad": "NaN in the first step",
    "all_losses_may_be_zero": "all losses zero",
    "losses_without_a_graph": "loss without a graph",
    "any_number_of_tasks": "one task",
    "a_task_without_pull_breaks_nothing": "one zero gradient",
    "identical_tasks_are_treated_alike": "equal gradients",
    "bfloat16_models": "bf16 parameters",
    "state_continues_bit_for_bit": "exact resume",
    "frozen_and_unused_parameters": "frozen and unused",
}
CASES = {method: case_of(method) for method in BALANCERS}


def marks(method: str, check: Check[BalancerCase]) -> list[pytest.MarkDecorator]:
    known = check.name in SITUATIONS
    return [pytest.mark.situation(SITUATIONS[check.name], method=method)] if known else []


KIT = [
    pytest.param(case, check, id=f"{method}-{check.name}", marks=marks(method, check))
    for method, case in CASES.items()
    for check in BALANCER_CHECKS
    if not check.applies(case)
]


@pytest.mark.parametrize(("case", "check"), KIT)
def test_every_balancer_keeps_every_promise(case: BalancerCase, check: Check[BalancerCase]):
    outcome = check.examine(case)
    assert outcome.status == "kept", str(outcome)


def test_the_registry_is_held_to_most_checks():
    """A check that applied nowhere, or a method that few applied to, would pass without looking."""
    assert set(SITUATIONS) <= {check.name for check in BALANCER_CHECKS}
    assert len(KIT) > 0.8 * len(BALANCERS) * len(BALANCER_CHECKS)
    assert {parameters.values[1].name for parameters in KIT} == {check.name for check in BALANCER_CHECKS}


def pbi(losses: np.ndarray) -> float:
    along = losses.sum() / np.sqrt(len(losses))
    return along + 5.0 * np.linalg.norm(losses - along / np.sqrt(len(losses)))


def cosmos(losses: np.ndarray) -> float:
    return losses.mean() - losses.sum() / (np.linalg.norm(losses) * np.sqrt(len(losses)))


OBJECTIVES = {
    "uncertainty": lambda losses: 0.5 * losses.sum(),
    "imtl-l": lambda losses: losses.sum(),
    "gls": lambda losses: np.exp(np.log(losses).mean()),
    "stch": lambda losses: np.log(losses).mean(),
    "pbi": pbi,
    "cosmos": cosmos,
}


def test_methods_that_show_an_objective_are_listed_here():
    assert {method for method in BALANCERS if CASES[method].facts.shows == "objective"} == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_the_published_one(name, make, problem):
    p = problem(TASKS)
    balancer = make(name, TASKS)
    for _ in range(3):
        value = p.call(balancer).item()
        losses = np.array([loss.mean().item() for loss in p.losses().values()])
        assert value == pytest.approx(OBJECTIVES[name](losses), rel=1e-5)


def test_defaults_treat_all_tasks_alike(method, weightless, make):
    weights = make(method, TASKS).get_weights()
    if method == "pcd":  # ranks tasks by definition; the first one comes first
        assert weights == {"a": 1.0, "b": 0.0, "c": 0.0}
    elif weightless:
        assert all(map(math.isnan, weights.values()))
    else:
        assert len(set(weights.values())) == 1


def test_methods_without_task_weights_are_these(make):
    found = {method for method in BALANCERS if make(method).weight_sum == "none"}
    assert found == {"graddrop", "trimmed-mean", "config"}


def test_a_task_absent_for_long_still_counts(method, make, problem):
    p = problem()
    balancer = make(method, warmup_steps=5)
    for _ in range(50):
        p.call(balancer, {"a": p.losses()["a"]})
    p.call(balancer)
    weight = balancer.get_weights()["b"]
    if balancer.weight_sum == "none":
        assert math.isnan(weight)
        found, own = p.gradients(p.call(balancer)), p.gradients(p.losses()["b"].mean())
        assert torch.allclose(found[-1], own[-1])
        return
    assert weight != 0.0 if balancer.signed_weights else weight > 0.1


def test_a_copy_to_the_host_is_said_in_the_docstring(method, make):
    balancer = make(method)
    if balancer.copies_to_host:
        assert "to the host" in "".join(str(base.__doc__) for base in type(balancer).__mro__)
