"""GradNorm against its algorithm in float64, and the ways in which it is often got wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mtlbalance import GradNormLoss
from mtlbalance.errors import BalancerError

TASKS = ("a", "b", "c")


class Reference:
    """Algorithm 1 with a plain gradient step, written out."""

    def __init__(self, count: int, alpha: float, lr: float) -> None:
        self.weights, self.initial, self.alpha, self.lr = np.ones(count), None, alpha, lr

    def step(self, norms, losses) -> np.ndarray:
        norms, losses = np.asarray(norms, dtype=np.float64), np.asarray(losses, dtype=np.float64)
        if self.initial is None:
            self.initial = losses
        fallen = losses / self.initial
        rates = fallen / fallen.mean()
        target = (self.weights * norms).mean() * rates**self.alpha
        applied = self.weights
        moved = applied - self.lr * norms * np.sign(applied * norms - target)
        moved = np.maximum(moved, 1e-3)
        self.weights = moved * len(moved) / moved.sum()
        return applied


def line_losses(slopes, values, theta) -> list[torch.Tensor]:
    """Losses of given values and gradient norms on ``theta`` (2,), which is zero."""
    return [
        slope * (np.cos(k) * theta[0] + np.sin(k) * theta[1]) + value
        for k, (slope, value) in enumerate(zip(slopes, values, strict=True))
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("lr", [0.025, 0.5])
def test_weights_follow_the_algorithm(alpha, lr):
    generator = np.random.default_rng(3)
    balancer = GradNormLoss(TASKS, alpha=alpha, weight_lr=lr)
    reference = Reference(3, alpha, lr)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(25):
        norms, values = generator.uniform(0.1, 3.0, size=3), generator.uniform(0.2, 2.0, size=3)
        balancer(*line_losses(norms, values, theta), shared_params=[theta])
        weights = np.array(list(balancer.get_weights().values()))
        np.testing.assert_allclose(weights, reference.step(norms, values), rtol=2e-5)
        assert weights.sum() == pytest.approx(3.0)
        assert weights.min() > 0


def test_the_closed_form_is_the_double_backward_of_the_paper(problem):
    """∂/∂w Σ |‖∇(w_k·L_k)‖ − t_k| by autograd through the norms, on the last shared layer of a real model."""
    p = problem(TASKS, dtype=torch.float64)
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    last = list(p.trunk[2].parameters())
    losses = [loss.mean() for loss in p.losses().values()]
    norms = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(weight * loss, last, create_graph=True)]
            ).norm()
            for weight, loss in zip(weights, losses, strict=True)
        ]
    )
    target = norms.mean().detach().expand(3)  # at the first call every rate is 1
    (norms - target).abs().sum().backward()
    balancer = GradNormLoss(TASKS, weight_lr=1e-3)
    p.call(balancer, shared_params=last)
    moved = 1.0 - 1e-3 * weights.grad
    np.testing.assert_allclose(balancer.task_weights, moved * 3 / moved.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        list(balancer.report()["grad_norm"].values()), norms.detach(), rtol=1e-6
    )  # exactly the layer that was given


def test_nothing_of_its_own_is_left_in_the_models_gradients(problem):
    """The published double backward adds second-order terms to every parameter unless they are zeroed."""
    p = problem(TASKS, dtype=torch.float64)
    balancer = GradNormLoss(TASKS)
    assert list(balancer.parameters()) == []
    for _ in range(3):
        found = p.gradients(p.call(balancer, shared_params=p.trunk[2]))
        weights = balancer.get_weights()
        expected = p.gradients(sum(weights[task] * loss.mean() for task, loss in p.losses().items()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)
    assert weights != dict.fromkeys(TASKS, 1.0)


def test_a_task_that_falls_slowly_gains():
    """A negative exponent, a common slip, would take weight from it."""
    balancer = GradNormLoss(("slow", "fast"), weight_lr=0.1)
    theta = torch.zeros(2, requires_grad=True)
    for step in range(5):
        balancer(*line_losses([1.0, 1.0], [1.0, 0.5**step], theta), shared_params=[theta])
    weights = balancer.get_weights()
    assert weights["slow"] > 1.1 > 0.9 > weights["fast"]


def test_equal_norms_and_rates_are_a_fixed_point():
    balancer = GradNormLoss(TASKS)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for value in (4.0, 2.0, 1.0):
        balancer(*line_losses([2.0] * 3, [value] * 3, theta), shared_params=[theta])
    np.testing.assert_allclose(balancer.task_weights, 1.0, atol=0.06)


@pytest.mark.parametrize("scale", [1e-12, 1e3, 1e12])
def test_weights_stay_positive_and_sum_to_the_number_of_tasks(scale):
    balancer = GradNormLoss(TASKS)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    generator = np.random.default_rng(1)
    for _ in range(20):
        norms = scale * generator.uniform(0.1, 3.0, size=3)
        balancer(*line_losses(norms, scale * norms, theta), shared_params=[theta])
        weights = np.array(list(balancer.get_weights().values()))
        assert weights.min() > 0
        assert weights.sum() == pytest.approx(3.0)


def test_initial_losses_are_each_tasks_first_and_are_saved():
    balancer = GradNormLoss(TASKS)
    theta = torch.zeros(2, requires_grad=True)
    a, b, _ = line_losses([1.0, 2.0, 3.0], [5.0, 6.0, 7.0], theta)
    balancer({"a": a, "b": b}, shared_params=[theta])
    balancer(*line_losses([1.0, 2.0, 3.0], [0.5, 0.6, 0.7], theta), shared_params=[theta])
    torch.testing.assert_close(balancer.initial_losses, torch.tensor([5.0, 6.0, 0.7]))
    fresh = GradNormLoss(TASKS)
    fresh.load_state_dict(balancer.state_dict())
    for one in (balancer, fresh):
        one(*line_losses([1.0, 2.0, 3.0], [0.1, 0.6, 0.7], theta), shared_params=[theta])
    assert torch.equal(balancer.task_weights, fresh.task_weights)


def test_absent_tasks_wait():
    balancer = GradNormLoss(TASKS, weight_lr=0.1)
    theta = torch.zeros(2, requires_grad=True)
    for _ in range(3):
        balancer(*line_losses([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], theta), shared_params=[theta])
    before = copy.deepcopy(balancer.task_weights)
    a, b, _ = line_losses([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], theta)
    balancer({"a": a, "b": b}, shared_params=[theta])
    after = balancer.task_weights
    assert after[2] == before[2]
    assert after.sum().item() == pytest.approx(3.0)
    assert after[0] > before[0]  # a pulls less than b


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"weight_lr": 0.0}, {"update_every": 0}])
def test_arguments_are_checked(options):
    with pytest.raises(BalancerError, match=next(iter(options))):
        GradNormLoss(TASKS, **options)


def test_measuring_every_nth_call_steps_only_then(problem):
    p = problem(TASKS)
    balancer = GradNormLoss(TASKS, update_every=3)
    seen = []
    for _ in range(7):
        p.call(balancer).backward()
        seen.append(balancer.get_weights())
    assert seen[1] == seen[2] == seen[3]
    assert seen[0] != seen[1]
    assert seen[3] != seen[4] == seen[5] == seen[6]
