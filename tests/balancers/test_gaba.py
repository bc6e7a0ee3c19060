"""GABA against its formulas in plain NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlbalance import GABALoss, GRACELoss, failure_weights
from mtlbalance.errors import BalancerError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # they count passes


def losses_with_norms(norms, theta: torch.Tensor) -> list[torch.Tensor]:
    """Losses whose gradient on ``theta`` (2,) has exactly these norms, in different directions."""
    return [norm * (np.cos(k) * theta[0] + np.sin(k) * theta[1]) for k, norm in enumerate(norms)]


class Reference:
    """GABA as the study writes it."""

    def __init__(self, count: int, beta: float, warmup: int, floor: float) -> None:
        self.smoothed = np.full(count, 1.0 / count)
        self.beta, self.warmup, self.floor, self.calls = beta, warmup, floor, 0

    def step(self, norms) -> np.ndarray:
        norms = np.asarray(norms, dtype=np.float64)
        if self.calls >= self.warmup:
            raw = (norms.sum() - norms) / ((len(norms) - 1) * norms.sum())
            self.smoothed = self.beta * self.smoothed + (1 - self.beta) * raw
        self.calls += 1
        floored = np.maximum(self.smoothed, self.floor)
        return floored / floored.sum()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_follow_the_formulas(data):
    count = data.draw(st.integers(2, 6))
    beta = data.draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))
    floor = data.draw(st.floats(0.0, 1.0 / count))
    warmup = data.draw(st.integers(0, 3))
    norm = st.floats(-12, 12).map(lambda exponent: 10.0**exponent)
    tasks = tuple(f"t{k}" for k in range(count))
    balancer = GABALoss(tasks, beta=beta, warmup_steps=warmup, min_weight=floor)
    reference = Reference(count, beta, warmup, floor)
    theta = torch.zeros(2, requires_grad=True)
    for _ in range(data.draw(st.integers(1, 6))):
        norms = [data.draw(norm) for _ in range(count)]
        balancer(*losses_with_norms(norms, theta), shared_params=[theta])
        expected = reference.step(norms)
        report = balancer.report()
        np.testing.assert_allclose(list(report["applied"].values()), expected, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(
            list(report["smoothed"].values()), reference.smoothed, rtol=2e-5, atol=1e-7
        )
        np.testing.assert_allclose(list(report["grad_norm"].values()), norms, rtol=1e-5)
        assert sum(report["applied"].values()) == pytest.approx(1.0, abs=1e-6)


@given(st.permutations(range(4)))
@settings(max_examples=20, deadline=None)
def test_permuting_tasks_permutes_weights(order):
    norms = [1.0, 30.0, 0.2, 5.0]
    theta = torch.zeros(2, requires_grad=True)
    first = GABALoss(tuple("abcd"), warmup_steps=0, beta=0.5)
    second = GABALoss(tuple("abcd"[k] for k in order), warmup_steps=0, beta=0.5)
    first(*losses_with_norms(norms, theta), shared_params=[theta])
    second(*losses_with_norms([norms[k] for k in order], theta), shared_params=[theta])
    assert second.get_weights() == pytest.approx(first.get_weights(), rel=1e-5)


def test_a_common_scale_changes_nothing():
    theta = torch.zeros(2, requires_grad=True)
    seen = []
    for scale in (1e-9, 1.0, 1e9):
        balancer = GABALoss(("a", "b"), warmup_steps=0)
        balancer(*losses_with_norms([3.0 * scale, scale], theta), shared_params=[theta])
        seen.append(list(balancer.get_weights().values()))
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-6)
    np.testing.assert_allclose(seen[2], seen[1], rtol=1e-6)


def test_the_floor_binds_at_a_twentieth_before_renormalising():
    theta = torch.zeros(2, requires_grad=True)
    balancer = GABALoss(("rul", "health"), warmup_steps=0)
    for _ in range(600):
        balancer(*losses_with_norms([500.0, 1.0], theta), shared_params=[theta])
    weights = balancer.get_weights()
    assert weights["rul"] == pytest.approx(
        0.05 / (0.05 + 500 / 501 * (1 - 0.99**600) + 0.5 * 0.99**600), abs=1e-5
    )
    assert balancer.report()["smoothed"]["rul"] == pytest.approx(
        1 / 501 + (0.5 - 1 / 501) * 0.99**600, rel=1e-4
    )


def test_one_zero_gradient_takes_no_part_in_the_norm():
    theta = torch.zeros(2, requires_grad=True)
    balancer = GABALoss(("a", "b", "c"), warmup_steps=0, beta=0.0, min_weight=0.0)
    balancer(*losses_with_norms([0.0, 3.0, 1.0], theta), shared_params=[theta])
    assert list(balancer.get_weights().values()) == pytest.approx([0.5, 0.125, 0.375])


def test_warm_up_applies_uniform_weights_and_leaves_the_average_alone():
    theta = torch.zeros(2, requires_grad=True)
    balancer = GABALoss(("a", "b"))
    for step in range(101):
        balancer(*losses_with_norms([9.0, 1.0], theta), shared_params=[theta])
        smoothed = balancer.report()["smoothed"]["a"]
        assert smoothed == (0.5 if step < 100 else pytest.approx(0.99 * 0.5 + 0.01 * 0.1))
        assert balancer.report()["raw"]["a"] == pytest.approx(0.1)


@pytest.mark.parametrize("every", [1, 2, 7, 10])
def test_measuring_every_nth_call_gives_the_same_weights_when_it_measures(every):
    theta = torch.zeros(2, requires_grad=True)
    exact = GABALoss(("a", "b"), warmup_steps=5, beta=0.9)
    sparing = GABALoss(("a", "b"), warmup_steps=5, beta=0.9, update_every=every)
    probes = []
    for call in range(40):
        exact(*losses_with_norms([50.0, 1.0], theta), shared_params=[theta])
        losses = losses_with_norms([50.0, 1.0], theta)
        losses[0].register_hook(lambda _: probes.append(1))
        sparing(*losses, shared_params=[theta]).backward()
        if call >= 5 and (call - 5) % every == 0:
            assert sparing.get_weights() == pytest.approx(exact.get_weights(), rel=1e-5)
    assert len(probes) == 40
    assert np.isfinite(list(sparing.report()["grad_norm"].values())).all()


@pytest.mark.parametrize("norms", [[500.0, 1.0], [1.0, 3.0], [1.0, 10.0, 100.0, 1000.0]])
def test_between_measurements_the_weights_stay_near_the_exact_ones(norms):
    """With the study's constants, measuring every tenth call, and norms that do not change."""
    theta = torch.zeros(2, requires_grad=True)
    names = tuple(f"task_{index}" for index in range(len(norms)))
    exact, sparing = GABALoss(names), GABALoss(names, update_every=10)
    apart, measured_apart = 0.0, 0.0
    for call in range(400):
        exact(*losses_with_norms(norms, theta), shared_params=[theta])
        sparing(*losses_with_norms(norms, theta), shared_params=[theta])
        differences = [abs(exact.get_weights()[name] - sparing.get_weights()[name]) for name in names]
        apart = max(apart, *differences)
        if call >= 100 and call % 10 == 0:
            measured_apart = max(measured_apart, *differences)
    assert 0.0 < apart <= 0.045
    assert measured_apart <= 1e-5


