"""Krum against its definition in loops, another library, and attacks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlbalance import KrumLoss
from mtlbalance.errors import BalancerError
from mtlbalance.plugins.manager import load_plugins
from mtlbalance.slots import TaskSpec


def names(count: int) -> tuple[str, ...]:
    return tuple(f"t{k}" for k in range(count))


def solve(jacobian: np.ndarray, **options) -> np.ndarray:
    balancer = KrumLoss(names(len(jacobian)), **options)
    return balancer.solve(jacobian @ jacobian.T, np.ones(len(jacobian)))


def selected(jacobian: np.ndarray, byzantine: int, count: int, power: int) -> np.ndarray:
    """The definition: a score a task, the lowest ones, in loops over vectors."""
    tasks = range(len(jacobian))
    scores = []
    for i in tasks:
        away = sorted(np.linalg.norm(jacobian[i] - jacobian[j]) ** power for j in tasks if j != i)
        scores.append(sum(away[: len(jacobian) - byzantine - 2]))
    weights = np.zeros(len(jacobian))
    weights[np.argsort(scores)[:count]] = 1.0 / count
    return weights


CASES = [(4, 0, 1), (5, 1, 1), (6, 1, 3), (7, 2, 2), (10, 3, 4), (10, 0, 10)]


@pytest.mark.parametrize(("tasks", "byzantine", "count"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_it_follows_the_definition(tasks, byzantine, count, seed):
    jacobian = np.random.default_rng(seed).normal(size=(tasks, 6))
    found = solve(jacobian, num_byzantine=byzantine, num_selected=count)
    np.testing.assert_allclose(found, selected(jacobian, byzantine, count, power=2))


@pytest.mark.parametrize(("tasks", "byzantine", "count"), CASES)
def test_the_definition_with_plain_distances_is_another_library(tasks, byzantine, count):
    """What differs is the square, and nothing else."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    import torch

    jacobian = np.random.default_rng(tasks).normal(size=(tasks, 6))
    theirs = aggregation.KrumWeighting(byzantine, count)(torch.from_numpy(jacobian @ jacobian.T)).numpy()
    np.testing.assert_allclose(selected(jacobian, byzantine, count, power=1), theirs)


@pytest.mark.parametrize("tasks", range(3, 11))
def test_with_one_neighbour_it_is_another_library(tasks):
    """The square plays no role then: both take the nearest pair."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    import torch

    jacobian = np.random.default_rng(tasks).normal(size=(tasks, 6))
    theirs = aggregation.KrumWeighting(tasks - 3, 2)(torch.from_numpy(jacobian @ jacobian.T)).numpy()
    np.testing.assert_allclose(solve(jacobian, num_byzantine=tasks - 3, num_selected=2), theirs)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    byzantine=st.integers(1, 3),
    size=st.sampled_from([1e-3, 1.0, 10.0, 1e6, 1e12]),
    together=st.booleans(),
)
def test_attackers_are_not_followed(seed, byzantine, size, together):
    """With K = 2f + 3, f of them anywhere far off, alone or at one point, scales between 1e-12 and 1e12."""
    generator = np.random.default_rng(seed)
    count = 2 * byzantine + 3
    jacobian = 5.0 + 0.01 * generator.normal(size=(count, 8))
    attackers = generator.choice(count, size=byzantine, replace=False)
    attack = size * generator.normal(size=(1 if together else byzantine, 8)) - 7.0
    jacobian[attackers] = attack
    weights = solve(jacobian, num_byzantine=byzantine)
    assert weights[attackers].sum() == 0.0
    assert weights.sum() == pytest.approx(1.0)


def test_equal_scores_share():
    row, other = np.array([1.0, 2.0]), np.array([-3.0, 1.0])
    np.testing.assert_allclose(solve(np.array([row, row, row, row])), [0.25] * 4)
    np.testing.assert_allclose(solve(np.array([row, other, row]), num_selected=2), [0.5, 0.0, 0.5])
    np.testing.assert_allclose(solve(np.array([other, row, row])), [0.0, 0.5, 0.5])


def test_too_few_present_tasks_weigh_alike():
    for count in (1, 2):
        np.testing.assert_allclose(solve(np.random.default_rng(0).normal(size=(count, 3))), 1.0 / count)
    balancer = KrumLoss(names(6), num_byzantine=2, num_selected=4)
    some = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(balancer.solve(some @ some.T, np.ones(4)), 0.25)
    some = np.random.default_rng(0).normal(size=(5, 3))
    assert sorted(balancer.solve(some @ some.T, np.ones(5))) == [0.0, 0.25, 0.25, 0.25, 0.25]


def test_its_name_says_how_many():
    assert KrumLoss(names(3)).get_name() == "Krum"
    assert KrumLoss(names(3), num_selected=2).get_name() == "multi-Krum(2)"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_byzantine": 1}, r"num_byzantine=1 needs at least 4 tasks \(num_byzantine \+ 3\); there are 3"),
        ({"num_selected": 4}, "num_selected=4 is more than the 3 tasks"),
        ({"num_selected": 0}, "num_selected must be a whole number >= 1"),
        ({"num_byzantine": -1}, "num_byzantine must be a whole number >= 0"),
    ],
)
def test_arguments_are_checked(options, says):
    with pytest.raises(BalancerError, match=says):
        KrumLoss(names(3), **options)


def test_a_config_is_checked_before_a_run():
    registration = load_plugins(entry_points=False).get("balancer", "krum")
    tasks = [TaskSpec(name, "regression", "mse") for name in names(4)]
    assert list(registration.check(registration.config(num_byzantine=1, num_selected=4), tasks)) == []
    found = list(registration.check(registration.config(num_byzantine=2, num_selected=5), tasks))
    assert [problem.key for problem in found] == ["num_byzantine", "num_selected"]
    assert found[0].message == "'num_byzantine' = 2 needs at least 5 tasks, not 4"
    assert found[0].suggestion == "at most 1 here"
