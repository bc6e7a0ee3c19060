"""``delivery="low_memory"``: the same gradients and state as ever, of which one or two tasks' are held at a time."""

import numpy as np
import pytest
import torch

from mtlbalance import GABALoss, PCGradLoss, SDMGradLoss, UPGradLoss
from mtlbalance.errors import InvalidArgumentError

K = 12


def names(count):
    return tuple(f"task_{index}" for index in range(count))


def network(features: bool):
    """Return a trunk whose every layer needs its tasks' gradients, and what the tasks share of it."""
    torch.manual_seed(0)
    trunk = torch.nn.Linear(6, 5)
    heads = torch.nn.ModuleList(torch.nn.Linear(5, 1) for _ in range(4))
    hidden = trunk(torch.randn(7, 6)).tanh()
    losses = [((head(hidden) - k).square().mean() if k != 2 else None) for k, head in enumerate(heads)]
    return (
        losses,
        [hidden] if features else list(trunk.parameters()),
        [*trunk.parameters(), *heads.parameters()],
    )


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("cls", [GABALoss, PCGradLoss, UPGradLoss, SDMGradLoss])
def test_it_delivers_and_remembers_what_direct_delivery_does(cls, features):
    found = {}
    for delivery in ("direct", "low_memory"):
        balancer = cls(names(4), delivery=delivery, **({"warmup_steps": 0} if cls is GABALoss else {}))
        losses, shared, parameters = network(features)
        balancer(*losses, shared_params=shared).backward()
        found[delivery] = (
            [None if p.grad is None else p.grad.clone() for p in parameters],
            {name: value for name, value in balancer.state_dict().items() if name != "task_names"},
        )
    torch.testing.assert_close(found["direct"], found["low_memory"], rtol=1e-5, atol=1e-7, equal_nan=True)


def levels(balancer, count: int) -> float:
    """Return the most memory in use at a time, in copies of the shared tensor."""
    theta = torch.zeros(50_000, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        losses = [((k + 1.0) * theta).cos().sum() for k in range(count)]
        balancer(*losses, shared_params=[theta]).backward()
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum(events).max() / (4 * theta.numel())


@pytest.mark.parametrize("cls", [GABALoss, PCGradLoss])
def test_the_gradients_of_all_tasks_are_never_held(cls):
    plain = levels(lambda *losses, shared_params: sum(losses), K)
    assert levels(cls(names(K), delivery="low_memory"), K) - plain < 8  # float64 copies of two are among them
    assert levels(cls(names(K)), K) - plain > K - 3


@pytest.mark.parametrize(
    ("cls", "count", "passes"),
    [(GABALoss, 4, 5), (PCGradLoss, 2, 3), (PCGradLoss, 4, 10), (PCGradLoss, 1, 2)],
)
def test_the_passes_that_it_takes_instead(cls, count, passes):
    theta = torch.ones(3, requires_grad=True)
    counted = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            counted.append(1)
            return gradient

    hidden = Counted.apply(theta * 2.0)
    losses = [(k + 1.0) * hidden[k % 3].square() for k in range(count)]
    cls(names(count), delivery="low_memory")(*losses, shared_params=[theta]).backward()
    assert len(counted) == passes


def test_a_batch_cannot_be_observed_without_holding_its_gradients():
    balancer = SDMGradLoss(names(2), delivery="low_memory")
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(InvalidArgumentError, match="cannot observe"):
        balancer.observe(theta.sum(), theta.square().sum(), shared_params=[theta])