def test_between_measurements_one_pass_is_made():
    trunk = torch.nn.Linear(3, 3)
    balancer = GABALoss(("a", "b"), warmup_steps=2, update_every=4)
    passes = []
    trunk.register_full_backward_hook(lambda *_: passes.append(1))
    counted = []
    for _ in range(11):
        features = trunk(torch.ones(2, 3, requires_grad=True))
        before = len(passes)
        balancer(features.square().mean(), features.mean(), shared_params=trunk).backward()
        counted.append(len(passes) - before)
    assert counted == [1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2]


def test_absent_tasks_leave_the_others_as_if_alone():
    theta = torch.zeros(2, requires_grad=True)
    balancer = GABALoss(("a", "b", "c"), warmup_steps=0, beta=0.9, min_weight=0.01)
    pair = GABALoss(("a", "c"), warmup_steps=0, beta=0.9, min_weight=0.01)
    for _ in range(30):
        losses = losses_with_norms([5.0, 1.0, 2.0], theta)
        balancer({"a": losses[0], "c": losses[2]}, shared_params=[theta])
        losses = losses_with_norms([5.0, 1.0, 2.0], theta)
        pair({"a": losses[0], "c": losses[2]}, shared_params=[theta])
        weights = balancer.get_weights()
        assert weights["b"] == 0.0
        assert {"a": weights["a"], "c": weights["c"]} == pytest.approx(pair.get_weights(), rel=1e-5)
    assert balancer.report()["smoothed"]["b"] == pytest.approx(1 / 3)
    assert sum(balancer.report()["smoothed"].values()) == pytest.approx(1.0, abs=1e-6)


def test_a_non_finite_gradient_is_delivered_but_not_learned():
    theta = torch.zeros(2, requires_grad=True)
    balancer = GABALoss(("a", "b"), warmup_steps=0, beta=0.5)
    balancer(*losses_with_norms([4.0, 1.0], theta), shared_params=[theta])
    before = balancer.report()
    loss = torch.sqrt(theta.abs().sum())  # its value is 0, its gradient infinite
    with pytest.warns(UserWarning, match="NaN or infinite"):
        balancer({"a": loss, "b": theta.sum()}, shared_params=[theta]).backward()
    assert balancer.report() == before
    assert not theta.grad.isfinite().all()
    assert balancer.num_nonfinite == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.0}, r"beta must be in \[0, 1\); got 1"),
        ({"beta": -0.1}, "beta"),
        ({"beta": "0.9"}, "beta must be a number"),
        ({"beta": float("nan")}, "beta"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0"),
        ({"warmup_steps": 1.5}, "warmup_steps"),
        ({"warmup_steps": True}, "warmup_steps"),
        ({"min_weight": 0.51}, r"min_weight \(at most 1/K for 2 tasks\) must be in \[0, 0.5\]"),
        ({"update_every": 0}, "update_every"),
        ({"delivery": "driect"}, "did you mean 'direct'"),
        ({"sync": "all"}, "sync must be one of"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(BalancerError, match=message):
        GABALoss(("a", "b"), **arguments)


def test_grace_is_gaba_on_failure_weighted_losses():
    torch.manual_seed(0)
    theta = torch.randn(4, requires_grad=True)
    targets = torch.tensor([0.0, 50.0, 125.0, 300.0])
    grace = GRACELoss(("rul", "health"), biased_task="rul", target_cap=125.0, warmup_steps=0)
    gaba = GABALoss(("rul", "health"), warmup_steps=0)
    for _ in range(3):
        losses = {"rul": theta.square(), "health": theta.sum()}
        first = grace(losses, shared_params=[theta], targets={"rul": targets})
        losses = {"rul": theta.square(), "health": theta.sum()}
        second = gaba(losses, shared_params=[theta], sample_weights={"rul": failure_weights(targets)})
        assert first.item() == second.item()
        assert grace.report() == gaba.report()
