"""Methods on the Gramian: published values, closed forms, optimality conditions, and an independent library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtlbalance import (
    AlignedMTLLoss,
    CAGradLoss,
    CRMOGMLoss,
    DualProjLoss,
    FairGradLoss,
    GradVacLoss,
    IMTLGLoss,
    KrumLoss,
    MGDALoss,
    MoDoLoss,
    NashMTLLoss,
    PCDLoss,
    PCGradLoss,
    SDMGradLoss,
    UPGradLoss,
)
from mtlbalance.balancers.cagrad import _by_bisection, _worst_case
from mtlbalance.balancers.simplex import barrier_newton, nonnegative_qp, nonnegative_qps, simplex_qp
from mtlbalance.errors import BalancerError

JACOBIAN = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
GRAMIAN_METHODS = [
    MGDALoss,
    PCGradLoss,
    CAGradLoss,
    IMTLGLoss,
    NashMTLLoss,
    FairGradLoss,
    AlignedMTLLoss,
    UPGradLoss,
    DualProjLoss,
    GradVacLoss,
    KrumLoss,
    PCDLoss,
    CRMOGMLoss,
]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"t{k}" for k in range(count))


def solve(cls, jacobian: np.ndarray, **options) -> np.ndarray:
    """The weights in float64, without the call around them."""
    balancer = cls(names(len(jacobian)), **options)
    return balancer.solve(jacobian @ jacobian.T, np.ones(len(jacobian)))


def call(balancer, jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The applied weights and the delivered gradient of losses with exactly these gradients."""
    theta = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    losses = [torch.from_numpy(row) @ theta for row in jacobian]
    balancer(*losses, shared_params=[theta]).backward()
    return np.array(list(balancer.get_weights().values())), theta.grad.numpy()


GOLDEN = [
    (PCGradLoss, {}, [2.2222, 1.5789], [0.5848, 3.8012, 3.8012]),
    (MGDALoss, {}, [0.6, 0.4], [0.0, 1.0, 1.0]),
    (IMTLGLoss, {}, [0.5923, 0.4077], [0.0767, 1.0, 1.0]),
    (NashMTLLoss, {}, [0.5915, 0.4071], [0.0766, 0.9985, 0.9985]),
    (FairGradLoss, {"alpha": 1.0}, [0.5915, 0.4071], [0.0766, 0.9985, 0.9985]),
    (CAGradLoss, {"c": 0.5}, [0.7041, 0.5], [0.1835, 1.2041, 1.2041]),
    (AlignedMTLLoss, {}, [0.5591, 0.4083], [0.2133, 0.9673, 0.9673]),
    (UPGradLoss, {}, [1.1111, 0.7895], [0.2924, 1.9006, 1.9006]),  # .2929, 1.9004 with a regularised Gramian
    (DualProjLoss, {}, [0.6111, 0.5], [0.5556, 1.1111, 1.1111]),
    (GradVacLoss, {}, [2.2222, 1.5789], [0.5848, 3.8012, 3.8012]),  # PCGrad at first: its targets start at 0
    (KrumLoss, {}, [0.5, 0.5], [1.0, 1.0, 1.0]),  # two tasks cannot judge each other
    (PCDLoss, {"tau": 0.0}, [1.8493, 1.0707], [-0.9733, 2.9200, 2.9200]),  # √18/‖g_1 + 22/38·g_2‖ times that
    (CRMOGMLoss, {}, [0.6, 0.4], [0.0, 1.0, 1.0]),  # MGDA at first
]


@pytest.mark.parametrize(("cls", "options", "weights", "combination"), GOLDEN)
def test_golden_table(cls, options, weights, combination):
    applied, gradient = call(cls(("a", "b"), **options), JACOBIAN)
    np.testing.assert_allclose(applied, weights, atol=1e-4)
    np.testing.assert_allclose(gradient, combination, atol=1e-4)


