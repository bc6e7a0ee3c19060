"""SDMGrad and MoDo: steps from pairs of batches, unbiased where those of one batch are not."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlbalance import MoDoLoss, SDMGradLoss
from mtlbalance.balancers.simplex import project_on_simplex
from mtlbalance.errors import BalancerError, NonFiniteWarning, SharedParametersError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # they count passes

TASKS = ("a", "b", "c")
METHODS = [SDMGradLoss, MoDoLoss]
WIDTH = 6


def batches(seed: int, count: int) -> np.ndarray:
    """Task gradients of so many batches around one mean."""
    generator = np.random.default_rng(seed)
    mean = np.array([[3.0], [1.0], [0.5]]) * generator.normal(size=(3, WIDTH))
    return mean + 0.5 * generator.normal(size=(count, 3, WIDTH))


class Loop:
    """Losses whose gradients are given rows, and the two calls on them."""

    def __init__(self, balancer) -> None:
        self.balancer = balancer
        self.theta = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)

    def losses(self, rows: np.ndarray, present: str = "abc") -> dict[str, torch.Tensor]:
        found = torch.from_numpy(rows) @ self.theta
        return {task: found[TASKS.index(task)] for task in present}

    def observe(self, rows: np.ndarray, present: str = "abc") -> None:
        self.balancer.observe(self.losses(rows, present), shared_params=[self.theta])

    def call(self, rows: np.ndarray, present: str = "abc") -> np.ndarray:
        self.theta.grad = None
        self.balancer(self.losses(rows, present), shared_params=[self.theta]).backward()
        return np.array(list(self.balancer.get_weights().values()))

    @property
    def weights(self) -> np.ndarray:
        return self.balancer.solved_weights.double().numpy()


def projected(point: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex by bisection on what is taken from every entry."""
    low, high = point.min() - 1.0, point.max()
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1.0 else (low, middle)
    return np.maximum(point - high, 0.0)


class Reference:
    """Both rules in float64 on vectors, and the size that SDMGrad measures in."""

    def __init__(self, cls, preference=(1 / 3, 1 / 3, 1 / 3)) -> None:
        self.cls = cls
        self.weights = np.full(3, 1 / 3)
        self.preference = np.array(preference)
        self.square = None

    def step(self, first: np.ndarray, second: np.ndarray) -> None:
        if self.cls is MoDoLoss:
            slope = first @ (second.T @ self.weights) + 0.1 * self.weights
        else:
            sizes = [np.linalg.norm(rows, axis=1).mean() for rows in (first, second)]
            self.square = self.square or sizes[0] * sizes[1]
            slope = first @ (second.T @ (self.weights + 0.3 * self.preference)) / self.square
            self.square = 0.9 * self.square + 0.1 * sizes[0] * sizes[1]
        self.weights = projected(self.weights - 0.1 * slope)

    def applied(self) -> np.ndarray:
        if self.cls is MoDoLoss:
            return self.weights
        return (self.weights + 0.3 * self.preference) / 1.3


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("observed", [0, 1, 2, 3, 4])
def test_steps_follow_the_rule(cls, observed):
    """Pairs of observed batches, an odd one with the call's own, and none: the call's own twice."""
    loop, reference = Loop(cls(TASKS)), Reference(cls)
    for step in range(6):
        seen = 0.3 * batches(step, observed + 1)
        for rows in seen[:-1]:
            loop.observe(rows)
        found = loop.call(seen[-1])
        factors = list(seen[:-1]) if observed % 2 == 0 and observed else list(seen)
        if observed == 0:
            factors = [seen[0], seen[0]]
        for first, second in zip(factors[::2], factors[1::2], strict=True):
            reference.step(first, second)
        np.testing.assert_allclose(loop.weights, reference.weights, atol=2e-6)
        np.testing.assert_allclose(found, reference.applied(), atol=2e-6)
        np.testing.assert_allclose(loop.theta.grad, reference.applied() @ seen[-1], atol=1e-5)
    assert np.abs(reference.weights - 1 / 3).max() > 0.02  # it moved
    assert loop.balancer.get_name() == (cls.method if observed else f"{cls.method}(one batch)")


