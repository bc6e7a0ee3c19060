"""Weight gradients kept as factors: the same numbers as the products, made nowhere where they need not be."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mtlbalance import GABALoss, PCGradLoss
from mtlbalance.balancers import ghost
from mtlbalance.errors import GraphConsumedError, NonFiniteWarning

TASKS = ("a", "b", "c")
ROWS = 7


@pytest.fixture
def always(monkeypatch):
    """Take factors wherever it can be done, however small the layer."""
    monkeypatch.setattr(ghost, "_pays", lambda *_: True)


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes[tuple(result.shape)] += 1
        return result


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.last = nn.Linear(5, 6)

    def forward(self, inputs):
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(inputs)))))


class Recomputed(nn.Sequential):
    """Keeps no activations."""

    def forward(self, inputs):
        return checkpoint(super().forward, inputs, use_reentrant=False)


class OverTime(nn.Sequential):
    """Every sample is a series of three steps."""

    def forward(self, inputs):
        series = torch.stack([inputs, 0.5 * inputs, -inputs.square()], dim=1)
        return super().forward(series).mean(dim=1)


class Scattered(nn.Module):
    """Linear layers whose forms autograd writes down differently."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6) / 2)
        self.other = nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, inputs):
        hidden = torch.tanh(inputs @ self.weight)
        return torch.addmm(hidden, hidden, self.other.t(), alpha=0.5) + 0.1 * self.other.sum()


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8, bias), nn.Tanh(), nn.Linear(8, 6, bias), nn.Tanh())


def partly_frozen() -> nn.Sequential:
    trunk = mlp()
    trunk[2].weight.requires_grad_(False)
    return trunk


TRUNKS = {
    "mlp": mlp,
    "no bias": lambda: mlp(bias=False),
    "over time": lambda: OverTime(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6, bias=False)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.ReLU(), nn.Linear(10, 6)
    ),
    "frozen": partly_frozen,
    "tied": Tied,
    "recomputed": lambda: Recomputed(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)),
    "scattered": Scattered,
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)),
}
IN_FACTORS = {"mlp": 2, "no bias": 2, "over time": 2, "conv": 1, "frozen": 1, "tied": 1, "batch norm": 2}


class Model:
    """A trunk, three heads and a batch, and what the losses of them are."""

    def __init__(self, trunk, width: int = 6, dtype=torch.float32, rows: int = ROWS, inputs: int = 5) -> None:
        torch.manual_seed(0)
        self.trunk = trunk().to(dtype)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in TASKS}).to(dtype)
        self.inputs = torch.randn(rows, inputs).to(dtype)
        self.targets = torch.randn(rows, len(TASKS)).to(dtype)

    def losses(self, tasks=TASKS):
        features = self.trunk(self.inputs)
        errors = {
            t: self.heads[t](features).squeeze(1) - self.targets[:, k]
            for k, t in enumerate(TASKS)
            if t in tasks
        }
        return {task: 10.0 ** -TASKS.index(task) * error.square().mean() for task, error in errors.items()}

    def grads(self):
        parameters = [*self.trunk.parameters(), *self.heads.parameters()]
        return [None if p.grad is None else p.grad.clone() for p in parameters]


def assert_same(one, other, rtol=1e-5) -> None:
    assert [g is None for g in one] == [g is None for g in other]
    for left, right in zip(one, other, strict=True):
        if left is not None:
            torch.testing.assert_close(left, right, rtol=rtol, atol=1e-6 * float(right.abs().max()))


def made(model):
    """Return how many weight gradients are kept as factors."""
    return len(ghost.ghost_layers(list(model.trunk.parameters()), list(model.losses().values())))


def both(run, trunk=mlp, balancer=GABALoss, **options):
    """Run with factors and with products, and compare every gradient and what is reported."""
    results = []
    for factors in (True, False):
        model, chosen = Model(trunk), balancer(TASKS, **options)
        chosen.reads_products = factors
        run(model, chosen)
        results.append((model.grads(), chosen.report()))
    (grads, report), (expected_grads, expected_report) = results
    assert_same(grads, expected_grads)
    for column, values in expected_report.items():
        assert report[column] == pytest.approx(values, rel=1e-5, nan_ok=True), column


def step(model, balancer, tasks=TASKS, scale=1.0, **arguments):
    total = balancer(model.losses(tasks), shared_params=model.trunk, **arguments)
    (scale * total).backward()
    return total


@pytest.mark.parametrize("name", TRUNKS)
def test_every_model_gets_the_same(name, always):
    both(step, TRUNKS[name], warmup_steps=0, beta=0.5)
    assert made(Model(TRUNKS[name])) == IN_FACTORS.get(name, 0)


def test_every_method_gets_the_same(method, make, problem, always):
    """Trained for three steps, whether the method reads norms, inner products, all numbers or nothing."""
    found = []
    for factors in (True, False):
        p, balancer = problem(TASKS), make(method, TASKS, warmup_steps=0, beta=0.5)
        balancer.reads_products = factors and getattr(balancer, "reads_products", False)
        weights = p.train(balancer, 3)
        found.append(([q.detach() for q in p.parameters()], weights))
    (parameters, weights), (expected, expected_weights) = found
    for left, right in zip(weights, expected_weights, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5, nan_ok=True)
    for left, right in zip(parameters, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "over time"])
def test_norms_are_those_of_float64(name, always):
    model, exact = Model(TRUNKS[name]), Model(TRUNKS[name], dtype=torch.float64)
    balancer = GABALoss(TASKS, warmup_steps=0)
    step(model, balancer)
    for task, loss in exact.losses().items():
        grads = torch.autograd.grad(loss, list(exact.trunk.parameters()), retain_graph=True)
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        assert balancer.report()["grad_norm"][task] == pytest.approx(norm, rel=1e-5)


