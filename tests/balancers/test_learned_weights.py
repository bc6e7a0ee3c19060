"""Uncertainty and IMTL-L against their formulas in float64, trained by an ordinary optimizer."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from mtlbalance import IMTLLLoss, UncertaintyLoss
from mtlbalance.errors import BalancerError, NonFiniteWarning, UntrainedWeightsWarning

TASKS = ("a", "b", "c")
KINDS = {"a": "regression", "b": "classification", "c": "regression"}
LEARNED = [UncertaintyLoss, IMTLLLoss]


def losses_at(values) -> list[torch.Tensor]:
    return [torch.tensor(float(value), dtype=torch.float64, requires_grad=True) for value in values]


def objective(cls, scales: np.ndarray, losses: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The value, its slopes by the losses, and its slopes by s."""
    if cls is UncertaintyLoss:
        factors = np.array([0.5, 1.0, 0.5])
        weights = factors * np.exp(-scales)
        return float((weights * losses + 0.5 * scales).sum()), weights, 0.5 - weights * losses
    weights = np.exp(scales)
    return float((weights * losses - scales).sum()), weights, weights * losses - 1.0


def build(cls):
    return cls(TASKS, kinds=KINDS) if cls is UncertaintyLoss else cls(TASKS)


@pytest.mark.parametrize("cls", LEARNED)
def test_values_weights_and_training_follow_the_formulas(cls):
    balancer = build(cls)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
    generator = np.random.default_rng(0)
    scales = np.zeros(3)
    for _ in range(30):
        values = generator.uniform(0.05, 3.0, size=3)
        losses = losses_at(values)
        optimizer.zero_grad()
        total = balancer(*losses)
        total.backward()
        optimizer.step()
        value, weights, slopes = objective(cls, scales, values)
        assert total.item() == pytest.approx(value, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose([loss.grad for loss in losses], weights, rtol=1e-5)
        np.testing.assert_allclose(list(balancer.get_weights().values()), weights, rtol=1e-5)
        np.testing.assert_allclose(balancer.log_scales.grad, slopes, rtol=1e-4, atol=1e-6)
        scales = scales - 0.1 * slopes
    np.testing.assert_allclose(balancer.log_scales.detach(), scales, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", LEARNED)
def test_at_the_minimum_the_terms_are_equal(cls):
    """Regression: e^{-s}·L = 1, so σ² = L; classification: e^{-s}·L = ½; IMTL-L: e^{s}·L = 1."""
    balancer = build(cls)
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        total = balancer(*losses_at([9.0, 0.5, 0.01]))
        total.backward()
        optimizer.step()
    expected = [0.5 / 9.0, 1.0, 0.5 / 0.01] if cls is UncertaintyLoss else [1 / 9.0, 2.0, 100.0]
    np.testing.assert_allclose(list(balancer.get_weights().values()), expected, rtol=1e-3)
    if cls is UncertaintyLoss:  # the total goes below zero as a loss falls: it is no measure of progress
        assert balancer(*losses_at([1e-4, 1e-4, 1e-4])).item() < 0


def test_imtl_l_is_twice_uncertainty_for_regression_at_minus_s():
    imtl, uncertainty = IMTLLLoss(TASKS), UncertaintyLoss(TASKS)
    with torch.no_grad():
        imtl.log_scales.copy_(torch.tensor([0.3, -1.0, 2.0]))
        uncertainty.log_scales.copy_(-imtl.log_scales)
    values = [2.0, 0.1, 5.0]
    assert imtl(*losses_at(values)).item() == pytest.approx(2 * uncertainty(*losses_at(values)).item())


@pytest.mark.parametrize("cls", LEARNED)
def test_both_terms_of_an_absent_task_are_left_out(cls):
    balancer = build(cls)
    with torch.no_grad():
        balancer.log_scales.copy_(torch.tensor([0.5, 4.0, -0.5]))
    scales = np.array([0.5, 4.0, -0.5])
    a, _, c = losses_at([2.0, 1.0, 3.0])
    total = balancer({"a": a, "c": c})
    total.backward()
    with_b = objective(cls, scales, np.array([2.0, 1.0, 3.0]))
    only_b = {UncertaintyLoss: math.exp(-4.0) + 2.0, IMTLLLoss: math.exp(4.0) - 4.0}[cls]
    assert total.item() == pytest.approx(with_b[0] - only_b, rel=1e-5)
    assert balancer.log_scales.grad[1] == 0.0
    np.testing.assert_allclose(balancer.log_scales.grad[[0, 2]], with_b[2][[0, 2]], rtol=1e-5)


@pytest.mark.parametrize("cls", LEARNED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_gives_its_weights_no_gradient(cls, bad):
    balancer = build(cls)
    a, b, c = losses_at([bad, 1.0, 1.0])
    with pytest.warns(NonFiniteWarning):
        balancer(a, b, c).backward()
    assert torch.equal(balancer.log_scales.grad, torch.zeros(3))


@pytest.mark.parametrize("cls", LEARNED)
def test_weights_in_no_optimizer_are_noticed_after_a_hundred_calls(cls):
    balancer = build(cls)
    for _ in range(100):
        balancer(*losses_at([2.0, 3.0, 4.0])).backward()
    with pytest.warns(UntrainedWeightsWarning, match=r"balancer\.parameters\(\) to your optimizer"):
        balancer(*losses_at([2.0, 3.0, 4.0])).backward()
    for _ in range(250):  # once is enough
        balancer(*losses_at([2.0, 3.0, 4.0])).backward()


@pytest.mark.parametrize("how", ["trained", "frozen", "eval", "one stuck"])
def test_no_false_alarm(how):
    balancer = UncertaintyLoss(TASKS)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.01)
    balancer.log_scales.requires_grad_(how != "frozen")
    balancer.train(how != "eval")
    for step in range(350):
        optimizer.zero_grad()
        losses = losses_at([1.0, 3.0, 4.0])  # the slope of the first is 0 at s = 0
        balancer(*losses).backward()
        if how == "trained" or (how == "one stuck" and step % 90 == 0):
            optimizer.step()


def test_weights_that_stop_moving_after_a_resume_are_noticed_too():
    first = UncertaintyLoss(TASKS)
    with torch.no_grad():
        first.log_scales.fill_(0.7)
    second = UncertaintyLoss(TASKS)
    second.load_state_dict(first.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            second(*losses_at([1.0, 3.0, 4.0])).backward()
    assert [warning.category for warning in caught] == [UntrainedWeightsWarning]


def test_learned_weights_keep_their_precision_inside_a_model():
    outer = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "balancer": UncertaintyLoss(TASKS)})
    with torch.no_grad():
        outer["balancer"].log_scales.fill_(0.1)
    optimizer = torch.optim.SGD(outer["balancer"].parameters(), lr=0.1)
    outer.half()
    assert outer["layer"].weight.dtype == torch.float16
    assert torch.equal(outer["balancer"].log_scales, torch.full((3,), 0.1))
    outer["balancer"](*losses_at([2.0, 3.0, 4.0])).backward()
    optimizer.step()  # the very same parameter
    assert outer["balancer"].log_scales[0] != 0.1


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"a": "regression", "b": "regression"}, "no kind for 'c'"),
        ({**KINDS, "x": "regression"}, "unknown task 'x'"),
        ({**KINDS, "b": "clasification"}, "did you mean 'classification'"),
        (["regression"] * 3, "must map task names"),
    ],
)
def test_kinds_are_checked(kinds, message):
    with pytest.raises(BalancerError, match=message):
        UncertaintyLoss(TASKS, kinds=kinds)