def test_a_preference_pulls():
    loop = Loop(SDMGradLoss(TASKS, preference={"a": 2.0, "b": 1.0, "c": 1.0}))
    reference = Reference(SDMGradLoss, (0.5, 0.25, 0.25))
    for step in range(4):
        first, second, own = 0.3 * batches(step, 3)
        loop.observe(first)
        loop.observe(second)
        reference.step(first, second)
        np.testing.assert_allclose(loop.call(own), reference.applied(), atol=2e-6)


@pytest.mark.parametrize("count", range(2, 11))
def test_agreement_with_torchjd(count):
    """One inner iteration without momentum, on products that its own normalisation leaves alone."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    sdmgrad = aggregation.SDMGradWeighting(lr=0.2, momentum=0.0, n_iter=1, lambda_=0.3)
    modo = aggregation.MoDoWeighting(gamma=0.2, rho=0.1)
    ours = (
        SDMGradLoss([f"t{k}" for k in range(count)], weight_lr=0.2, normalise=False),
        MoDoLoss([f"t{k}" for k in range(count)], gamma=0.2),
    )
    generator = np.random.default_rng(count)
    for _ in range(5):
        first = generator.normal(size=(count, 20))
        second = first + 0.2 * generator.normal(size=(count, 20))
        products = first @ second.T
        size = np.sqrt(np.maximum(products.diagonal(), 0)).mean()
        first, second = first / size, second / size
        for balancer, theirs in zip(ours, (sdmgrad, modo), strict=True):
            theta = torch.zeros(20, dtype=torch.float64, requires_grad=True)
            for rows in (first, second):
                balancer.observe(*(torch.from_numpy(rows) @ theta), shared_params=[theta])
            balancer(*(torch.from_numpy(first) @ theta), shared_params=[theta])
            expected = theirs(torch.from_numpy(first @ second.T)).numpy()
            np.testing.assert_allclose(list(balancer.get_weights().values()), expected, atol=1e-6)


def test_two_batches_are_unbiased_and_one_is_not():
    """A quadratic with noise: the mean step over draws, against that with the exact Gramian."""
    generator = np.random.default_rng(0)
    mean = np.zeros((3, WIDTH))
    mean[:, :3] = [[1.0, 0.2, 0.0], [-0.2, 1.0, 0.1], [0.3, 0.0, 0.8]]
    noise = np.array([1.5, 0.1, 0.1])[:, None]  # of task "a" above all
    draws = {"two": [], "one": []}
    for _ in range(200):
        for sampling, steps in draws.items():
            loop = Loop(MoDoLoss(TASKS, gamma=0.01, rho=0.0))  # no step so long that it ends on an edge
            rows = mean + noise * generator.normal(size=(3, 3, WIDTH))
            if sampling == "two":
                loop.observe(rows[0])
                loop.observe(rows[1])
            else:
                loop.call(rows[0])
            steps.append(loop.weights - 1 / 3)
    slope = mean @ mean.T @ np.full(3, 1 / 3)
    exact = -0.01 * (slope - slope.mean())
    for sampling, steps in draws.items():
        average = np.mean(steps, axis=0)
        error = np.std(steps, axis=0) / math.sqrt(len(steps))
        away = np.abs(average - exact) / error
        assert away.max() < 3.5 if sampling == "two" else away.max() > 15.0
    bias = np.mean(draws["one"], axis=0) - exact
    expected = -0.01 * (WIDTH * noise[:, 0] ** 2 / 3)  # the noise squared, on the diagonal
    np.testing.assert_allclose(bias, expected - expected.mean(), rtol=0.2, atol=1e-4)
    assert bias[0] < 0  # the noisy task loses weight for its noise


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("pending", [True, False])
def test_a_save_between_observe_and_call_loses_nothing(cls, pending):
    whole = Loop(cls(TASKS))
    first, second, third, own = batches(0, 4)
    whole.call(own)
    whole.observe(first)
    if not pending:
        whole.observe(second)
    buffer = io.BytesIO()
    torch.save(whole.balancer.state_dict(), buffer)
    buffer.seek(0)
    parted = Loop(cls(TASKS))
    parted.observe(third)  # to be forgotten
    parted.balancer.load_state_dict(torch.load(buffer, weights_only=True))
    copied = Loop(copy.deepcopy(whole.balancer))
    for loop in (whole, parted, copied):
        loop.call(third)
        loop.observe(own)
        loop.observe(second)
        loop.call(first)
    for loop in (parted, copied):
        for key, saved in whole.balancer.state_dict().items():
            found = loop.balancer.state_dict()[key]
            torch.testing.assert_close(found, saved, rtol=0.0, atol=0.0, equal_nan=True, msg=key)
    assert whole.balancer.pending_gradients.shape == (3, 0)


@pytest.mark.parametrize("cls", METHODS)
def test_an_observed_batch_that_is_not_finite_is_forgotten(cls):
    loop, other = Loop(cls(TASKS)), Loop(cls(TASKS))
    first, second, own = batches(0, 3)
    loop.observe(first)
    with pytest.warns(NonFiniteWarning):
        loop.observe(first * [[math.nan], [1.0], [1.0]])
    assert loop.balancer.num_nonfinite == 1
    loop.observe(second)
    other.observe(first)
    other.observe(second)
    np.testing.assert_array_equal(loop.call(own), other.call(own))


@pytest.mark.parametrize("cls", METHODS)
def test_a_call_that_is_not_finite_keeps_what_waits(cls):
    """A GradScaler skips its step, so the parameters are those that were observed."""
    loop, other = Loop(cls(TASKS)), Loop(cls(TASKS))
    first, second, own = batches(0, 3)
    loop.observe(first)
    with pytest.warns(NonFiniteWarning):
        loop.call(own * math.inf)
    other.observe(first)
    np.testing.assert_array_equal(loop.call(second), other.call(second))


@pytest.mark.parametrize("cls", METHODS)
def test_a_step_is_of_the_tasks_that_both_batches_have(cls):
    first, second, own = 0.3 * batches(0, 3)
    loop = Loop(cls(TASKS, scale_heads=True))
    loop.observe(first, "abc")
    loop.observe(second, "bc")
    assert loop.weights[0] == pytest.approx(1 / 3)
    assert loop.weights[1:].sum() == pytest.approx(2 / 3)
    assert abs(loop.weights[1] - 1 / 3) > 1e-3
    before = loop.weights.copy()
    loop.observe(first, "ab")
    loop.observe(second, "bc")  # one task in common: nothing to balance
    np.testing.assert_array_equal(loop.weights, before)
    applied = loop.call(own, "ac")
    assert applied[1] == 0.0
    assert applied.sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(loop.weights, before)


@pytest.mark.parametrize("cls", METHODS)
def test_a_call_after_a_pair_costs_one_trunk_pass(cls, problem):
    p = problem(TASKS)
    balancer = cls(TASKS, scale_heads=True)
    counted = []
    p.trunk.register_full_backward_hook(lambda *_: counted.append(1))
    for passes in (3, 6):
        balancer.observe(p.losses(), shared_params=p.trunk)
        assert len(counted) == passes
    p.call(balancer).backward()
    assert len(counted) == 7
    p.call(balancer).backward()
    assert len(counted) == 10  # its own batch twice, delivered as measured
    assert all(parameter.grad is not None for parameter in p.parameters())


@pytest.mark.parametrize("cls", METHODS)
def test_observing_touches_nothing_else(cls, problem):
    p = problem(TASKS)
    balancer = cls(TASKS)
    kept = p.losses()
    balancer.observe(kept, model=torch.nn.ModuleList([p.trunk, p.heads]), some_future_keyword=1)
    assert all(parameter.grad is None for parameter in p.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        kept["a"].mean().backward()
    before = copy.deepcopy(balancer.state_dict())
    with torch.no_grad():
        balancer.observe(p.losses(), shared_params=p.trunk)
    balancer.eval()
    balancer.observe(p.losses(), shared_params=p.trunk)
    for key, saved in balancer.state_dict().items():
        assert torch.equal(saved.nan_to_num(), before[key].nan_to_num()), key


def test_losses_are_given_as_in_the_call(problem):
    p = problem(TASKS)
    weights = {"b": torch.rand(len(p.inputs))}
    one, other = SDMGradLoss(TASKS), SDMGradLoss(TASKS)
    for _ in range(2):
        one.observe(p.losses(), shared_params=p.trunk.parameters(), sample_weights=weights)
        losses = p.losses()
        losses["b"] = losses["b"] * weights["b"]
        other.observe(*(loss.mean() for loss in losses.values()), shared_params=p.trunk)
    torch.testing.assert_close(one.solved_weights, other.solved_weights)
    assert one.report()["grad_norm"] == pytest.approx(other.report()["grad_norm"])
    with pytest.raises(BalancerError, match="did you mean 'a'"):
        one.observe({"aa": losses["a"]}, shared_params=p.trunk)
    with pytest.raises(SharedParametersError, match=r"SDMGrad\.observe.*needs shared_params"):
        one.observe(p.losses())


@pytest.mark.parametrize("cls", METHODS)
def test_representations_cannot_be_paired(cls, problem):
    p = problem(TASKS)
    balancer = cls(TASKS)

    def on_features(call):
        features = p.trunk(p.inputs)
        return call(p.per_sample(features), shared_params=features)

    with pytest.raises(SharedParametersError, match="parameters in every call, not representations"):
        on_features(balancer.observe)
    on_features(balancer).backward()  # one batch can be
    balancer.observe(p.losses(), shared_params=p.trunk)
    with pytest.raises(SharedParametersError, match="parameters in every call, not representations"):
        on_features(balancer)
    balancer.observe(p.losses(), shared_params=p.trunk)
    on_features(balancer).backward()  # nothing waits, nothing is measured
    balancer.observe(p.losses(), shared_params=p.trunk)
    with pytest.raises(
        SharedParametersError, match=r"observed gradients of 102 shared numbers.*now holds 48"
    ):
        balancer.observe(p.losses(), shared_params=p.trunk[0])


@pytest.mark.parametrize("cls", METHODS)
def test_the_probe_scale_leaves_no_trace(cls, problem):
    p = problem(TASKS)
    scaled, plain = cls(TASKS), cls(TASKS)
    for balancer, half in ((scaled, True), (plain, False)):
        balancer._in_half = half
        for _ in range(3):  # one is left for the call
            balancer.observe(p.losses(), shared_params=p.trunk)
        p.call(balancer)
    assert scaled.get_weights() == pytest.approx(plain.get_weights(), rel=1e-6)


def test_a_pair_far_larger_than_usual_ends_on_the_simplex():
    loop = Loop(SDMGradLoss(TASKS))
    for scale in (1e-12, 1e12, 1.0, 0.0, 1e-12):
        for rows in scale * batches(3, 2):
            loop.observe(rows)
        weights = loop.call(scale * batches(4, 1)[0])
        assert np.isfinite(weights).all()
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1.0)


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8),
    shift=st.sampled_from([0.0, 1e6]),
    scale=st.sampled_from([1e-6, 1.0, 1e18]),
)
def test_the_projection_is_the_nearest_point(values, shift, scale):
    point = scale * np.array(values) + shift
    found = project_on_simplex(point)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1.0)
    # The distance to it falls in no direction of the simplex.
    slope = found - (point - point.max())
    assert found @ slope - slope.min() <= 1e-9 * max(1.0, float(np.abs(slope).max()))
    if scale == 1.0:
        np.testing.assert_allclose(found, projected(point), atol=1e-8)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SDMGradLoss, {"weight_lr": 0.0}),
        (SDMGradLoss, {"regularisation": -1.0}),
        (SDMGradLoss, {"preference": {"a": 0.0, "b": 1.0, "c": 1.0}}),
        (MoDoLoss, {"gamma": 0.0}),
        (MoDoLoss, {"rho": -0.1}),
    ],
)
def test_arguments_are_checked(cls, options):
    with pytest.raises(BalancerError, match=next(iter(options))):
        cls(TASKS, **options)
