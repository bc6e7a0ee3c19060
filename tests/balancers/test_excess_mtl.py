"""ExcessMTL against its formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlbalance import ExcessMTLLoss
from mtlbalance.errors import BalancerError, SharedParametersError

TASKS = ("a", "b", "c")
SIZE = 5


class Reference:
    def __init__(self, lr: float) -> None:
        self.sums, self.first, self.weights, self.lr = np.zeros((3, SIZE)), None, np.full(3, 1 / 3), lr

    def step(self, gradients: np.ndarray) -> np.ndarray:
        self.sums = self.sums + gradients**2
        self.risks = (gradients**2 / np.sqrt(self.sums)).sum(axis=1)
        if self.first is None:
            self.first = self.risks
        self.weights = self.weights * np.exp(self.lr * self.risks / self.first)
        self.weights = self.weights / self.weights.sum()
        return self.weights


def call(balancer, gradients, present=TASKS) -> np.ndarray:
    theta = [torch.zeros(SIZE - 2, requires_grad=True), torch.zeros(2, requires_grad=True)]
    rows = torch.from_numpy(gradients).float().split([SIZE - 2, 2], dim=1)
    losses = {
        task: sum(part @ row[k] for part, row in zip(theta, rows, strict=True)) + 1.0
        for k, task in enumerate(TASKS)
        if task in present
    }
    balancer(losses, shared_params=theta).backward()
    return np.array(list(balancer.get_weights().values()))


@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_weights_follow_the_excess_risks(lr):
    generator = np.random.default_rng(2)
    balancer, reference = ExcessMTLLoss(TASKS, weight_lr=lr), Reference(lr)
    scales = np.array([[1.0], [100.0], [0.01]])
    for _ in range(20):
        gradients = scales * generator.normal(size=(3, SIZE))
        np.testing.assert_allclose(call(balancer, gradients), reference.step(gradients), rtol=1e-4)
        np.testing.assert_allclose(list(balancer.report()["raw"].values()), reference.risks, rtol=1e-4)


def test_its_sums_survive_a_save():
    generator = np.random.default_rng(3)
    whole, parted = ExcessMTLLoss(TASKS, weight_lr=0.3), ExcessMTLLoss(TASKS, weight_lr=0.3)
    for step, gradients in enumerate(generator.normal(size=(8, 3, SIZE))):
        if step == 4:
            fresh = ExcessMTLLoss(TASKS, weight_lr=0.3)
            fresh.load_state_dict(parted.state_dict())
            parted = fresh
        assert np.array_equal(call(whole, gradients), call(parted, gradients))
    assert whole.squared_sums.shape == (3, SIZE)


def test_a_state_also_loads_into_one_that_has_run():
    first, second = ExcessMTLLoss(TASKS), ExcessMTLLoss(TASKS)
    gradients = np.ones((3, SIZE))
    call(first, gradients)
    fresh = ExcessMTLLoss(TASKS)
    call(second, 2 * gradients)
    second.load_state_dict(fresh.state_dict())
    assert np.array_equal(call(second, gradients), call(fresh, gradients))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.squared_sums, first.squared_sums)


def test_absent_tasks_wait():
    balancer = ExcessMTLLoss(TASKS, weight_lr=1.0)
    gradients = np.random.default_rng(0).normal(size=(3, SIZE))
    call(balancer, gradients)
    before = {name: value.clone() for name, value in balancer.named_buffers()}
    weights = call(balancer, 3 * gradients, present=("a", "b"))
    assert weights[2] == 0.0
    assert weights.sum() == pytest.approx(1.0)
    for name in ("squared_sums", "excess_risks", "first_risks", "task_weights"):
        assert torch.equal(getattr(balancer, name)[2], before[name][2]), name
    assert balancer.task_weights.sum().item() == pytest.approx(1.0)


def test_a_large_ratio_does_not_overflow():
    balancer = ExcessMTLLoss(TASKS, weight_lr=1.0)
    call(balancer, np.full((3, SIZE), 1e-6))
    weights = call(balancer, np.vstack([np.full((2, SIZE), 1e-6), np.full((1, SIZE), 1e3)]))
    np.testing.assert_allclose(weights, [0.0, 0.0, 1.0], atol=1e-6)
    assert np.isfinite(call(balancer, np.full((3, SIZE), 1e-6))).all()


def test_a_zero_gradient_has_no_risk():
    gradients = np.vstack([np.zeros(SIZE), np.ones((2, SIZE))])
    balancer = ExcessMTLLoss(TASKS)
    weights = call(balancer, gradients)
    assert np.isfinite(weights).all()
    assert balancer.report()["raw"]["a"] == 0.0


def test_it_says_what_it_cannot_read(problem):
    p = problem(TASKS)
    balancer = ExcessMTLLoss(TASKS)
    features = p.trunk(p.inputs)
    with pytest.raises(SharedParametersError, match="must hold parameters, not representations"):
        balancer(p.per_sample(features), shared_params=features)
    p.call(balancer).backward()
    with pytest.raises(SharedParametersError, match="the same parameters in every call"):
        p.call(balancer, shared_params=p.trunk[0].parameters())
    with pytest.raises(BalancerError, match="weight_lr"):
        ExcessMTLLoss(TASKS, weight_lr=0.0)