def test_samples_that_cancel_keep_the_digits_of_float32(always):
    """Squares of norms, summed sample by sample, would be off by 3e-4 of a sample's norm; products are by 1e-7."""
    layer = nn.Linear(4, 3, bias=False)
    x = torch.randn(1, 4).repeat(2, 1)
    push = torch.randn(3)
    balancer = GABALoss(("a", "b"), warmup_steps=0)
    y = layer(x)
    balancer({"a": ((y[0] - y[1]) * push).sum(), "b": y.sum()}, shared_params=layer).backward()
    assert balancer.report()["grad_norm"]["a"] < 1e-6 * float(x[0].norm() * push.norm())


def test_an_outside_pass_of_every_kind(always):
    """Scaled, accumulated, differentiated twice, with an absent task, every other step: `.grad` is the same."""
    options = {"warmup_steps": 0, "beta": 0.5}
    both(lambda m, b: step(m, b, scale=2.0**16), **options)
    both(lambda m, b: [step(m, b) for _ in range(3)], **options)
    both(lambda m, b: [step(m, b, tasks) for tasks in (TASKS, ("a", "c"), ("b",))], **options)
    both(lambda m, b: [step(m, b) for _ in range(3)], update_every=2, **options)
    both(step, delivery="weighted_sum", **options)

    def twice(model, balancer):
        losses = model.losses()
        total = balancer(losses, shared_params=model.trunk, retain_graph=True)
        total.backward(retain_graph=True)
        total.backward()
        losses["a"].backward()

    both(twice, **options)
    both(step, balancer=PCGradLoss)


def test_a_second_backward_is_refused_as_ever(always):
    model = Model(mlp)
    total = GABALoss(TASKS)(model.losses(), shared_params=model.trunk)
    total.backward()
    with pytest.raises(GraphConsumedError, match="earlier backward"):
        total.backward()


def test_inputs_changed_in_place_are_noticed(always):
    model = Model(mlp)
    total = GABALoss(TASKS)(model.losses(), shared_params=model.trunk)
    model.inputs.zero_()
    with pytest.raises(GraphConsumedError, match="changed in place"):
        total.backward()


def test_hooks_run_once_on_what_is_delivered(always):
    seen = []

    def hooked(model, balancer):
        model.trunk[2].weight.register_hook(lambda grad: (seen.append(grad.clone()), 2.0 * grad)[1])
        step(model, balancer)

    both(hooked, warmup_steps=0)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient", "input"])
def test_nothing_non_finite_goes_unseen(where, bad, always):
    model, balancer = Model(mlp), GABALoss(TASKS, warmup_steps=0, beta=0.0)
    losses = model.losses()
    if where == "loss":
        losses["b"] = losses["b"] * bad
    elif where == "gradient":
        features = model.trunk(model.inputs)
        features.register_hook(lambda grad: torch.full_like(grad, bad))
        losses["b"] = losses["b"] + (0.0 * features).sum()
    else:
        model.inputs[3, 1] = bad
        losses = model.losses()
    before = balancer.state_dict()["ema_weights"].clone()
    with pytest.warns(NonFiniteWarning):
        balancer(losses, shared_params=model.trunk).backward()
    assert balancer.num_nonfinite == 1
    assert torch.equal(balancer.ema_weights, before)
    assert not all(p.grad.isfinite().all() for p in model.trunk.parameters())  # a GradScaler skips the step


def test_autocast_around_the_call_takes_no_digits(always):
    model, balancer, pushes = Model(lambda: nn.Linear(5, 6)), GABALoss(TASKS, warmup_steps=0), []
    features = model.trunk(model.inputs)
    losses = dict(zip(TASKS, features.square().mean(0), strict=False))
    features.register_hook(lambda grad: pushes.append(grad.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        balancer(losses, shared_params=[model.trunk.weight]).backward()
    products = [push.T @ model.inputs.double() for push in pushes]
    assert list(balancer.report()["grad_norm"].values()) == pytest.approx(
        [product.norm().item() for product in products], rel=1e-5
    )
    weighted = sum(w * g for w, g in zip(balancer.get_weights().values(), products, strict=True))
    torch.testing.assert_close(model.trunk.weight.grad.double(), weighted, rtol=1e-5, atol=1e-7)


def test_what_is_kept_elsewhere_stays_there(always):
    with torch.autograd.graph.save_on_cpu():
        assert made(Model(mlp)) == 0
    assert made(Model(mlp, dtype=torch.float64)) == 0


def products_of(width: int, rows: int, factors: bool = True) -> Counter[tuple[int, ...]]:
    layers = (nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    model = Model(lambda: nn.Sequential(*layers), width, rows=rows, inputs=8)
    balancer = GABALoss(TASKS)
    balancer.reads_products = factors
    losses = model.losses()
    with Products() as counted:
        balancer(losses, shared_params=model.trunk).backward()
    return counted.shapes


def test_products_are_spared_where_the_rule_says_so():
    """A wide layer and few rows: one product is made, not three; a thin layer, or many rows: as ever."""
    weight = (384, 384)
    assert products_of(384, 16)[weight] == 1
    assert products_of(384, 16, factors=False)[weight] == 3
    assert products_of(384, 4)[weight] == 3  # too little to gain
    assert products_of(384, 256)[weight] == 3  # the factors are as large as the product
    assert products_of(64, 16)[64, 64] == 3