def closed_form(cls, gramian: np.ndarray) -> np.ndarray:
    (a, b), (_, c) = gramian
    if cls is PCGradLoss:
        return np.array([1 - min(b, 0) / a, 1 - min(b, 0) / c])
    if cls is UPGradLoss:
        return np.array([1 - min(b, 0) / a, 1 - min(b, 0) / c]) / 2
    if cls is MGDALoss:
        first = np.clip((c - b) / (a + c - 2 * b), 0, 1)
        return np.array([first, 1 - first])
    if cls is IMTLGLoss:
        shares = np.array([a**-0.5, c**-0.5])
        return shares / shares.sum()
    first = 1 / math.sqrt(a + b * math.sqrt(a / c))
    return np.array([first, first * math.sqrt(a / c)])


@settings(max_examples=80, deadline=None)
@given(
    cosine=st.sampled_from([-0.999, -0.9, -0.3, 0.0, 0.3, 0.9, 0.999]),
    exponents=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
)
@pytest.mark.parametrize("cls", [PCGradLoss, UPGradLoss, MGDALoss, IMTLGLoss, NashMTLLoss])
def test_closed_forms_for_two_tasks(cls, cosine, exponents):
    first, second = 10.0 ** exponents[0], 10.0 ** exponents[1]
    gramian = np.array([[first**2, cosine * first * second], [cosine * first * second, second**2]])
    found = cls(("a", "b")).solve(gramian, np.ones(2))
    np.testing.assert_allclose(found, closed_form(cls, gramian), rtol=1e-6, atol=1e-15)


