"""Laws that hold of every method, and those that some promise: scaling, agreement, Pareto stationarity, one task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlbalance.balancers.fairgrad import FairGradLoss

# How the delivered gradient grows with a common scale c of all losses: by c to this power, where it is not 1.
LENGTHS = {
    "cosmos": None,  # the mean of the losses less a cosine, which has no scale
    "db-mtl": 0.0,  # a function of log-losses
    "moco": None,
    "modo": None,  # its step size is chosen against the size of the gradients
    "stch": 0.0,  # a function of log-losses
    "nash-mtl": 0.0,  # weights of G·w = 1/w
    "fairgrad": 1.0 - 2.0 * FairGradLoss(("a",)).alpha / (1.0 + FairGradLoss(("a",)).alpha),
}
IGNORES_OWN_SCALES = {"gls", "stch", "imtl-g", "nash-mtl"}  # in direction
NEVER_CONFLICTS = {"mgda", "upgrad", "dualproj", "nash-mtl", "fairgrad"}
RESTS_WHERE_PARETO_STATIONARY = {"mgda", "upgrad", "dualproj"}


def some(methods: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", sorted(methods))


def names(count: int) -> tuple[str, ...]:
    return tuple("abcde"[:count])


def delivered(balancer, jacobian: np.ndarray, losses=None) -> np.ndarray:
    """What one call leaves in ``.grad`` of parameters on which the tasks have exactly these gradients."""
    theta = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    values = np.ones(len(jacobian)) if losses is None else losses
    terms = [
        (value + torch.from_numpy(row) @ theta).reshape(1)
        for value, row in zip(values, jacobian, strict=True)
    ]
    targets = {task: torch.zeros(1, dtype=torch.float64) for task in balancer.tasks}
    balancer(*terms, shared_params=[theta], targets=targets).backward()
    return theta.grad.numpy()


def random_jacobian(seed: int, count: int = 3, width: int = 5) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) * 10 ** generator.uniform(-1, 1, size=(count, 1))


@pytest.fixture
def new(method, make):
    return lambda count: make(method, names(count), warmup_steps=0, beta=1e-9, max_weight=1.0)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_common_scale(method, new, scale):
    """A method whose law differs from the default is listed in ``LENGTHS``."""
    power = LENGTHS.get(method, 1.0)
    if power is None:
        return
    jacobian, losses = random_jacobian(0), np.array([2.0, 3.0, 0.5])
    found = delivered(new(3), scale * jacobian, scale * losses)
    expected = scale**power * delivered(new(3), jacobian, losses)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@some(IGNORES_OWN_SCALES)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scales_of_single_tasks_do_not_turn_the_step(name, make, scale):
    jacobian, losses = random_jacobian(1), np.array([2.0, 3.0, 0.5])
    scales = np.array([1.0, scale, 1.0])
    first = delivered(make(name, names(3)), jacobian, losses)
    second = delivered(make(name, names(3)), scales[:, None] * jacobian, scales * losses)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    assert cosine == pytest.approx(1.0, abs=1e-6)


@some(NEVER_CONFLICTS)
@pytest.mark.parametrize("seed", range(5))
def test_no_task_is_made_worse(name, make, seed):
    jacobian = random_jacobian(seed, count=4)
    step = delivered(make(name, names(4)), jacobian)
    along = jacobian @ step / (np.linalg.norm(jacobian, axis=1) * np.linalg.norm(step))
    assert (along > -1e-6).all()
    assert (
        jacobian @ jacobian.sum(axis=0) < 0
    ).any() or seed  # the plain sum does make one worse, at least once


@some(RESTS_WHERE_PARETO_STATIONARY)
def test_it_rests_where_no_common_descent_exists(name, make):
    rows = random_jacobian(2, count=3, width=6)
    rows[2] = -(0.3 * rows[0] + 0.5 * rows[1])
    step = delivered(make(name, names(3)), rows)
    assert np.linalg.norm(step) < 1e-6 * np.linalg.norm(rows)


@pytest.mark.situation("one task")
def test_a_single_task_gets_its_own_gradient(new):
    balancer, rows = new(1), random_jacobian(3, count=1)
    for _ in range(2):
        step = delivered(balancer, rows)
        if not balancer.free_alone:
            np.testing.assert_allclose(step, rows[0], rtol=1e-6)
        cosine = step @ rows[0] / (np.linalg.norm(step) * np.linalg.norm(rows[0]))
        assert cosine == pytest.approx(1.0)


@pytest.mark.situation("equal gradients")
def test_equal_gradients_are_followed(new):
    row = random_jacobian(4, count=1)[0]
    step = delivered(new(3), np.stack([row, row, row]))
    cosine = step @ row / (np.linalg.norm(step) * np.linalg.norm(row))
    assert cosine == pytest.approx(1.0)


@pytest.mark.situation("equal gradients")
def test_duplicates_of_a_task_weigh_alike_beside_another(new):
    balancer, rows = new(3), random_jacobian(5)
    rows[1] = rows[0]
    assert np.isfinite(delivered(balancer, rows)).all()
    weights = list(balancer.get_weights().values())
    if balancer.reads in ("losses", "gradient norms") and not balancer.draws_weights:
        assert weights[0] == pytest.approx(weights[1], rel=1e-6)


@pytest.mark.situation("one zero gradient")
def test_a_task_without_pull_leaves_the_step_finite(new):
    balancer, rows = new(3), random_jacobian(6)
    rows[1] = 0.0
    for _ in range(2):
        assert np.isfinite(delivered(balancer, rows)).all()
    assert balancer.num_nonfinite == 0


def test_reordering_tasks_leaves_the_step_as_it_was(method, new, make):
    if new(2).draws_weights:
        return
    rows, losses = random_jacobian(7, count=2), np.array([2.0, 0.5])
    # The task that a method prefers by name keeps its place among the names.
    first = make(method, ("a", "b"), warmup_steps=0, max_weight=1.0)
    second = make(method, ("b", "a"), warmup_steps=0, max_weight=1.0, biased_task="a", primary="a")
    expected = delivered(first, rows, losses)
    np.testing.assert_allclose(
        delivered(second, rows[::-1].copy(), losses[::-1]), expected, rtol=1e-5, atol=1e-9
    )
