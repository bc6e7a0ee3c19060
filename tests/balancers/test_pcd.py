"""PCD against another library, its optimality conditions, and what its docstring says of special cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlbalance import PCDLoss
from mtlbalance.errors import BalancerError
from mtlbalance.plugins.manager import load_plugins
from mtlbalance.slots import TaskSpec


def names(count: int) -> tuple[str, ...]:
    return tuple(f"t{k}" for k in range(count))


def call(balancer, jacobian: np.ndarray, present: list[int] | None = None) -> np.ndarray:
    """The gradient delivered for losses with exactly these gradients."""
    theta = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    losses = torch.from_numpy(jacobian) @ theta
    chosen = range(len(jacobian)) if present is None else present
    balancer({balancer.tasks[k]: losses[k] for k in chosen}, shared_params=[theta]).backward()
    return theta.grad.numpy()


@pytest.mark.parametrize("count", range(2, 11))
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.4, 1.0])
def test_agreement_with_torchjd(count, tau):
    """Over steps, so that averages count, and with fewer numbers than tasks, so that some constraints contradict."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    ours, theirs = PCDLoss(names(count), tau=tau, beta=0.9), aggregation.PCD(tau=tau, beta=0.9, eps=0.0)
    generator = np.random.default_rng(count)
    for step in range(4):
        width = count + 3 if step % 2 else max(2, count - 2)
        jacobian = generator.normal(size=(count, 13)) * (np.arange(13) < width)
        jacobian *= 10 ** generator.uniform(-2, 2, size=(count, 1))
        expected = theirs(torch.from_numpy(jacobian)).numpy()
        size = np.linalg.norm(jacobian[0])
        np.testing.assert_allclose(call(ours, jacobian), expected, rtol=1e-4, atol=1e-5 * size)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000), count=st.integers(2, 6), tau=st.floats(0.0, 1.0), primary=st.integers(0, 5)
)
def test_it_is_the_nearest_direction_that_gives_all_their_share(seed, count, tau, primary):
    generator = np.random.default_rng(seed)
    jacobian = generator.normal(size=(count, count + 2)) * 10 ** generator.uniform(-4, 4, size=(count, 1))
    first = primary % count
    balancer = PCDLoss(names(count), tau=tau, primary=names(count)[first])
    update = call(balancer, jacobian)
    unit = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)  # the averages of a first measurement
    others = np.delete(unit, first, axis=0)
    assert np.linalg.norm(update) == pytest.approx(np.linalg.norm(jacobian[first]), rel=1e-5)
    weights = np.array(list(balancer.get_weights().values()))
    scaled = weights * np.linalg.norm(jacobian, axis=1)
    direction = scaled @ unit / scaled[first]
    gained = others @ direction
    multipliers = np.delete(scaled, first) / scaled[first]
    assert (gained >= tau - 1e-5 * (1 + multipliers.sum())).all()
    assert (multipliers >= 0).all()
    assert (multipliers * (gained - tau) <= 1e-4 * (1 + multipliers.sum()) ** 2).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_the_size_of_a_secondary_loss_plays_no_role(scale):
    generator = np.random.default_rng(3)
    plain, scaled = (PCDLoss(names(3), tau=0.5, beta=0.9) for _ in range(2))
    for _ in range(3):
        jacobian = generator.normal(size=(3, 4))
        expected = call(plain, jacobian)
        np.testing.assert_allclose(call(scaled, jacobian * [[1.0], [scale], [1.0]]), expected, rtol=1e-4)


def test_averages_wait_for_absent_tasks_and_count_zeros():
    balancer = PCDLoss(names(3), beta=0.5)
    rows = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    call(balancer, rows)
    call(balancer, rows, present=[0, 2])
    call(balancer, rows, present=[1])  # alone: nothing to balance, and measured all the same
    call(balancer, rows * [[1.0], [1.0], [0.0]])
    assert balancer.norm_counts.tolist() == [3.0, 3.0, 3.0]
    corrected = balancer.norm_averages.square() / (1 - 0.5**balancer.norm_counts)
    np.testing.assert_allclose(corrected, [25.0, 1.0, 4.0 * (0.125 + 0.25) / 0.875], rtol=1e-5)


def test_without_the_primary_the_others_weigh_alike():
    balancer = PCDLoss(names(3), update_every=2)
    rows = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    for _ in range(2):  # measured, and between measurements
        np.testing.assert_allclose(call(balancer, rows, present=[1, 2]), [0.5, 1.0])


def test_nothing_moves_where_the_primary_is_at_rest():
    balancer = PCDLoss(names(3))
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_array_equal(call(balancer, rows), 0.0)
    assert set(balancer.get_weights().values()) == {0.0}


def test_constraints_that_contradict_each_other_are_dropped():
    rows = np.array([[3.0, 4.0], [1.0, 0.0], [-2.0, 0.0]])
    balancer = PCDLoss(names(3))
    np.testing.assert_allclose(call(balancer, rows), rows[0])
    assert balancer.get_weights() == {"t0": 1.0, "t1": 0.0, "t2": 0.0}


def test_an_exactly_opposed_task_that_asks_for_nothing_stops_the_update():
    rows = np.array([[3.0, 4.0], [-6.0, -8.0]])
    np.testing.assert_allclose(call(PCDLoss(names(2), tau=0.0), rows), 0.0, atol=1e-12)
    np.testing.assert_allclose(call(PCDLoss(names(2), tau=0.1), rows), -rows[0], rtol=1e-5)


def test_a_tau_for_each_task():
    rows = np.eye(3)
    update = call(PCDLoss(names(3), primary="t1", tau={"t0": 0.5, "t2": 0.0}), rows)
    np.testing.assert_allclose(update, np.array([0.5, 1.0, 0.0]) / np.sqrt(1.25), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tau": 1.5}, r"tau must be in \[0, 1\]"),
        ({"tau": {"b": 0.1}}, "tau has none for 'c'; it needs one for every task but the primary, 'a'"),
        ({"tau": {"a": 0.1, "b": 0.1, "c": 0.1}}, "tau has one for 'a'"),
        ({"tau": {"b": 0.1, "d": 0.1}}, "tau: unknown task 'd'"),
        ({"tau": {"b": 0.1, "c": -1.0}}, r"tau\['c'\] must be in"),
        ({"beta": 1.0}, "beta must be in"),
        ({"primary": "A"}, "primary: unknown task 'A'"),
    ],
)
def test_arguments_are_checked(options, says):
    with pytest.raises(BalancerError, match=says):
        PCDLoss(("a", "b", "c"), **options)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"primary": "rull"}, ["primary"]),
        ({"tau": {"helth": 0.1}}, ["tau.helth", "tau"]),
        ({"tau": {"rul": 0.1, "health": 0.1}}, ["tau.rul"]),
        ({"primary": "health", "tau": {"rul": 0.1}}, []),
    ],
)
def test_a_config_is_checked_before_a_run(options, keys):
    registration = load_plugins(entry_points=False).get("balancer", "pcd")
    tasks = [TaskSpec(name, "regression", "mse") for name in ("rul", "health")]
    config = registration.config(**options)
    assert [problem.key for problem in registration.check(config, tasks)] == keys
    if keys:
        with pytest.raises(BalancerError):
            registration.build(config, tasks)
    else:
        assert registration.build(config, tasks).primary == "health"
