"""``delivery="batched"``: the gradients of pass by pass, from one pass through what the tasks share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlbalance import ExcessMTLLoss, GABALoss, PCGradLoss, SDMGradLoss, UPGradLoss
from mtlbalance.errors import InvalidArgumentError, SharedParametersError

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """Two features for the heads; ``meeting`` says how the tasks come together."""

    def __init__(self, meeting: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.meeting = meeting
        self.first = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
        self.inputs = torch.randn(7, 6)

    def losses(self):
        low = self.first(self.inputs)
        high = self.second(low)
        features = dict.fromkeys(TASKS, high)
        if self.meeting == "two features":
            features = {"a": torch.cat([low, high])[::2], "b": high, "c": low}
        losses = {
            task: (self.heads[task](features[task]) - k).square().mean() for k, task in enumerate(TASKS)
        }
        if self.meeting == "a penalty":
            losses = {task: loss + self.first[0].weight.square().sum() for task, loss in losses.items()}
        if self.meeting == "one from another":
            losses["b"] = losses["a"] * losses["b"]
        if self.meeting == "an absent task":
            losses["b"] = None
        return losses, [*self.first.parameters(), *self.second.parameters()]


def outcome(net, balancer, shared=None, **options):
    """Return every gradient of two calls, and the state."""
    found = []
    for _ in range(2):
        net.zero_grad()
        losses, trunk = net.losses()
        total = balancer(losses, shared_params=trunk if shared is None else shared(net), **options)
        (0.5 * total).backward()
        found += [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return found, {key: value for key, value in balancer.state_dict().items() if key != "task_names"}


@pytest.mark.parametrize(
    "meeting", ["one feature", "two features", "a penalty", "one from another", "an absent task"]
)
@pytest.mark.parametrize("cls", [GABALoss, PCGradLoss, UPGradLoss, SDMGradLoss, ExcessMTLLoss])
def test_gradients_and_state_are_those_of_pass_by_pass(cls, meeting):
    options = {"warmup_steps": 0, "min_weight": 0.1} if cls is GABALoss else {}
    expected = outcome(Net(meeting), cls(TASKS, **options))
    found = outcome(Net(meeting), cls(TASKS, delivery="batched", **options))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_the_trunk_is_passed_once_and_each_head_once():
    counted = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, name):
            ctx.name = name
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            counted.append(ctx.name)
            return 1.0 * gradient, None

    trunk, heads = nn.Linear(3, 4), [nn.Linear(4, 1) for _ in TASKS]
    features = Counted.apply(trunk(torch.randn(5, 3)), "trunk")
    losses = [Counted.apply(head(features), "head").mean() for head in heads]
    GABALoss(TASKS, delivery="batched", warmup_steps=0)(*losses, shared_params=trunk).backward()
    assert sorted(counted) == ["head"] * 3 + ["trunk"]


def test_of_features_the_heads_are_passed_one_after_another():
    expected, found = (
        outcome(
            FeatureNet("one feature"),
            GABALoss(TASKS, warmup_steps=0, delivery=delivery),
            lambda net: net.features,
        )
        for delivery in ("auto", "batched")
    )
    torch.testing.assert_close(found, expected, equal_nan=True)


class FeatureNet(Net):
    def losses(self):
        self.features = self.second(self.first(self.inputs))
        losses = {task: (head(self.features) - 1.0).square().mean() for task, head in self.heads.items()}
        return losses, [self.features]


def test_a_suffix_of_the_trunk_is_probed_together_and_delivered_by_weighted_sum():
    expected, found = (
        outcome(
            Net("one feature"),
            GABALoss(TASKS, warmup_steps=0, delivery=delivery),
            lambda net: list(net.second.parameters()),
        )
        for delivery in ("auto", "batched")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_retained_graph_can_be_used_again():
    net = Net("one feature")
    losses, trunk = net.losses()
    balancer = GABALoss(TASKS, delivery="batched", warmup_steps=0)
    balancer(losses, shared_params=trunk, retain_graph=True).backward(retain_graph=True)
    sum(losses.values()).backward()


def test_a_task_that_reaches_nothing_shared_is_named():
    net = Net("one feature")
    losses, trunk = net.losses()
    losses["c"] = net.heads["c"].bias.square().sum()
    with pytest.raises(SharedParametersError, match="'c'"):
        GABALoss(TASKS, delivery="batched")(losses, shared_params=trunk)


def test_hooks_see_what_is_delivered_and_nothing_else():
    seen = []
    net = Net("one feature")
    net.first[0].weight.register_hook(lambda gradient: seen.append(gradient.shape))
    losses, trunk = net.losses()
    GABALoss(TASKS, delivery="batched")(losses, shared_params=trunk).backward()
    assert seen == [torch.Size([5, 6])]


def test_an_operation_that_cannot_be_batched_says_what_to_use():
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    trunk, heads = nn.Linear(3, 4), [nn.Linear(4, 1) for _ in TASKS]
    features = Looks.apply(trunk(torch.randn(5, 3)))
    losses = [head(features).mean() for head in heads]
    with pytest.raises(InvalidArgumentError, match=r"for all tasks at once .*; use delivery='auto'"):
        GABALoss(TASKS, delivery="batched")(*losses, shared_params=trunk)
