"""Situations in which gradients, weights or state once went wrong, each held here so that they stay right."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtlbalance import (
    AlignedMTLLoss,
    AMNLLoss,
    ExcessMTLLoss,
    GABALoss,
    IMTLGLoss,
    MGDALoss,
    PCGradLoss,
    task_gradient_norms,
)
from mtlbalance.errors import BalancerError, NonFiniteWarning, SharedParametersError


def plain(p, weights) -> list[torch.Tensor]:
    losses = p.losses()
    return p.gradients(sum(weights[task] * losses[task].mean() for task in losses))


def assert_close(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", [IMTLGLoss, AlignedMTLLoss])
def test_dependent_gradients_in_float32(cls):
    """What float32 rounds off in a singular Gramian must not be inverted as if it were signal."""
    torch.manual_seed(0)
    rows = torch.randn(3, 2000)
    rows[2] = rows[0] + rows[1]
    found = []
    for dtype in (torch.float32, torch.float64):
        theta = torch.zeros(2000, dtype=dtype, requires_grad=True)
        losses = [row.to(dtype) @ theta for row in rows]
        cls(("a", "b", "c"))(*losses, shared_params=[theta]).backward()
        found.append(theta.grad.double())
    assert found[0].norm() > 1.0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_weights_reused_are_those_of_the_measurement_when_a_task_is_absent():
    theta = torch.zeros(3, requires_grad=True)
    balancer = PCGradLoss(("a", "b", "c"), update_every=2)
    for _ in range(4):
        balancer({"a": theta[0] * 1, "b": theta[1] * 1}, shared_params=[theta])
        assert balancer.get_weights() == {"a": 1.0, "b": 1.0, "c": 0.0}
    with pytest.warns(NonFiniteWarning):
        balancer({"a": theta[0] * torch.inf, "b": theta[1] * 1}, shared_params=[theta])
    assert balancer.get_weights() == {"a": 1.0, "b": 1.0, "c": 0.0}


def test_a_single_task_between_measurements_has_weight_one():
    rows = torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 1.0]])
    for cls in (PCGradLoss, IMTLGLoss):
        theta = torch.zeros(2, requires_grad=True)
        balancer = cls(("a", "b", "c"), update_every=2)
        balancer(*(row @ theta for row in rows), shared_params=[theta])
        for task in "abc":
            balancer.calls = 1  # a call that reuses
            balancer({task: theta.sum()}, shared_params=[theta])
            assert balancer.get_weights()[task] == 1.0


def test_a_model_compiled_as_a_whole_hides_its_heads(problem):
    p = problem()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads = p.trunk, p.heads

        def forward(self, inputs):
            features = self.trunk(inputs)
            return tuple(self.heads[task](features).squeeze(-1) for task in p.tasks)

    compiled = torch.compile(Whole(), backend="aot_eager")

    def losses():
        return {
            task: (prediction - p.targets[task]).square()
            for task, prediction in zip(p.tasks, compiled(p.inputs), strict=True)
        }

    balancer = GABALoss(p.tasks, warmup_steps=0, beta=0.0)
    found = p.gradients(balancer(losses(), shared_params=p.trunk))
    weights = balancer.get_weights()
    expected = p.gradients(sum(weights[task] * loss.mean() for task, loss in losses().items()))
    assert_close(found, expected)
    with pytest.raises(SharedParametersError, match="compile the trunk and the heads"):
        MGDALoss(p.tasks)(losses(), shared_params=p.trunk)
    with pytest.raises(SharedParametersError, match="compile the trunk and the heads"):
        GABALoss(p.tasks)(losses(), model=nn.ModuleList([p.trunk, p.heads]))
    MGDALoss(p.tasks, scale_heads=True)(losses(), shared_params=p.trunk).backward()


def test_float16_is_found_wherever_it_lies():
    trunk, head = nn.Linear(4, 3), nn.Linear(3, 2)

    def losses(precision):
        with torch.autocast("cpu", dtype=torch.float16, enabled=precision == "fp16"):
            out = head(trunk(torch.ones(8, 4)))
        return {"a": 1e-8 * out[:, 0].float().square().mean(), "b": 1e-8 * out[:, 1].float().square().mean()}

    expected = task_gradient_norms(losses("fp32"), trunk)
    found = task_gradient_norms(losses("fp16"), trunk)
    for task, norm in expected.items():
        assert norm.item() > 0
        assert found[task].item() == pytest.approx(norm.item(), rel=0.01)


@pytest.mark.parametrize("neck", [False, True])
def test_a_hooked_module_between_two_representations(neck):
    """A module hook wraps what the module returns; the walk must still see that f2 is computed from f1."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]

    def losses():
        first = trunk(torch.ones(5, 3))
        second = torch.tanh(first) if neck else first + 1.0
        return first, second, [10.0**k * head(second).square().mean() for k, head in enumerate(heads)]

    def delivered():
        first, second, terms = losses()
        balancer = GABALoss(("a", "b"), warmup_steps=0, beta=0.0)
        trunk.zero_grad()
        balancer(*terms, shared_params=[first, second], retain_graph=True).backward()
        return trunk.weight.grad.clone(), list(balancer.get_weights().values())

    without, _ = delivered()
    handle = trunk.register_full_backward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found, weights = delivered()
        handle.remove()
    torch.testing.assert_close(found, without)
    _, _, terms = losses()
    trunk.zero_grad()
    sum(weight * term for weight, term in zip(weights, terms, strict=True)).backward()
    torch.testing.assert_close(found, trunk.weight.grad)


