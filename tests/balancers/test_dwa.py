"""DWA against its formula on epoch means, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtlbalance import DWALoss
from mtlbalance.errors import BalancerError, NonFiniteWarning

TASKS = ("a", "b", "c")


def call(balancer, values) -> np.ndarray:
    losses = {
        task: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for task, value in zip(TASKS, values, strict=True)
        if value is not None
    }
    balancer(losses).backward()
    weights = balancer.get_weights()
    for task, loss in losses.items():
        assert loss.grad.item() == pytest.approx(weights[task])
    return np.array([weights[task] for task in TASKS])


def reference(means: list[np.ndarray], temperature: float) -> np.ndarray:
    if len(means) < 2:
        return np.ones(3)
    powers = np.exp(means[-1] / means[-2] / temperature)
    return 3 * powers / powers.sum()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("counted", [True, False])
def test_weights_follow_the_means_of_the_last_two_epochs(temperature, counted):
    generator = np.random.default_rng(0)
    balancer = DWALoss(TASKS, temperature=temperature, steps_per_epoch=7 if counted else None)
    means: list[np.ndarray] = []
    for _ in range(6):
        epoch = generator.uniform(0.1, 5.0, size=(7, 3)) * np.array([1.0, 1e4, 1e-4])
        for values in epoch:
            np.testing.assert_allclose(call(balancer, values), reference(means, temperature), rtol=1e-5)
        balancer.end_epoch()  # ignored where calls are counted
        means.append(epoch.mean(axis=0))
    assert balancer.get_weights() != dict.fromkeys(TASKS, 1.0)


def test_a_long_epoch_keeps_its_precision():
    """A sum in float32 would stall; the mean does not."""
    balancer = DWALoss(TASKS)
    for value in (1.0, 0.9):
        for _ in range(3000):
            balancer({"a": torch.tensor(value), "b": torch.tensor(1e4 * value)})
        balancer.end_epoch()
    np.testing.assert_allclose(balancer.means_1[:2], [0.9, 9e3], rtol=1e-5)
    np.testing.assert_allclose(balancer.means_2[:2], [1.0, 1e4], rtol=1e-5)


def test_history_survives_a_save_in_the_middle_of_an_epoch():
    generator = np.random.default_rng(1)
    epochs = generator.uniform(0.1, 5.0, size=(4, 5, 3))
    whole = DWALoss(TASKS)
    parted = DWALoss(TASKS)
    for epoch in epochs:
        for step, values in enumerate(epoch):
            if step == 2:
                fresh = DWALoss(TASKS)
                fresh.load_state_dict(parted.state_dict())
                parted = fresh
            assert np.array_equal(call(whole, values), call(parted, values))
        whole.end_epoch()
        parted.end_epoch()


def test_an_epoch_without_a_task_leaves_its_history():
    balancer = DWALoss(TASKS)
    for values in ([4.0, 4.0, 4.0], [4.0, 2.0, 1.0], [4.0, 2.0, None], [4.0, 2.0, None]):
        call(balancer, values)
        balancer.end_epoch()
    ratios = np.array([1.0, 1.0, 0.25])
    expected = 3 * np.exp(ratios / 2) / np.exp(ratios / 2).sum()
    np.testing.assert_allclose(call(balancer, [1.0, 1.0, 1.0]), expected, rtol=1e-6)
    partial = call(balancer, [1.0, None, 1.0])
    np.testing.assert_allclose(partial[[0, 2]], 3 * expected[[0, 2]] / expected[[0, 2]].sum(), rtol=1e-6)


def test_bad_calls_and_empty_epochs_do_not_enter_a_mean():
    balancer = DWALoss(TASKS)
    call(balancer, [4.0, 4.0, 4.0])
    with pytest.warns(NonFiniteWarning):
        call(balancer, [math.nan, 1.0, 1.0])
    balancer.end_epoch()
    balancer.end_epoch()  # nothing happened since
    np.testing.assert_array_equal(balancer.means_1, [4.0, 4.0, 4.0])
    assert balancer.means_2.isnan().all()
    call(balancer, [math.nan, 1.0, 1.0])
    balancer.end_epoch()  # an epoch of bad calls alone
    np.testing.assert_array_equal(balancer.means_1, [4.0, 4.0, 4.0])


def test_losses_at_zero_do_not_break_the_ratio():
    balancer = DWALoss(TASKS, temperature=0.1)
    for values in ([0.0, 1.0, 0.0], [1.0, 1.0, 0.0]):
        call(balancer, values)
        balancer.end_epoch()
    assert np.isfinite(call(balancer, [1.0, 1.0, 1.0])).all()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"steps_per_epoch": 0}, {"steps_per_epoch": 1.5}])
def test_arguments_are_checked(options):
    with pytest.raises(BalancerError, match=next(iter(options))):
        DWALoss(TASKS, **options)
