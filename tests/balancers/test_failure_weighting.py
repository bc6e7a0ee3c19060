"""Fixed weights and failure weights by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mtlbalance import AMNLLoss, FixedWeightLoss, GRACELoss, failure_weights, task_gradient_norms
from mtlbalance.errors import BalancerError


def test_failure_weights_by_hand():
    targets = torch.tensor([-10.0, 0.0, 25.0, 100.0, 125.0, 200.0])
    assert failure_weights(targets).tolist() == pytest.approx([2.0, 2.0, 1.8, 1.2, 1.0, 1.0])
    assert failure_weights(targets, cap=100, max_weight=5).tolist() == pytest.approx([5, 5, 4, 1, 1, 1])
    assert failure_weights(torch.tensor([0, 125])).tolist() == [2.0, 1.0]
    for bad in ({"cap": 0.0}, {"max_weight": 0.5}):
        with pytest.raises(BalancerError, match=next(iter(bad))):
            failure_weights(targets, **bad)


def test_fixed_weights_are_used_as_given():
    balancer = FixedWeightLoss(("a", "b"), weights=(2.0, 3.0))
    assert balancer.get_weights() == {"a": 2.0, "b": 3.0}
    assert balancer(torch.tensor(1.0), torch.tensor(10.0)).item() == 32.0
    assert balancer({"b": torch.tensor(10.0)}).item() == 50.0  # the present task has the whole budget
    assert balancer.get_weights() == {"a": 0.0, "b": 5.0}
    assert FixedWeightLoss(("a", "b")).get_name() == "Fixed(0.50/0.50)"
    assert FixedWeightLoss(("a", "b"), weights={"b": 0.25, "a": 0.75}).get_name() == "Fixed(0.75/0.25)"


def test_a_task_of_weight_zero_stays_at_zero():
    balancer = FixedWeightLoss(("a", "b"), weights=(1.0, 0.0))
    assert balancer({"b": torch.tensor(3.0)}).item() == 0.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "no weight for 'b'"),
        ({"a": 1.0, "bb": 1.0}, "unknown task 'bb'.*did you mean 'b'"),
        ((1.0,), "1 values for 2 tasks"),
        ((1.0, -1.0), r"weights\['b'\] must be in"),
        ((1.0, math.inf), "weights"),
        ((1.0, "x"), "must be a number"),
        (3.0, "mapping or a sequence"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(BalancerError, match=message):
        FixedWeightLoss(("a", "b"), weights=weights)


def test_amnl_is_fixed_on_failure_weighted_samples():
    loss, targets = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.tensor([0.0, 62.5, 125.0])
    health = torch.tensor(4.0, requires_grad=True)
    balancer = AMNLLoss(("rul", "health"), biased_task="rul", target_cap=125.0, weights=(0.75, 0.25))
    total = balancer(loss * 1.0, health * 1.0, targets={"rul": targets})
    assert total.item() == pytest.approx(0.75 * (2 + 3 + 3) / 3 + 0.25 * 4)
    total.backward()
    assert loss.grad.tolist() == pytest.approx([0.5, 0.375, 0.25])
    assert health.grad.item() == 0.25
    halved = balancer(
        loss * 1.0, health, targets={"rul": targets}, sample_weights={"rul": torch.full((3,), 0.5)}
    )
    assert halved.item() == pytest.approx(0.75 * (2 + 3 + 3) / 6 + 0.25 * 4)


def test_the_legacy_form_divides_each_loss_by_itself():
    loss = torch.tensor([1.0, 3.0], requires_grad=True)
    health = torch.tensor(0.2, requires_grad=True)
    balancer = AMNLLoss(("rul", "health"), biased_task="rul", target_cap=10.0, normalise=True)
    total = balancer(loss * 1.0, health * 1.0, targets={"rul": torch.tensor([10.0, 10.0])})
    assert total.item() == pytest.approx(1.0)
    total.backward()
    assert loss.grad.tolist() == pytest.approx([0.5 / 2 / 2, 0.5 / 2 / 2])
    assert health.grad.item() == pytest.approx(0.5 / 0.2)
    assert balancer.get_weights() == pytest.approx({"rul": 0.25, "health": 2.5})
    assert balancer.get_name() == "AMNL(normalised)"


def test_what_failure_weighting_needs():
    for cls in (AMNLLoss, GRACELoss):
        with pytest.raises(BalancerError, match=r"biased_task: unknown task 'rull'.*did you mean 'rul'"):
            cls(("rul", "health"), biased_task="rull", target_cap=125.0)
        with pytest.raises(BalancerError, match="target_cap"):
            cls(("rul", "health"), biased_task="rul", target_cap=0.0)
        balancer = cls(("rul", "health"), biased_task="rul", target_cap=125.0)
        theta = torch.ones(2, requires_grad=True)
        losses = {"rul": theta * 1, "health": theta.sum()}
        with pytest.raises(BalancerError, match=r"targets=\{'rul': y\}"):
            balancer(losses, shared_params=[theta])
        with pytest.raises(BalancerError, match="reduction='none'"):
            balancer(losses | {"rul": theta.sum()}, shared_params=[theta], targets={"rul": torch.ones(2)})
        only = balancer(
            {"health": theta.sum()}, shared_params=[theta]
        )  # the biased task is absent: no targets
        assert only.item() == 2.0


def test_task_gradient_norms_measure_without_touching_anything():
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(4, 3).double(), [torch.nn.Linear(3, 1).double() for _ in range(3)]
    features = trunk(torch.randn(6, 4).double())
    losses = {name: head(features).squeeze(1) ** 2 for name, head in zip("abc", heads, strict=True)}
    norms = task_gradient_norms(losses, trunk)
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss.mean(), list(trunk.parameters()), retain_graph=True)
        expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norms[name].item() == pytest.approx(expected.item(), rel=1e-12)
        assert norms[name].dim() == 0
    assert trunk.weight.grad is None
    sum(loss.mean() for loss in losses.values()).backward()  # the graph is still there
    with pytest.raises(BalancerError, match="task 'a' does not depend"):
        task_gradient_norms({"a": (heads[0].weight ** 2).sum()}, trunk)
    with pytest.raises(BalancerError, match="does not require a gradient"):
        task_gradient_norms({"a": torch.tensor(1.0)}, trunk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_gradients_are_summed_in_float32(dtype):
    theta = torch.zeros(100_000, dtype=dtype, requires_grad=True)
    norms = task_gradient_norms({"a": (theta * 0.01).sum()}, [theta])
    assert norms["a"].dtype == torch.float32
    assert norms["a"].item() == pytest.approx(0.01 * 100_000**0.5, rel=5e-3)