def test_representations_of_a_hooked_trunk_are_seen_in_the_first_call():
    trunk, head = nn.Linear(3, 4), nn.Linear(4, 2)
    trunk.register_full_backward_hook(lambda *_: None)
    balancer = GABALoss(
        ("a", "b"), warmup_steps=1, update_every=2
    )  # the first call measures nothing, but checks
    features = trunk(torch.ones(5, 3, requires_grad=True))
    out = head(features).square().mean(dim=0)
    balancer(out[0], out[1], shared_params=features)


@pytest.mark.parametrize("delivery", ["auto", "weighted_sum"])
def test_a_hook_on_a_head_runs_once_where_heads_are_left_alone(problem, delivery):
    p = problem()
    without = plain(p, dict.fromkeys(p.tasks, 1.0))
    p.heads["a"].weight.register_hook(lambda gradient: 0.5 * gradient)
    found = p.gradients(p.call(MGDALoss(p.tasks, delivery=delivery)))
    index = [id(parameter) for parameter in p.parameters()].index(id(p.heads["a"].weight))
    torch.testing.assert_close(found[index], 0.5 * without[index])


def test_retain_grad_shows_the_gradient_of_backward_alone(problem):
    p = problem()
    features = p.trunk(p.inputs)
    features.retain_grad()
    balancer = GABALoss(p.tasks, warmup_steps=0, beta=0.0)
    balancer(p.per_sample(features), shared_params=features).backward()
    found, weights = features.grad, balancer.get_weights()
    features = p.trunk(p.inputs)
    features.retain_grad()
    losses = p.per_sample(features)
    sum(weights[task] * losses[task].mean() for task in p.tasks).backward()
    torch.testing.assert_close(found, features.grad)


def test_complex_parameters():
    theta = torch.tensor([3 + 4j, 1 - 2j], requires_grad=True)
    parts = torch.tensor([3.0, 4.0, 1.0, -2.0])
    balancer = GABALoss(("a", "b"), warmup_steps=0)
    balancer((theta.abs() ** 2).sum() / 2, 2 * theta.real.sum(), shared_params=[theta]).backward()
    assert balancer.report()["grad_norm"]["a"] == pytest.approx(parts.norm().item())
    pcgrad = PCGradLoss(("a", "b"))
    pcgrad((theta.abs() ** 2).sum() / 2, 2 * theta.real.sum(), shared_params=[theta]).backward()
    assert pcgrad.report()["grad_norm"]["a"] == pytest.approx(parts.norm().item())


def test_a_first_call_under_inference_mode_does_not_spoil_the_state(problem):
    p = problem()
    balancer = GABALoss(p.tasks, warmup_steps=0).to("meta")
    with torch.inference_mode():
        balancer._apply(lambda tensor: torch.zeros_like(tensor, device="cpu"))
    fresh = GABALoss(p.tasks, warmup_steps=0)
    with torch.inference_mode():
        fresh(p.losses())
    p.call(fresh).backward()


def test_one_present_task_needs_no_discovery(problem):
    p = problem()
    model = nn.ModuleList([p.trunk, p.heads])
    balancer = GABALoss(p.tasks, warmup_steps=0)
    balancer({"a": p.losses()["a"]}, model=model).backward()
    assert balancer.get_weights() == {"a": 1.0, "b": 0.0}
    balancer(p.losses(), model=model).backward()
    both = balancer.report()["grad_norm"]
    balancer({"a": p.losses()["a"]}, model=model).backward()
    assert balancer.report()["grad_norm"]["b"] == both["b"]
    assert balancer.report()["grad_norm"]["a"] == pytest.approx(
        both["a"]
    )  # the same parameters, not those of one task


def test_distributed_checkpoints_can_save_a_model_that_holds_a_balancer():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "balancer": PCGradLoss(("a", "b"))})
    assert "balancer.applied_weights" in get_model_state_dict(model)


def test_a_loss_of_exactly_zero_in_a_normalised_mgda():
    theta = torch.ones(2, requires_grad=True)
    balancer = MGDALoss(("a", "b"), normalise="loss")
    balancer(theta.sum() - 2.0, theta[0] * 3.0, shared_params=[theta]).backward()
    assert theta.grad.isfinite().all()


