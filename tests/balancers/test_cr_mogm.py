"""CR-MOGM: a running mean of another method's weights, that other method's state included."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from mtlbalance import (
    CAGradLoss,
    ConFIGLoss,
    CRMOGMLoss,
    GradVacLoss,
    MGDALoss,
    MoDoLoss,
    PCDLoss,
    PCGradLoss,
)
from mtlbalance.balancers.cr_mogm import SOLVERS
from mtlbalance.errors import BalancerError
from mtlbalance.plugins.manager import load_plugins

TASKS = ("a", "b", "c")


def jacobians(steps: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(steps, count, 5)) + 0.5


def call(balancer, jacobian: np.ndarray, present: str = "abc") -> np.ndarray:
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    losses = dict(zip(balancer.tasks, torch.from_numpy(jacobian) @ theta, strict=True))
    balancer({task: losses[task] for task in present}, shared_params=[theta]).backward()
    return np.array(list(balancer.get_weights().values()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_are_the_running_mean_of_the_methods(solver):
    balancer, method = CRMOGMLoss(TASKS, solver=solver, alpha=0.8), SOLVERS[solver](TASKS)
    expected = None
    for jacobian in jacobians(6):
        found = method.solve(jacobian @ jacobian.T, np.ones(3))
        expected = found if expected is None else 0.8 * expected + 0.2 * found
        np.testing.assert_allclose(call(balancer, jacobian), expected, rtol=1e-5, atol=1e-7)
    assert balancer.get_name() == f"CR-MOGM({method.get_name()})"
    assert balancer.scale_heads == method.scale_heads
    assert balancer.weight_sum == method.weight_sum


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_agreement_with_torchjd(count):
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = aggregation.CRMOGMWeighting(aggregation.IMTLGWeighting(), alpha=0.7)
    tasks = tuple("abcdefghij"[:count])
    balancer = CRMOGMLoss(tasks, solver="imtl-g", alpha=0.7)
    for _ in range(5):
        jacobian = np.random.default_rng(count).normal(size=(count, count + 3))
        theta = torch.zeros(count + 3, dtype=torch.float64, requires_grad=True)
        balancer(*(torch.from_numpy(jacobian) @ theta), shared_params=[theta])
        expected = theirs(torch.from_numpy(jacobian @ jacobian.T)).numpy()
        np.testing.assert_allclose(list(balancer.get_weights().values()), expected, rtol=1e-4, atol=1e-6)


def test_alpha_0_is_the_method_and_1_its_first_weights():
    free, frozen = CRMOGMLoss(TASKS, alpha=0.0), CRMOGMLoss(TASKS, alpha=1.0)
    method = MGDALoss(TASKS)
    seen = [
        (call(free, jacobian), call(frozen, jacobian), call(method, jacobian)) for jacobian in jacobians(4)
    ]
    for now, first, exact in seen:
        np.testing.assert_allclose(now, exact, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(first, seen[0][2], rtol=1e-6, atol=1e-9)


def test_alpha_may_grow_in_training():
    balancer = CRMOGMLoss(TASKS, alpha=0.0)
    call(balancer, jacobians(2)[0])
    before = balancer.get_weights()
    balancer.alpha = 1.0
    call(balancer, jacobians(2)[1])
    assert balancer.get_weights() == pytest.approx(before)


@pytest.mark.parametrize("solver", SOLVERS)
def test_absent_tasks_wait_and_the_present_share(solver):
    balancer = CRMOGMLoss(TASKS, solver=solver, alpha=0.9)
    calls = jacobians(26)
    for jacobian in calls[:3]:
        call(balancer, jacobian)
    before = balancer.smoothed_weights.clone()
    for jacobian in calls[3:6]:
        weights = call(balancer, jacobian, "ab")
        assert balancer.smoothed_weights[2] == before[2]
        if balancer.weight_sum == "1":
            assert weights.sum() == pytest.approx(1.0)
    share = balancer.smoothed_weights / balancer.smoothed_weights.sum()
    if solver == "mgda":  # "c" was as large a part of all before and after
        assert share[2] == pytest.approx(float(before[2]), rel=1e-5)
    for step, jacobian in enumerate(calls[6:]):  # whatever comes and goes
        weights = call(balancer, jacobian, ("abc", "bc", "a", "ac", "ab")[step % 5])
        assert np.isfinite(weights).all()
        if balancer.weight_sum == "1":
            assert weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("solver", ["cagrad", "nash-mtl"])
def test_a_task_that_joins_later_starts_at_its_own_weight(solver):
    balancer, method = CRMOGMLoss(TASKS, solver=solver, alpha=0.9), SOLVERS[solver](TASKS)
    calls = jacobians(4)
    for jacobian in calls[:3]:
        call(balancer, jacobian, "ab")
    assert balancer.smoothed_weights[2].isnan()
    joined = call(balancer, calls[3])
    expected = method.solve(calls[3] @ calls[3].T, np.ones(3))[2]
    assert joined[2] == pytest.approx(expected, rel=0.5)
    assert joined[2] > 0


@pytest.mark.parametrize(
    "make", [lambda: PCGradLoss(TASKS, seed=3), lambda: GradVacLoss(TASKS, seed=4, beta=0.2)]
)
def test_a_methods_own_state_is_saved_with_it(make):
    whole, parted = CRMOGMLoss(TASKS, solver=make()), CRMOGMLoss(TASKS, solver=make())
    for step, jacobian in enumerate(jacobians(8)):
        if step == 4:
            state = parted.state_dict()
            parted = CRMOGMLoss(TASKS, solver=make())
            parted.load_state_dict(state)
        assert np.array_equal(call(whole, jacobian), call(parted, jacobian))
    assert any(key.startswith("solver.") for key in whole.state_dict())


def test_a_method_with_options_is_given_as_itself():
    given, plain = CRMOGMLoss(TASKS, solver=CAGradLoss(TASKS, c=0.1)), CRMOGMLoss(TASKS, solver="cagrad")
    jacobian = jacobians(1)[0]
    expected = CAGradLoss(TASKS, c=0.1).solve(jacobian @ jacobian.T, np.ones(3))
    np.testing.assert_allclose(call(given, jacobian), expected, rtol=1e-5)
    assert not np.allclose(call(plain, jacobian), expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "mgdaa"}, "did you mean 'mgda'"),
        ({"solver": MGDALoss(("a", "x"))}, r"solver has the tasks \('a', 'x'\)"),
        ({"solver": MoDoLoss(TASKS)}, r"solver cannot be MoDo\(one batch\)"),
        ({"solver": PCDLoss(TASKS)}, "solver cannot be PCD: its weights depend on more"),
        ({"alpha": 1.1}, "alpha must be in"),
    ],
)
def test_arguments_are_checked(options, says):
    with pytest.raises(BalancerError, match=says):
        CRMOGMLoss(TASKS, **options)


def test_a_config_may_name_every_method():
    config = load_plugins(entry_points=False).get("balancer", "cr-mogm").config
    assert get_args(config.model_fields["solver"].annotation) == tuple(SOLVERS)


def test_a_method_without_task_weights_has_none_smoothed_either():
    """Its coefficients are averaged, but are no task weights: NaN in every read-out, the plain sum for a value."""
    balancer = CRMOGMLoss(TASKS, solver=ConFIGLoss(TASKS), alpha=0.5)
    for jacobian in jacobians(2):
        call(balancer, jacobian)
    assert all(math.isnan(weight) for weight in balancer.get_weights().values())
    assert balancer.delivers == "combination"
    assert balancer.eval()(*torch.tensor([1.0, 2.0, 4.0])).item() == 7.0


def test_the_report_tells_found_from_smoothed_weights():
    balancer = CRMOGMLoss(TASKS, alpha=0.75)
    first, second = (MGDALoss(TASKS).solve(j @ j.T, np.ones(3)) for j in jacobians(2))
    for jacobian in jacobians(2):
        call(balancer, jacobian)
    report = balancer.report()
    np.testing.assert_allclose(list(report["raw"].values()), second, atol=1e-5)
    np.testing.assert_allclose(list(report["smoothed"].values()), 0.75 * first + 0.25 * second, atol=1e-5)