def random_jacobian(seed: int, count: int, width: int, spread: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) * 10 ** generator.uniform(-spread, spread, size=(count, 1))


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_agreement_with_torchjd(count, seed):
    """Another library, written by other people; its Gramian regularisation is turned down to what it can take."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    jacobian = random_jacobian(seed, count, count + 3)
    tensor = torch.from_numpy(jacobian)
    pairs = [
        (IMTLGLoss, aggregation.IMTLG(), 1e-5),
        (AlignedMTLLoss, aggregation.AlignedMTL(), 1e-5),
    ]
    for cls, other, tolerance in pairs:
        ours, theirs = solve(cls, jacobian) @ jacobian, other(tensor).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())
    shortest = solve(MGDALoss, jacobian) @ jacobian
    theirs = aggregation.MGDA(max_iters=20_000, epsilon=1e-9)(tensor).numpy()
    assert shortest @ shortest <= theirs @ theirs * (1 + 1e-9)
    assert shortest @ shortest >= theirs @ theirs * (1 - 1e-2)  # theirs creeps towards it


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_projections_agree_with_torchjd(count, seed):
    aggregation = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("quadprog")
    linalg = pytest.importorskip("torchjd.linalg")
    jacobian = random_jacobian(seed, count, count + 3, spread=0.3)
    projector = linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-9)
    for cls, other in ((UPGradLoss, aggregation.UPGrad), (DualProjLoss, aggregation.DualProj)):
        theirs = other(projector=projector)(torch.from_numpy(jacobian)).numpy()
        ours = solve(cls, jacobian) @ jacobian
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 8), extra=st.integers(-3, 4))
def test_what_each_method_promises(seed, count, extra):
    width = max(1, count + extra)
    jacobian = random_jacobian(seed, count, width)
    gramian = jacobian @ jacobian.T
    norms = np.sqrt(gramian.diagonal())
    for cls in (MGDALoss, UPGradLoss, DualProjLoss):  # no task is harmed, to first order
        combination = solve(cls, jacobian) @ jacobian
        assert (jacobian @ combination >= -1e-7 * norms * norms.max()).all(), cls
    shortest = solve(MGDALoss, jacobian)
    assert shortest.min() >= 0
    assert shortest.sum() == pytest.approx(1.0)
    assert np.isfinite(solve(IMTLGLoss, jacobian)).all()
    assert np.isfinite(solve(AlignedMTLLoss, jacobian)).all()
    if width >= count + 1:
        combination = solve(IMTLGLoss, jacobian) @ jacobian
        projections = jacobian @ combination / norms
        np.testing.assert_allclose(projections, projections[0], rtol=1e-5, atol=1e-8 * norms.max())
        nash = solve(NashMTLLoss, jacobian)
        np.testing.assert_allclose((gramian @ nash) * nash, 1.0, rtol=1e-4)
        fair = solve(FairGradLoss, jacobian, alpha=2.0)
        np.testing.assert_allclose((gramian @ fair) * np.sqrt(fair), 1.0, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 6), c=st.sampled_from([0.1, 0.4, 0.5, 0.9, 2.0]))
def test_cagrad_minimises_its_objective(seed, count, c):
    jacobian = random_jacobian(seed, count, count + 2)
    mean = jacobian.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    extra = solve(CAGradLoss, jacobian, c=c) - 1.0 / count
    assert extra.min() >= -1e-9
    weights = extra / extra.sum()

    def objective(points: np.ndarray) -> np.ndarray:
        combinations = points @ jacobian
        return combinations @ mean + radius * np.linalg.norm(combinations, axis=-1)

    found = objective(weights)
    generator = np.random.default_rng(seed)
    others = np.concatenate([np.eye(count), generator.dirichlet(np.full(count, 0.5), size=2000)])
    near = weights + 1e-3 * generator.normal(size=(2000, count))
    near = np.clip(near, 0, None)
    near /= near.sum(axis=1, keepdims=True)
    scale = np.abs(objective(np.eye(count))).max()
    assert found <= objective(others).min() + 1e-9 * scale
    assert found <= objective(near).min() + 1e-9 * scale
    update = (extra + 1.0 / count) @ jacobian
    assert np.linalg.norm(update - mean) == pytest.approx(radius, rel=1e-6)


def test_cagrad_options():
    plain = solve(CAGradLoss, JACOBIAN, c=0.5)
    np.testing.assert_allclose(solve(CAGradLoss, JACOBIAN, c=0.5, rescale="squared"), plain / 1.25)
    np.testing.assert_allclose(solve(CAGradLoss, JACOBIAN, c=0.5, rescale="linear"), plain / 1.5)
    np.testing.assert_allclose(solve(CAGradLoss, JACOBIAN, c=0.0), [0.5, 0.5])
    with pytest.raises(BalancerError, match="rescale must be one of"):
        CAGradLoss(("a", "b"), rescale="sqared")


UNRANKED = [cls for cls in GRAMIAN_METHODS if cls is not PCDLoss]  # its first task is the first


@pytest.mark.parametrize("cls", UNRANKED)
def test_permuting_tasks_permutes_weights(cls):
    drawn = cls in (PCGradLoss, GradVacLoss)  # for more than two tasks the order of projections is
    jacobian = random_jacobian(1, 2 if drawn else 4, 6)
    order = np.random.default_rng(0).permutation(len(jacobian))
    np.testing.assert_allclose(solve(cls, jacobian[order]), solve(cls, jacobian)[order], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cls", GRAMIAN_METHODS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_common_scale(cls, scale):
    """Weights do not see it, but for Nash-MTL and FairGrad (alpha = 1), whose update has a length of its own."""
    jacobian = random_jacobian(2, 3, 6)
    power = -1.0 if cls in (NashMTLLoss, FairGradLoss) else 0.0
    np.testing.assert_allclose(solve(cls, scale * jacobian), scale**power * solve(cls, jacobian), rtol=1e-6)


@pytest.mark.parametrize("cls", GRAMIAN_METHODS)
def test_one_zero_gradient_leaves_the_others_balanced(cls):
    jacobian = np.vstack([JACOBIAN, np.zeros(3)])
    applied, gradient = call(cls(names(3)), jacobian)
    pair, expected = call(cls(names(2)), JACOBIAN)
    np.testing.assert_allclose(applied[:2], pair, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)
    assert applied[2] == pytest.approx(pair.mean(), rel=1e-6)


@pytest.mark.parametrize("cls", GRAMIAN_METHODS)
@pytest.mark.parametrize("factor", [1.0, 1e-6, -1.0])
def test_identical_parallel_and_opposed_gradients(cls, factor):
    row = np.array([1.0, 2.0, -0.5])
    applied, gradient = call(cls(("a", "b")), np.vstack([row, factor * row]))
    assert np.isfinite(applied).all()
    if factor > 0:
        assert gradient @ row > 0
    elif cls is PCDLoss:  # the other task gains its share, whatever it costs
        np.testing.assert_allclose(gradient, -row, rtol=1e-5)
    elif cls is not NashMTLLoss and cls is not FairGradLoss:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("cls", [GradVacLoss, KrumLoss, PCDLoss, CRMOGMLoss, SDMGradLoss, MoDoLoss])
def test_what_is_remembered_stays_finite_whatever_comes(cls):
    """Duplicates, opposites and zeros, between 1e-12 and 1e12, and tasks that come and go."""
    generator = np.random.default_rng(0)
    balancer = cls(names(4))
    for _ in range(40):
        jacobian = random_jacobian(generator.integers(1 << 30), 4, 3, spread=12.0)
        jacobian[1] = jacobian[0] * generator.choice([1.0, -1.0, 0.0, 1e-6])
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        losses = torch.from_numpy(jacobian) @ theta
        present = generator.permutation(4)[: generator.integers(1, 5)]
        balancer({f"t{k}": losses[k] for k in present}, shared_params=[theta]).backward()
        weights = balancer.get_weights()
        assert np.isfinite(list(weights.values())).all()
        assert theta.grad.isfinite().all()
        assert all(weights[f"t{k}"] == 0.0 for k in range(4) if k not in present)
        pulling = all(jacobian[k].any() for k in present)  # another has the mean weight, on top
        if balancer.weight_sum == "1" and pulling:
            assert sum(weights.values()) == pytest.approx(1.0, abs=1e-5)
    assert balancer.num_nonfinite == 0


@pytest.mark.parametrize("cls", GRAMIAN_METHODS)
def test_a_common_rescaling_of_heads_is_an_option(cls):
    trunk, heads = torch.nn.Linear(3, 2), torch.nn.ModuleList([torch.nn.Linear(2, 1) for _ in range(2)])
    inputs = torch.ones(4, 3)
    for scaled in (False, True):
        for delivery in ("direct", "weighted_sum"):
            balancer = cls(("a", "b"), scale_heads=scaled, delivery=delivery)
            losses = [(10.0**k * head(trunk(inputs))).square().mean() for k, head in enumerate(heads)]
            plain = [
                torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
                for loss, head in zip(losses, heads, strict=True)
            ]
            for head in heads:
                head.zero_grad()
            balancer(*losses, shared_params=trunk).backward()
            for head, alone, weight in zip(heads, plain, balancer.get_weights().values(), strict=True):
                expected = weight * alone if scaled else alone
                torch.testing.assert_close(head.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_pcgrad_draws_its_orders_from_its_own_generator():
    jacobian = random_jacobian(5, 4, 3)
    torch.manual_seed(1)
    first = [solve_repeatedly(PCGradLoss(names(4), seed=3), jacobian) for _ in range(2)]
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], solve_repeatedly(PCGradLoss(names(4), seed=4), jacobian))
    before = torch.get_rng_state()
    solve_repeatedly(PCGradLoss(names(4)), jacobian)
    assert torch.equal(before, torch.get_rng_state())


def solve_repeatedly(balancer, jacobian: np.ndarray) -> np.ndarray:
    return np.array([balancer.solve(jacobian @ jacobian.T, np.ones(len(jacobian))) for _ in range(5)])


def test_pcgrad_equals_the_projections_written_out():
    jacobian = random_jacobian(8, 4, 3)
    balancer = PCGradLoss(names(4), seed=11)
    generator = torch.Generator().manual_seed(11)
    total = np.zeros(3)
    for k in range(4):
        gradient = jacobian[k].copy()
        for j in torch.randperm(4, generator=generator).tolist():
            if j != k and gradient @ jacobian[j] < 0:
                gradient -= gradient @ jacobian[j] / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total += gradient
    found = balancer.solve(jacobian @ jacobian.T, np.ones(4)) @ jacobian
    np.testing.assert_allclose(found, total, rtol=1e-10)


def test_mgda_normalisation_is_in_the_problem_only():
    gramian = JACOBIAN @ JACOBIAN.T
    losses = np.array([3.0, 0.5])
    norms = np.sqrt(gramian.diagonal())
    for normalise, scale in (("l2", norms), ("loss", losses), ("loss+", losses * norms)):
        rows = JACOBIAN / scale[:, None]
        expected = closed_form(MGDALoss, rows @ rows.T)
        found = MGDALoss(("a", "b"), normalise=normalise).solve(gramian, losses)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_weights_are_kept_between_measurements():
    balancer = NashMTLLoss(("a", "b"), update_every=3)
    seen = [call(balancer, factor * JACOBIAN)[0] for factor in (1.0, 2.0, 4.0, 8.0)]
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])
    np.testing.assert_allclose(seen[3], seen[0] / 8, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 100_000), count=st.integers(1, 6), rank=st.integers(1, 8))
def test_the_solvers_meet_their_optimality_conditions(seed, count, rank):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, rank)) * 10 ** generator.uniform(-3, 3, size=(count, 1))
    quadratic = rows @ rows.T
    root = np.sqrt(quadratic.diagonal())
    assume(root.min() > 1e-9)
    linear = rows @ generator.normal(size=rank)
    solution = nonnegative_qp(quadratic, linear)
    slack = (quadratic @ solution - linear) / root
    size = np.abs(linear / root).max()
    assert solution.min() >= 0
    assert slack.min() >= -1e-6 * size
    assert np.abs(slack * solution * root).max() <= 1e-6 * size * max(1.0, (solution * root).max())
    weights = simplex_qp(quadratic, linear)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0)
    gradient = quadratic @ weights + linear
    # No vertex and no small move towards one is better, within the accuracy of the largest term.
    assert (
        weights @ gradient - gradient.min() <= 1e-6 * np.abs(gradient).max() + 1e-9 * np.abs(quadratic).max()
    )


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 100_000), count=st.integers(1, 9), rank=st.integers(1, 10), twins=st.booleans())
def test_projections_solved_together_are_those_solved_one_by_one(seed, count, rank, twins):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, rank)) * 10 ** generator.uniform(-3, 3, size=(count, 1))
    if twins and count > 2:  # singular: one gradient twice, and its opposite
        rows[1], rows[2] = rows[0], -2.0 * rows[0]
    gramian = rows @ rows.T
    root = np.sqrt(gramian.diagonal())
    assume(root.min() > 1e-9)
    unit = gramian / np.outer(root, root)
    together = nonnegative_qps(unit, -unit)
    assert together.min() >= 0
    for task, corrections in enumerate(root[:, None] * together / root):
        projected = rows[task] + corrections @ rows
        size = np.linalg.norm(rows[task])
        assert (rows @ projected / root).min() >= -1e-6 * size  # in the dual cone
        alone = rows[task] + nonnegative_qp(gramian, -gramian[task]) @ rows
        np.testing.assert_allclose(projected, alone, atol=1e-6 * size)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    count=st.integers(2, 9),
    rank=st.integers(1, 10),
    spread=st.floats(0.0, 3.0),
    c=st.floats(0.01, 3.0),
)
def test_cagrad_has_the_worst_case_of_its_objective(seed, count, rank, spread, c):
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, rank)) * 10 ** generator.uniform(-spread, spread, size=(count, 1))
    gramian = rows @ rows.T
    assume(gramian.diagonal().min() > 1e-12)
    to_mean = gramian.mean(axis=1)
    radius = c * np.linalg.norm(rows.mean(axis=0))

    def objective(weights: np.ndarray) -> float:
        return float(to_mean @ weights + radius * np.linalg.norm(weights @ rows))

    found = _worst_case(gramian, to_mean, radius)
    size = np.abs(to_mean).max() + radius * np.sqrt(gramian.diagonal().max())
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1.0)
    assert objective(found) <= objective(_by_bisection(gramian, to_mean, radius)) + 1e-9 * size
    for candidate in (*np.eye(count), *generator.dirichlet(np.ones(count), size=20)):
        assert objective(found) <= objective(candidate) + 1e-9 * size
        assert objective(found) <= objective(0.999 * found + 0.001 * candidate) + 1e-9 * size


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    count=st.integers(1, 8),
    power_and_spread=st.sampled_from([(0.1, 0.0), (0.5, 4.0), (1.0, 10.0), (2.0, 3.0), (10.0, 0.0)]),
)
def test_newton_solves_nash_and_fairness_equations(seed, count, power_and_spread):
    power, spread = power_and_spread
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, count + 5))
    rows *= 10 ** generator.uniform(-spread, spread, size=(count, 1))  # norms that differ by up to 20 orders
    gramian = rows @ rows.T
    weights = barrier_newton(gramian, power)
    assert weights.min() > 0
    np.testing.assert_allclose(gramian @ weights, weights**-power, rtol=1e-7)