def test_a_sparse_and_a_dense_use_of_one_embedding():
    table = nn.Embedding(5, 3, sparse=True)
    index = torch.tensor([0, 2])
    for order in (False, True):
        terms = {"a": table(index).square().mean(), "b": 3 * table.weight.square().mean()}
        balancer = GABALoss(tuple(sorted(terms, reverse=order)), warmup_steps=0, beta=0.0)
        table.weight.grad = None
        balancer(terms, shared_params=table).backward()
        weights = balancer.get_weights()
        expected = (
            weights["a"] * torch.autograd.grad(table(index).square().mean(), table.weight)[0].to_dense()
        )
        expected += weights["b"] * torch.autograd.grad(3 * table.weight.square().mean(), table.weight)[0]
        torch.testing.assert_close(table.weight.grad.to_dense(), expected)


def test_a_parameter_frozen_after_the_forward_pass(problem):
    p = problem()
    losses = p.losses()
    p.heads["a"].weight.requires_grad_(False)
    balancer = GABALoss(p.tasks, warmup_steps=0)
    balancer(losses, shared_params=p.trunk).backward()
    assert p.heads["a"].weight.grad is None
    assert p.heads["a"].bias.grad is not None


def test_a_function_of_the_user_that_keeps_a_variable():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.variable = "mine"
            return 2 * value

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    theta = torch.ones(2, requires_grad=True)
    balancer = GABALoss(("a", "b"), warmup_steps=0, beta=0.0)
    balancer(Doubled.apply(theta).sum(), theta.sum(), shared_params=[theta]).backward()
    torch.testing.assert_close(theta.grad, torch.full((2,), 4 / 3))


def test_the_legacy_amnl_keeps_its_last_weights_through_a_bad_step():
    balancer = AMNLLoss(("a", "b"), biased_task="a", target_cap=10.0, normalise=True)
    theta = torch.ones(2, requires_grad=True)
    targets = {"a": torch.full((2,), 10.0)}
    balancer(theta * 8.0, theta.sum() * 50.0, targets=targets)
    weights = balancer.get_weights()
    with pytest.warns(NonFiniteWarning):
        balancer(theta * 8.0, theta.sum() * torch.nan, targets=targets)
    assert balancer.get_weights() == weights


def test_targets_of_another_shape_are_named():
    balancer = AMNLLoss(("a", "b"), biased_task="a", target_cap=10.0)
    theta = torch.ones(4, requires_grad=True)
    with pytest.raises(
        BalancerError, match=r"its targets must both have shape \(B,\); they have \(4,\) and \(4, 1\)"
    ):
        balancer(theta * 1.0, theta.sum(), targets={"a": torch.ones(4, 1)})


def test_a_resumed_run_does_not_warn_of_what_is_past(problem):
    p = problem()
    balancer = GABALoss(p.tasks, warmup_steps=0)
    with pytest.warns(NonFiniteWarning):
        balancer({"a": p.losses()["a"] * torch.nan, "b": p.losses()["b"]}, shared_params=p.trunk)
    resumed = GABALoss(p.tasks, warmup_steps=0)
    resumed.load_state_dict(balancer.state_dict())
    p.call(resumed)  # warnings are errors here
    assert resumed.num_nonfinite == 1
    with pytest.warns(NonFiniteWarning):  # but of what is new
        resumed({"a": p.losses()["a"] * torch.nan, "b": p.losses()["b"]}, shared_params=p.trunk)


def test_activation_checkpointing(problem):
    p = problem()
    first, rest = p.trunk[:2], p.trunk[2:]
    balancer = GABALoss(p.tasks, warmup_steps=0, beta=0.0)

    def losses():
        return p.per_sample(rest(checkpoint(first, p.inputs, use_reentrant=False)))

    found = p.gradients(balancer(losses(), shared_params=p.trunk))
    assert_close(found, plain(p, balancer.get_weights()))


def test_a_default_device_does_not_reach_the_generator():
    balancer = PCGradLoss(("a", "b"))
    theta = torch.ones(2, requires_grad=True)
    with torch.device("meta"):
        balancer(theta[0] * 1, theta[1] * 1, shared_params=[theta])
        state = balancer.state_dict()
    assert all(value.device.type == "cpu" for value in state.values())


def test_the_shape_of_sample_weights_is_checked_beside_failure_weights():
    balancer = AMNLLoss(("a", "b"), biased_task="a", target_cap=10.0)
    theta = torch.ones(4, requires_grad=True)
    with pytest.raises(BalancerError, match=r"sample_weights\['a'\] has shape \(3,\)"):
        balancer(
            theta * 1.0,
            theta.sum(),
            targets={"a": torch.ones(4)},
            sample_weights={"a": torch.ones(3)},
        )


def test_a_nan_gradient_under_finite_losses_does_not_enter_sums_of_squares():
    theta = torch.zeros(3, requires_grad=True)
    balancer = ExcessMTLLoss(("a", "b"))
    balancer(theta.sum(), 2.0 * theta.sum(), shared_params=[theta])
    before = balancer.squared_sums.clone()
    with pytest.warns(NonFiniteWarning):  # 0 · ∞ at the corner of the root
        balancer(torch.sqrt(0.0 * theta.sum()), 2.0 * theta.sum(), shared_params=[theta])
    assert torch.equal(balancer.squared_sums, before)
    assert balancer.num_nonfinite == 1
