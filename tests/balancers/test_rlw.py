"""Random weighting: the right distribution, from a generator of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtlbalance import RGWLoss, RLWLoss
from mtlbalance.errors import BalancerError, NonFiniteWarning

TASKS = ("a", "b", "c")


def draws(balancer, count: int) -> np.ndarray:
    theta = torch.ones(2, requires_grad=True)
    seen = []
    for _ in range(count):
        balancer(theta.sum(), 2 * theta.sum(), 3 * theta.sum(), shared_params=[theta])
        seen.append(list(balancer.get_weights().values()))
    return np.array(seen)


@pytest.mark.parametrize("cls", [RLWLoss, RGWLoss])
@pytest.mark.parametrize("scaled", [False, True])
def test_weights_are_the_softmax_of_normal_numbers(cls, scaled):
    """The published weights sum to 1, which beside a plain sum hides a learning rate of 1/K."""
    found = draws(cls(TASKS, seed=5, scale_by_tasks=scaled), 4)
    generator = torch.Generator().manual_seed(5)
    normal = np.array([torch.randn(3, generator=generator).double().numpy() for _ in range(4)])
    expected = np.exp(normal) / np.exp(normal).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected * (3.0 if scaled else 1.0), rtol=1e-5)


def test_the_mean_weight_is_uniform():
    np.testing.assert_allclose(draws(RLWLoss(TASKS), 3000).mean(axis=0), 1 / 3, atol=0.015)


def test_it_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(1)
    first = draws(RLWLoss(TASKS), 3)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert np.array_equal(first, draws(RLWLoss(TASKS), 3))
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())
    assert not np.array_equal(first, draws(RLWLoss(TASKS, seed=1), 3))


def test_ranks_stay_in_step_whatever_tasks_and_losses_they_have():
    """Every call draws once for every task; the draws of two ranks cannot come apart."""
    plain, busy = RLWLoss(TASKS), RLWLoss(TASKS)
    draws(plain, 3)
    one = torch.ones(())
    busy({"a": one})
    with pytest.warns(NonFiniteWarning):
        busy(one, one * math.nan, one)
    busy(one, one, one)
    assert busy.get_weights() == plain.get_weights()


def test_a_bad_call_applies_the_weights_of_the_call_before():
    balancer = RLWLoss(TASKS)
    before = draws(balancer, 1)[-1]
    one = torch.ones(())
    with pytest.warns(NonFiniteWarning):
        balancer(one, one * math.nan, one)
    assert list(balancer.get_weights().values()) == before.tolist()


def test_rgw_leaves_heads_alone():
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(3, 2), torch.nn.ModuleList([torch.nn.Linear(2, 1) for _ in TASKS])
    losses = [head(trunk(torch.ones(4, 3))).square().mean() for head in heads]
    plain = [
        torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
        for loss, head in zip(losses, heads, strict=True)
    ]
    balancer = RGWLoss(TASKS)
    balancer(*losses, shared_params=trunk).backward()
    for head, expected in zip(heads, plain, strict=True):
        torch.testing.assert_close(head.weight.grad, expected)


def test_a_seed_is_checked():
    with pytest.raises(BalancerError, match="seed"):
        RLWLoss(TASKS, seed=-1)
