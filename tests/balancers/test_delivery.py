"""Whatever the model looks like, ``.grad`` holds what the method prescribes: for most, a weighted sum's gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mtlbalance import GABALoss
from mtlbalance.errors import GraphConsumedError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # they count passes


class LSTMTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 6, num_layers=2, batch_first=True)

    def forward(self, inputs):
        return self.lstm(inputs[:, :, None])[0][:, -1]


TRUNKS = {
    "mlp": lambda: None,
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)),
    "lstm": LSTMTrunk,
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(10, 6)
    ),
    "dropout 0": lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.0)),
}
TASKS = ("a", "b", "c")


@pytest.fixture
def prescribed(method, prescriptions):
    """What a call should have delivered, to be asked once after each call of one balancer."""
    written_out = prescriptions.PRESCRIPTIONS.get(method)
    if written_out is None:
        return weighted_sum
    kept = []

    def ask(p, balancer) -> list[torch.Tensor | None]:
        if not kept:
            kept.append(written_out(len(p.tasks)))
        return combination(p, kept[0])

    return ask


def combination(p, written_out) -> list[torch.Tensor | None]:
    """From plain gradients in float64: the combination for the trunk, and for heads their own, times a factor."""
    rows = [p.gradients(p.losses()[task].mean()) for task in p.tasks]
    trunk = list(p.trunk.parameters())
    jacobian = np.stack(
        [torch.cat([g.flatten() for g in row[: len(trunk)]]).double().numpy() for row in rows]
    )
    losses = np.array([loss.mean().item() for loss in p.losses().values()])
    shared, factors = written_out.step(jacobian, losses, range(len(losses)), dtype=trunk[0].dtype)
    parts = torch.from_numpy(shared).to(trunk[0].dtype).split([parameter.numel() for parameter in trunk])
    found = [part.view_as(parameter) for part, parameter in zip(parts, trunk, strict=True)]
    for column in range(len(trunk), len(rows[0])):
        own = [
            factor * row[column] for factor, row in zip(factors, rows, strict=True) if row[column] is not None
        ]
        found.append(sum(own) if own else None)
    return found


def weighted_sum(p, balancer) -> list[torch.Tensor | None]:
    """The weighted sum's gradients; those of heads unweighted where the method leaves heads alone."""
    weighted = plain(p, balancer.get_weights())
    if balancer.scale_heads:
        return weighted
    trunk = len(list(p.trunk.parameters()))
    return weighted[:trunk] + plain(p, dict.fromkeys(p.tasks, 1.0))[trunk:]


def plain(p, weights: dict[str, float]) -> list[torch.Tensor | None]:
    losses = p.losses()
    return p.gradients(sum(weights[task] * losses[task].mean() for task in losses))


def assert_same(found, expected, **tolerance) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("delivery", ["auto", "direct", "weighted_sum"])
def test_every_grad_is_what_the_method_prescribes(method, make, problem, prescribed, trunk, delivery):
    p = problem(TASKS, TRUNKS[trunk]())
    balancer = make(method, TASKS, warmup_steps=0, beta=0.3, max_weight=1.0, delivery=delivery)
    for _ in range(2):
        found = p.gradients(p.call(balancer))
        assert_same(found, prescribed(p, balancer), rtol=2e-5, atol=1e-6)


def test_direct_delivery_in_float64_is_exact(problem):
    p = problem(TASKS, dtype=torch.float64)
    balancer = GABALoss(TASKS, warmup_steps=0, beta=0.0, delivery="direct")
    found = p.gradients(p.call(balancer))
    assert_same(found, plain(p, balancer.get_weights()), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("delivery", "passes"), [("auto", 3), ("direct", 3), ("weighted_sum", 4)])
def test_direct_delivery_makes_one_trunk_pass_a_task(problem, delivery, passes):
    p = problem(TASKS)
    balancer = GABALoss(TASKS, delivery=delivery)
    counted = []
    p.trunk.register_full_backward_hook(lambda *_: counted.append(1))
    for step in range(1, 4):
        p.call(balancer).backward()
        assert len(counted) == passes * step


def test_inputs_that_require_a_gradient_get_it_and_cost_no_pass(problem):
    p = problem(TASKS)
    p.inputs.requires_grad_()
    balancer = GABALoss(TASKS, warmup_steps=0, beta=0.0)
    counted = []
    p.trunk.register_full_backward_hook(lambda *_: counted.append(1))
    p.call(balancer).backward()
    assert len(counted) == 3
    found, p.inputs.grad = p.inputs.grad, None
    weights, losses = balancer.get_weights(), p.losses()
    sum(weights[task] * losses[task].mean() for task in losses).backward()
    torch.testing.assert_close(found, p.inputs.grad, rtol=1e-5, atol=1e-8)


