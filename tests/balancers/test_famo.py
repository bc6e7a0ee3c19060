"""FAMO against its algorithm with PyTorch's own Adam in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtlbalance import FAMOLoss
from mtlbalance.errors import BalancerError, NonFiniteWarning

TASKS = ("a", "b", "c")


class Reference:
    """The algorithm with autograd through the softmax and an ordinary optimizer on the logits."""

    def __init__(self, lr: float, gamma: float, bounds) -> None:
        self.logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=lr, weight_decay=gamma)
        self.bounds = torch.tensor(bounds, dtype=torch.float64)

    def distance(self, losses) -> torch.Tensor:
        return torch.tensor(losses, dtype=torch.float64) - self.bounds + 1e-8

    def weights(self, losses) -> np.ndarray:
        """The slopes by the losses of Σ z_k·log(D_k)/c, c held constant."""
        given = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
        distance = given - self.bounds + 1e-8
        shares = self.logits.detach().softmax(0)
        scale = (shares / distance).sum().detach()
        (slopes,) = torch.autograd.grad((distance.log() * shares / scale).sum(), given)
        return slopes.numpy()

    def update(self, before, after) -> None:
        fall = self.distance(before).log() - self.distance(after).log()
        (self.logits.grad,) = torch.autograd.grad(self.logits.softmax(0), self.logits, grad_outputs=fall)
        self.optimizer.step()


def call(balancer, values) -> np.ndarray:
    losses = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    total = balancer(*losses)
    total.backward()
    weights = np.array(list(balancer.get_weights().values()))
    np.testing.assert_allclose([loss.grad for loss in losses], weights, rtol=1e-5)
    assert total.item() == pytest.approx(float(weights @ np.array(values)), rel=1e-5)
    return weights


@pytest.mark.parametrize("bounds", [[0.0, 0.0, 0.0], [0.05, 0.01, 0.0]])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("exact", [True, False])
def test_weights_follow_the_algorithm(bounds, gamma, exact):
    generator = np.random.default_rng(4)
    balancer = FAMOLoss(TASKS, gamma=gamma, min_losses=bounds)
    reference = Reference(0.025, gamma, bounds)
    before = None
    for _ in range(40):
        values = generator.uniform(0.1, 2.0, size=3)
        if before is not None and not exact:
            reference.update(before, values)
        np.testing.assert_allclose(call(balancer, values), reference.weights(values), rtol=1e-4)
        before = values
        if exact:
            after = values * generator.uniform(0.7, 1.1, size=3)
            balancer.update(*[torch.tensor(value) for value in after])
            reference.update(values, after)
    np.testing.assert_allclose(balancer.logits, reference.logits.detach(), rtol=1e-3, atol=1e-5)
    assert balancer.get_name() == ("FAMO" if exact else "FAMO(next batch)")


def test_the_task_that_falls_fastest_loses_weight():
    balancer = FAMOLoss(TASKS)
    for _ in range(20):
        call(balancer, [1.0, 1.0, 1.0])
        balancer.update({"a": torch.tensor(0.5), "b": torch.tensor(0.9), "c": torch.tensor(1.0)})
    shares = balancer.report()["raw"]
    assert shares["a"] < shares["b"] < shares["c"]


@pytest.mark.parametrize("exact", [True, False])
def test_the_state_of_its_optimizer_survives_a_save(exact):
    """Without the moments and their step the next step would be a first one, of full length."""
    generator = np.random.default_rng(0)
    values = generator.uniform(0.1, 2.0, size=(12, 2, 3))
    whole, parted = FAMOLoss(TASKS), FAMOLoss(TASKS)
    for step, (before, after) in enumerate(values):
        if step == 6:
            fresh = FAMOLoss(TASKS)
            fresh.load_state_dict(parted.state_dict())
            parted = fresh
        for balancer in (whole, parted):
            call(balancer, before)
            if exact:
                balancer.update(*[torch.tensor(value) for value in after])
        assert whole.get_weights() == parted.get_weights()
        assert torch.equal(whole.logits, parted.logits)
    assert list(whole.parameters()) == []
    assert whole.get_name() == parted.get_name()


def test_a_save_between_call_and_update_loses_nothing():
    first = FAMOLoss(TASKS)
    call(first, [1.0, 2.0, 3.0])
    second = FAMOLoss(TASKS)
    second.load_state_dict(first.state_dict())
    for balancer in (first, second):
        balancer.update(*[torch.tensor(value) for value in (0.5, 1.9, 3.0)])
    assert torch.equal(first.logits, second.logits)
    assert not torch.equal(first.logits, torch.zeros(3))


def test_absent_tasks_wait_for_their_next_loss():
    balancer = FAMOLoss(TASKS)
    call(balancer, [1.0, 1.0, 1.0])
    call(balancer, [0.9, 0.8, 0.7])
    before = {name: value.clone() for name, value in balancer.named_buffers()}
    balancer({"a": torch.tensor(0.5), "b": torch.tensor(0.7)})
    for name in ("logits", "moment_1", "moment_2", "adam_steps", "previous_losses"):
        assert getattr(balancer, name)[2] == before[name][2], name
        assert getattr(balancer, name)[0] != before[name][0], name
    assert balancer.adam_steps.tolist() == [2.0, 2.0, 1.0]


def test_bad_losses_move_nothing():
    balancer = FAMOLoss(TASKS, min_losses={"a": 0.5, "b": 0.0, "c": 0.0})
    call(balancer, [1.0, 1.0, 1.0])
    call(balancer, [0.9, 0.8, 0.7])
    before, weights = balancer.state_dict(), balancer.get_weights()
    logits = balancer.logits.clone()
    one = torch.tensor(1.0)
    with pytest.warns(NonFiniteWarning, match="below its min_losses"):
        balancer(torch.tensor(0.4), one, one)
    assert balancer.get_weights() == weights
    assert torch.equal(balancer.logits, logits)
    assert torch.equal(balancer.previous_losses, before["previous_losses"])
    balancer.update(one, one, one * math.nan)
    assert torch.equal(balancer.logits, logits)
    assert balancer.num_nonfinite == 2


def test_update_takes_losses_as_the_call_does():
    balancer = FAMOLoss(("a", "b"))
    samples = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 2.0])}
    weight = {"a": torch.tensor([2.0, 0.0])}
    balancer(samples, sample_weights=weight)
    balancer.update({"a": 0.5 * samples["a"], "b": samples["b"]}, sample_weights=weight)
    shares = balancer.report()["raw"]
    assert shares["a"] < 0.5 < shares["b"]
    with pytest.raises(BalancerError, match="did you mean 'a'"):
        balancer.update({"aa": torch.tensor(1.0)})


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"gamma": -1.0}, {"min_losses": [0.0]}, {"min_losses": {"a": -1.0, "b": 0, "c": 0}}],
)
def test_arguments_are_checked(options):
    with pytest.raises(BalancerError, match=next(iter(options))):
        FAMOLoss(TASKS, **options)
