"""GradVac against its algorithm on vectors, and that against another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlbalance import GradVacLoss, PCGradLoss
from mtlbalance.errors import BalancerError


def names(count: int) -> tuple[str, ...]:
    return tuple(f"t{k}" for k in range(count))


def call(balancer, jacobian: np.ndarray) -> np.ndarray:
    """The gradient delivered for losses with exactly these gradients."""
    theta = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    balancer(*(torch.from_numpy(jacobian) @ theta), shared_params=[theta]).backward()
    return theta.grad.numpy()


def vaccinated(jacobian: np.ndarray, targets: np.ndarray, beta: float, orders: list[list[int]]) -> np.ndarray:
    """The algorithm as it is printed; ``targets`` moves in place."""
    total = np.zeros(jacobian.shape[1])
    for i, order in enumerate(orders):
        own = jacobian[i].copy()
        for j in order:
            other = jacobian[j]
            cosine = own @ other / (np.linalg.norm(own) * np.linalg.norm(other))
            target = targets[i, j]
            if cosine < target:
                turn = target * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - target**2)
                own += np.linalg.norm(own) * turn / (np.linalg.norm(other) * np.sqrt(1 - target**2)) * other
            targets[i, j] = (1 - beta) * target + beta * cosine
        total += own
    return total


def jacobians(seed: int, count: int, steps: int) -> np.ndarray:
    """Task gradients that mostly agree, so that targets are positive and missed now and then."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=count + 2)
    return common + 1.5 * generator.normal(size=(steps, count, count + 2))


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_algorithm_written_out_is_that_of_another_library(count):
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = aggregation.GradVac(beta=0.3, eps=0.0)
    targets = np.zeros((count, count))
    for step, jacobian in enumerate(jacobians(count, count, 6)):
        torch.manual_seed(step)
        orders = []
        for i in range(count):
            others = [j for j in range(count) if j != i]
            orders.append([others[position] for position in torch.randperm(count - 1).tolist()])
        torch.manual_seed(step)
        found = theirs(torch.from_numpy(jacobian)).numpy()
        np.testing.assert_allclose(found, vaccinated(jacobian, targets, 0.3, orders), rtol=1e-8)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_it_follows_the_algorithm(count):
    balancer = GradVacLoss(names(count), beta=0.3, seed=5)
    generator = torch.Generator().manual_seed(5)
    targets = np.zeros((count, count))
    turned = 0
    for jacobian in jacobians(count, count, 8):
        orders = [
            [j for j in torch.randperm(count, generator=generator).tolist() if j != i] for i in range(count)
        ]
        expected = vaccinated(jacobian, targets, 0.3, orders)
        np.testing.assert_allclose(call(balancer, jacobian), expected, rtol=1e-5)
        np.testing.assert_allclose(balancer.target_cosines, targets, atol=1e-6)
        turned += not np.allclose(expected, jacobian.sum(axis=0))
    assert turned >= 1  # else the sum alone would pass
    assert targets.max() > 0.2


def test_targets_move_without_conflict_too():
    """In a copy of it elsewhere they move on conflict alone: never up from 0, and it stays PCGrad."""
    balancer = GradVacLoss(("a", "b"), beta=0.1)
    for _ in range(3):
        call(balancer, np.array([[1.0, 0.0], [3.0, 4.0]]))
    assert balancer.target_cosines[0, 1] == pytest.approx(0.6 * (1 - 0.9**3))


def test_beta_0_is_pcgrad():
    vaccine, surgery = GradVacLoss(names(4), beta=0.0, seed=3), PCGradLoss(names(4), seed=3)
    for seed in range(5):
        jacobian = np.random.default_rng(seed).normal(size=(4, 3))
        np.testing.assert_allclose(call(vaccine, jacobian), call(surgery, jacobian), rtol=1e-5)


@pytest.mark.parametrize("cosine", [1.0, -1.0, 0.9999, -0.9999])
@pytest.mark.parametrize("target", [1.0, -1.0, 0.9999, 0.0])
def test_targets_near_1_take_bounded_steps(cosine, target):
    balancer = GradVacLoss(("a", "b"), beta=0.0)
    balancer.target_cosines.fill_(target)
    first = np.array([1.0, 0.0])
    second = np.array([cosine, np.sqrt(1 - cosine**2)])
    for scale in (1e-12, 1.0, 1e12):
        gradient = call(balancer, np.array([first, scale * second]))
        assert np.isfinite(gradient).all()
        assert np.linalg.norm(gradient) < 50.0 * (1.0 + scale)


def test_a_modified_gradient_has_the_target_cosine():
    balancer = GradVacLoss(("a", "b"), beta=0.0)
    balancer.target_cosines[0, 1] = 0.7
    balancer.target_cosines[1, 0] = -1.0  # the other one stays as it is
    jacobian = np.array([[2.0, 0.0], [-1.0, 0.5]])
    own = call(balancer, jacobian) - jacobian[1]
    assert own @ jacobian[1] / np.linalg.norm(own) / np.linalg.norm(jacobian[1]) == pytest.approx(0.7)


def test_the_targets_of_absent_tasks_wait():
    balancer = GradVacLoss(("a", "b", "c"), beta=0.5)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3)))
    balancer(*(rows @ theta), shared_params=[theta])
    before = balancer.target_cosines.clone()
    balancer({"a": rows[1] @ theta, "c": rows[2] @ theta}, shared_params=[theta])
    moved = balancer.target_cosines != before
    assert moved.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


def test_equal_tasks_share_a_target_of_1_and_stay_finite():
    balancer = GradVacLoss(names(3), beta=0.5)
    row = np.array([1.0, -2.0, 0.3])
    for _ in range(60):
        np.testing.assert_allclose(
            call(balancer, np.array([row, 2 * row, 1e-6 * row])), 3.000001 * row, rtol=1e-6
        )
    gradient = call(balancer, np.array([row, -row, row]))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("options", [{"beta": -0.1}, {"beta": 1.1}, {"seed": -1}])
def test_arguments_are_checked(options):
    with pytest.raises(BalancerError, match=next(iter(options))):
        GradVacLoss(("a", "b"), **options)