def test_features_probe_the_heads_and_pass_the_trunk_once(problem):
    p = problem(TASKS)
    balancer = GABALoss(TASKS, warmup_steps=0, beta=0.0)
    counted = []
    p.trunk.register_full_backward_hook(lambda *_: counted.append(1))

    def call():
        features = p.trunk(p.inputs)
        return balancer(p.per_sample(features), shared_params=features)

    found = p.gradients(call())
    assert len(counted) == 1
    assert_same(found, plain(p, balancer.get_weights()), rtol=1e-5, atol=1e-7)
    features = p.trunk(p.inputs).detach().requires_grad_()
    for task, loss in p.per_sample(features).items():
        (gradient,) = torch.autograd.grad(loss.mean(), features, retain_graph=True)
        assert balancer.report()["grad_norm"][task] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_several_representations(problem):
    p = problem(("a", "b"))
    balancer = GABALoss(("a", "b"), warmup_steps=0, beta=0.0)

    def call(chosen):
        low = p.trunk[:2](p.inputs)
        high = p.trunk[2:](low)
        skip = low.mean(dim=1)
        losses = p.per_sample(high)
        return balancer(
            {"a": losses["a"] + skip.square(), "b": losses["b"]}, shared_params=[low, high][chosen]
        )

    def reference():
        low = p.trunk[:2](p.inputs)
        losses = p.per_sample(p.trunk[2:](low))
        weights = balancer.get_weights()
        return (
            weights["a"] * (losses["a"] + low.mean(dim=1).square()).mean() + weights["b"] * losses["b"].mean()
        )

    for chosen in (slice(0, 1), slice(1, 2), slice(0, 2)):  # the second leaves a way round, the third nests
        found = p.gradients(call(chosen))
        assert_same(found, p.gradients(reference()), rtol=1e-5, atol=1e-7)


def test_the_last_shared_layer_is_probed_and_delivered_by_weighted_sum(problem):
    p = problem(TASKS)
    balancer = GABALoss(TASKS, warmup_steps=0, beta=0.0)
    counted = []
    p.trunk[0].register_full_backward_hook(lambda *_: counted.append(1))
    found = p.gradients(p.call(balancer, shared_params=p.trunk[2].parameters()))
    assert len(counted) == 1
    assert_same(found, plain(p, balancer.get_weights()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_only", [False, True])
def test_parameters_shared_by_some_heads_and_criteria_with_parameters(problem, model_only):
    p = problem(TASKS)
    p.heads["c"] = p.heads["b"]
    scale = nn.Parameter(torch.tensor(1.5))
    balancer = GABALoss(TASKS, warmup_steps=0, beta=0.0)

    def losses():
        found = p.losses()
        return found | {"a": found["a"] * scale}

    for shared in ([p.trunk], [p.trunk, p.heads["b"]]):
        members = [parameter for module in shared for parameter in module.parameters()]
        where = {"model": nn.ModuleList([p.trunk, p.heads])} if model_only else {"shared_params": members}
        found = p.gradients(balancer(losses(), **where))
        delivered, scale.grad = scale.grad, None
        weights = balancer.get_weights()
        expected = p.gradients(sum(weights[task] * loss.mean() for task, loss in losses().items()))
        assert_same(found, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(delivered, scale.grad)
        scale.grad = None


def test_discovered_parameters_are_those_of_the_trunk(problem):
    p = problem(TASKS)
    named, discovered = (GABALoss(TASKS, warmup_steps=0) for _ in range(2))
    p.call(named)
    p.call(discovered, shared_params=None, model=nn.ModuleList([p.heads, p.trunk]))
    assert named.report()["grad_norm"] == pytest.approx(discovered.report()["grad_norm"])


def test_frozen_and_unused_parameters(problem):
    p = problem()
    p.trunk[0].weight.requires_grad_(False)
    p.trunk.add_module("unused", nn.Identity())
    p.trunk.unused.weight = nn.Parameter(torch.ones(3))
    balancer = GABALoss(("a", "b"), warmup_steps=0, beta=0.0)
    found = p.gradients(p.call(balancer))
    assert_same(found, plain(p, balancer.get_weights()), rtol=1e-5, atol=1e-7)
    p.trunk[0].weight.requires_grad_(True)  # unfreezing is noticed
    found = p.gradients(p.call(balancer))
    assert_same(found, plain(p, balancer.get_weights()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("delivery", ["auto", "direct", "weighted_sum"])
@pytest.mark.parametrize("features", [False, True])
def test_hooks_on_what_is_read_run_once_and_are_not_read(problem, delivery, features):
    p = problem()
    balancer, without = (GABALoss(("a", "b"), warmup_steps=0, beta=0.0, delivery=delivery) for _ in range(2))
    seen = []

    def hook(gradient):
        seen.append(1)
        return 10.0 * gradient

    def call(balancer, hooked):
        found = p.trunk(p.inputs)
        if features and hooked:
            found.register_hook(hook)
        return balancer(p.per_sample(found), shared_params=found if features else p.trunk)

    expected = p.gradients(call(without, hooked=False))
    trunk = len(list(p.trunk.parameters()))
    if features:
        expected = [10.0 * gradient for gradient in expected[:trunk]] + expected[trunk:]
    else:
        p.trunk[0].weight.register_hook(hook)
        expected[0] = 10.0 * expected[0]
    assert_same(p.gradients(call(balancer, hooked=True)), expected, rtol=1e-5, atol=1e-7)
    assert len(seen) == 1
    assert balancer.report() == without.report()


def test_one_buffer_for_two_parameters_is_scaled_once():
    """The gradient of a + b may be one tensor for both."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    balancer = GABALoss(("x", "y"), warmup_steps=0, beta=0.0)
    balancer({"x": (a + b).sum(), "y": 3 * (a + b).sum()}, shared_params=[a, b]).backward()
    assert torch.allclose(a.grad, torch.full((3,), 0.75 + 0.25 * 3))
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings(sparse):
    table = nn.Embedding(7, 3, sparse=sparse)
    heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    index = torch.tensor([1, 1, 5, 2])
    balancer = GABALoss(("x", "y"), warmup_steps=0, beta=0.0)

    def losses():
        return [10.0**k * head(table(index)).square().mean() for k, head in enumerate(heads)]

    (balancer(*losses(), shared_params=table) / 2).backward()
    found = table.weight.grad.to_dense()
    assert table.weight.grad.is_sparse is sparse
    for k, task in enumerate(("x", "y")):
        (gradient,) = torch.autograd.grad(losses()[k], table.weight)
        assert balancer.report()["grad_norm"][task] == pytest.approx(
            gradient.to_dense().norm().item(), rel=1e-5
        )
    table.weight.grad = None
    weights = list(balancer.get_weights().values())
    (sum(weight * loss for weight, loss in zip(weights, losses(), strict=True)) / 2).backward()
    torch.testing.assert_close(found, table.weight.grad.to_dense())


def test_a_second_backward_is_a_clear_error(problem):
    p = problem()
    loss = p.call(GABALoss(("a", "b")))
    loss.backward()
    with pytest.raises(GraphConsumedError, match="delivered by an earlier backward"):
        loss.backward()


def test_terms_outside_the_mapping_need_the_graph(problem):
    p = problem()
    balancer = GABALoss(("a", "b"))
    features = p.trunk(p.inputs)
    loss = balancer(p.per_sample(features), shared_params=p.trunk, retain_graph=True)
    found = p.gradients(loss + features.square().mean())
    features = p.trunk(p.inputs)
    both = p.per_sample(features)
    expected = p.gradients(0.5 * both["a"].mean() + 0.5 * both["b"].mean() + features.square().mean())
    assert_same(found, expected, rtol=1e-5, atol=1e-7)
    features = p.trunk(p.inputs)
    loss = balancer(p.per_sample(features), shared_params=p.trunk)
    with pytest.raises(RuntimeError, match="second time"):
        (loss + features.square().mean()).backward()


def test_batch_statistics_are_updated_once_a_step(method, make, problem):
    p = problem(trunk=TRUNKS["batch norm"]())
    p.call(make(method)).backward()
    assert p.trunk[1].num_batches_tracked.item() == 1


def test_a_plain_loop_with_clipping_equals_the_reference_in_float64(problem):
    """Twenty steps of AdamW with clipping, against the same loop with GABA written out in float64."""
    p = problem(TASKS, dtype=torch.float64)
    q = copy.deepcopy(p)
    balancer = GABALoss(TASKS, warmup_steps=3, beta=0.8, min_weight=0.1)
    ours, theirs = (torch.optim.AdamW(x.parameters(), lr=1e-2) for x in (p, q))
    smoothed = torch.full((3,), 1 / 3, dtype=torch.float64)
    for step in range(20):
        ours.zero_grad()
        p.call(balancer).backward()
        torch.nn.utils.clip_grad_norm_(p.parameters(), 1.0)
        ours.step()

        theirs.zero_grad()
        losses = [loss.mean() for loss in q.losses().values()]
        shared = list(q.trunk.parameters())
        norms = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]).norm()
                for loss in losses
            ]
        )
        if step >= 3:
            smoothed = 0.8 * smoothed + 0.2 * (norms.sum() - norms) / (2 * norms.sum())
        weights = smoothed.clamp(min=0.1)
        weights = weights / weights.sum()
        sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
        torch.nn.utils.clip_grad_norm_(q.parameters(), 1.0)
        theirs.step()
        assert list(balancer.get_weights().values()) == pytest.approx(weights.tolist(), rel=1e-6)
    for one, other in zip(p.parameters(), q.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
