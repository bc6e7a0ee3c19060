"""Methods that combine the task gradients: formulas written out in float64, another library, and their promises."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtlbalance import (
    ConFIGLoss,
    DBMTLLoss,
    ExcessMTLLoss,
    FixedWeightLoss,
    GABALoss,
    GradDropLoss,
    MoCoLoss,
    TrimmedMeanLoss,
)
from mtlbalance.balancers.layout import Layout
from mtlbalance.balancers.moco import project_to_simplex
from mtlbalance.balancers.signals import Signals
from mtlbalance.errors import BalancerError, NonFiniteWarning, SharedParametersError

JACOBIAN = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
COMBINING = [GradDropLoss, TrimmedMeanLoss, MoCoLoss, DBMTLLoss]  # deliver directly, or not at all
TRACKING = [MoCoLoss, DBMTLLoss]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"t{k}" for k in range(count))


def call(balancer, jacobian, losses=None, present=None, dtype=torch.float64) -> np.ndarray:
    """The delivered gradient for losses with exactly these values and gradients, in two tensors."""
    rows = torch.as_tensor(np.asarray(jacobian), dtype=dtype)
    width = rows.shape[1]
    first = torch.zeros(width // 2, dtype=dtype, requires_grad=True)
    second = torch.zeros(1, width - width // 2, dtype=dtype, requires_grad=True)
    theta = torch.cat([first, second.flatten()])
    values = np.ones(len(rows)) if losses is None else losses
    chosen = range(len(rows)) if present is None else present
    given = {balancer.tasks[k]: rows[k] @ theta + float(values[k]) for k in chosen}
    balancer(given, shared_params=[first, second]).backward()
    return torch.cat([first.grad, second.grad.flatten()]).double().numpy()


def random_jacobian(seed: int, count: int, width: int, spread: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) * 10 ** generator.uniform(-spread, spread, size=(count, 1))


def applied(balancer) -> np.ndarray:
    return np.array(list(balancer.get_weights().values()))


@pytest.mark.parametrize(
    ("cls", "options", "losses", "combination"),
    [
        (TrimmedMeanLoss, {}, None, [1.0, 1.0, 1.0]),
        (ConFIGLoss, {}, None, [0.1588, 2.0706, 2.0706]),
        # One step of λ from (½, ½): slopes Y·(1, 1, 1) = (−2, 8) leave (½, ½) + .05·(2, −8) → (.75, .25).
        (MoCoLoss, {"gamma": 0.05}, None, [-1.5, 1.0, 1.0]),
        # Log gradients (−2, ½, ½) and (6, 1, 1), the first made as long as the second, √38.
        (DBMTLLoss, {}, [2.0, 1.0], [0.1881, 2.4530, 2.4530]),
    ],
)
def test_golden_table(cls, options, losses, combination):
    found = call(cls(("a", "b"), **options), JACOBIAN, losses)
    np.testing.assert_allclose(found, combination, atol=1e-4)


# ---------------------------------------------------------------------- GradDrop
@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0, [0.0, 0.5, 1.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graddrop_follows_its_formula_and_torchjd(prescriptions, monkeypatch, leak, dtype):
    graddrop = pytest.importorskip("torchjd.aggregation").GradDrop
    balancer, written_out = GradDropLoss(names(3), leak=leak, seed=5), prescriptions.GradDrop(3, leak, seed=5)
    for step in range(4):
        jacobian = random_jacobian(step, 3, 50)
        jacobian[:, :3] = 0.0  # nobody pulls
        drawn = written_out.uniform(50, dtype)
        expected, _ = written_out.step(jacobian, np.ones(3), range(3), dtype)
        found = call(balancer, jacobian, dtype=dtype)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert (found[:3] == 0).all()
        aggregator = graddrop(leak=torch.full((3,), 1.0, dtype=torch.float64) * torch.tensor(leak))
        with monkeypatch.context() as patch:  # the same draw; theirs is NaN where nobody pulls
            patch.setattr(torch, "rand", lambda *_, drawn=drawn[3:], **__: torch.from_numpy(drawn))
            theirs = aggregator(torch.from_numpy(jacobian[:, 3:]))
        np.testing.assert_allclose(found[3:], theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_graddrop_keeps_a_sign_as_often_as_its_purity_says():
    balancer = GradDropLoss(("a", "b"))
    jacobian = np.stack([np.full(20_000, 3.0), np.full(20_000, -1.0)])
    found = call(balancer, jacobian)
    assert set(found) == {3.0, -1.0}
    assert (found > 0).mean() == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 20_000))
    assert not np.array_equal(found, call(balancer, jacobian))  # drawn anew in each call


def test_graddrop_leaves_what_all_agree_on():
    jacobian = np.abs(random_jacobian(3, 4, 9)) * np.sign(np.arange(9) - 4.0)
    np.testing.assert_allclose(call(GradDropLoss(names(4)), jacobian), jacobian.sum(axis=0))


def test_graddrop_draws_from_its_own_counter():
    jacobian = random_jacobian(0, 3, 40)
    before = torch.get_rng_state()
    runs = {seed: [call(GradDropLoss(names(3), seed=seed), jacobian) for _ in range(2)] for seed in (0, 1)}
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(*runs[0])
    assert not np.array_equal(runs[0][0], runs[1][0])
    balancer = GradDropLoss(names(3))
    assert "generator" not in balancer.state_dict()
    history = [call(balancer, jacobian) for _ in range(3)]
    resumed = GradDropLoss(names(3))
    call(balancer, jacobian)
    resumed.load_state_dict(balancer.state_dict() | {"calls": torch.tensor(2)})
    assert np.array_equal(call(resumed, jacobian), history[2])


@pytest.mark.parametrize("leak", [0.0, [0.2, 0.7]])
def test_graddrop_on_representations_masks_whole_features(prescriptions, leak):
    """Algorithm 1 of the paper: the purity of sgn(a)·∂L/∂a summed over the batch, one draw a feature."""
    generator = torch.Generator().manual_seed(1)
    trunk = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    heads = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    balancer, written_out = (
        GradDropLoss(("a", "b"), leak=leak, seed=3),
        prescriptions.GradDrop(2, leak, seed=3),
    )
    for _ in range(3):
        features = torch.tanh(inputs @ trunk)
        losses = [(features @ head).square().mean() for head in heads]
        rows = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses]
        trunk.grad = None
        features.retain_grad()
        balancer(*losses, shared_params=features).backward()
        gradients = np.stack([row.numpy() for row in rows])
        pulls = (np.sign(features.detach().numpy()) * gradients).sum(axis=1)
        drawn = written_out.uniform(6, torch.float64)
        written_out.calls += 1
        purity = 0.5 * (1 + pulls.sum(axis=0) / np.abs(pulls).sum(axis=0))
        mask = (purity > drawn) * (pulls > 0) + (purity < drawn) * (pulls < 0)
        leaks = np.full(2, 1.0) * leak
        factors = leaks[:, None] + (1 - leaks[:, None]) * mask
        expected = (factors[:, None, :] * gradients).sum(axis=0)
        np.testing.assert_allclose(features.grad.numpy(), expected, rtol=1e-10, atol=1e-14)
        features = torch.tanh(inputs @ trunk)
        (through,) = torch.autograd.grad(features, trunk, torch.from_numpy(expected))
        torch.testing.assert_close(trunk.grad, through)


def test_graddrop_checks_its_leak():
    GradDropLoss(("a", "b"), leak={"b": 1.0, "a": 0.0})
    for leak, message in [
        (1.5, r"leak must be in \[0, 1\]"),
        ({"a": 0.1}, "no value|no weight"),
        ([0.1], "1 values"),
    ]:
        with pytest.raises(BalancerError, match=message):
            GradDropLoss(("a", "b"), leak=leak)
    with pytest.raises(BalancerError, match=r"leak\['b'\] must be in \[0, 1\]"):
        GradDropLoss(("a", "b"), leak=[0.0, 2.0])


# ---------------------------------------------------------------------- trimmed mean
@pytest.mark.parametrize(("count", "trim"), [(1, 0), (3, 1), (4, 1), (5, 2), (10, 3), (11, 5)])
def test_trimmed_mean_is_torchjds(count, trim):
    trimmed_mean = pytest.importorskip("torchjd.aggregation").TrimmedMean
    jacobian = random_jacobian(count, count, 30)
    found = call(TrimmedMeanLoss(names(count), trim_fraction=trim / count), jacobian)
    theirs = trimmed_mean(trim)(torch.from_numpy(jacobian)).numpy()
    np.testing.assert_allclose(found, theirs, rtol=1e-12)


def test_trimmed_mean_counts_the_present_tasks():
    jacobian = random_jacobian(0, 8, 20)
    balancer = TrimmedMeanLoss(names(8))
    for present, trim in ((range(8), 2), (range(1, 6), 1), (range(3), 0)):
        kept = np.sort(jacobian[list(present)], axis=0)[trim : len(present) - trim]
        np.testing.assert_allclose(call(balancer, jacobian, present=present), kept.mean(axis=0))
    assert [TrimmedMeanLoss(names(100), trim_fraction=0.29).trim_fraction] == [0.29]
    with pytest.raises(BalancerError, match="trim_fraction"):
        TrimmedMeanLoss(names(3), trim_fraction=0.5)


def test_the_trimmed_mean_forgets_an_outlier_to_the_last_digit():
    jacobian = random_jacobian(1, 5, 20, spread=0.0)
    wild = jacobian.copy()
    wild[2] *= 1e15
    wild[4] = np.where(
        np.arange(20) % 2, jacobian.max() + 1, jacobian.min() - 1
    )  # the far end is in any case dropped
    balancer = TrimmedMeanLoss(names(5), trim_fraction=0.2)
    expected = np.sort(wild, axis=0)[1:4].mean(axis=0)
    np.testing.assert_allclose(call(balancer, wild, dtype=torch.float32), expected, rtol=1e-6)


# ---------------------------------------------------------------------- ConFIG
def cosines(jacobian: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return jacobian @ direction / np.linalg.norm(jacobian, axis=1) / np.linalg.norm(direction)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 8),
    extra=st.integers(0, 4),
    near=st.sampled_from([0, 1e-2, 1e-4]),
)
def test_config_makes_the_same_angle_with_every_gradient(seed, count, extra, near):
    jacobian = random_jacobian(seed, count, count + extra)
    if near and count > 1:  # nearly parallel
        jacobian[1] = jacobian[0] + near * jacobian[1] * np.linalg.norm(jacobian[0]) / np.linalg.norm(
            jacobian[1]
        )
    gramian = jacobian @ jacobian.T
    weights = ConFIGLoss(names(count)).solve(gramian, np.ones(count))
    found = cosines(jacobian, weights @ jacobian)
    np.testing.assert_allclose(found, found[0], rtol=1e-4, atol=2e-4)  # what the rank cut costs, next to it
    assert found.min() > -1e-6


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_config_is_torchjds(count, seed):
    config = pytest.importorskip("torchjd.aggregation").ConFIG()
    jacobian = random_jacobian(seed, count, count + 3)
    theirs = config(torch.from_numpy(jacobian)).numpy()
    np.testing.assert_allclose(
        call(ConFIGLoss(names(count)), jacobian), theirs, rtol=1e-5, atol=1e-7 * np.abs(theirs).max()
    )


def test_config_where_gradients_depend_on_one_another(prescriptions):
    rows = random_jacobian(2, 3, 6)
    same = np.vstack([rows, 5.0 * rows[0]])  # twice the same direction
    flat = random_jacobian(3, 4, 2)  # four in a plane: least squares
    for jacobian in (same, flat, np.vstack([rows, np.zeros(6)])):
        count = len(jacobian)
        expected, _ = prescriptions.ConFIG(count).step(jacobian, np.ones(count), range(count))
        found = call(ConFIGLoss(names(count)), jacobian)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    found = cosines(same, call(ConFIGLoss(names(4)), same))
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_config_stands_still_between_opposite_gradients(scale):
    row = scale * np.array([1.0, 2.0, -0.5])
    balancer = ConFIGLoss(("a", "b"))
    for factor in (-1.0, -0.1):
        np.testing.assert_allclose(call(balancer, np.vstack([row, factor * row])), 0.0, atol=1e-6 * scale)
    assert np.isfinite(list(balancer.report()["raw"].values())).all()


def test_config_shows_its_coefficients_and_reuses_them():
    balancer = ConFIGLoss(("a", "b"), update_every=2)
    first = call(balancer, JACOBIAN)
    raw = np.array(list(balancer.report()["raw"].values()))
    np.testing.assert_allclose(raw @ JACOBIAN, first, rtol=1e-6)
    np.testing.assert_allclose(call(balancer, 2 * JACOBIAN), 2 * first, rtol=1e-6)
    assert np.isnan(applied(balancer)).all()


# ---------------------------------------------------------------------- tracked gradients
MOCO = [
    {},
    {"gamma": 0.02, "beta": 0.3, "beta_decay": 0.0, "gamma_decay": 0.0},
    {"gamma": 0.05, "rho": 5.0},
    {"gamma": 0.5, "normalise": True},
]


def follow(balancer, written_out, steps: int) -> np.ndarray:
    """Some calls lack a task; each must deliver what is written out. Return the weights of the others."""
    generator = np.random.default_rng(0)
    history = []
    for step in range(steps):
        jacobian = generator.normal(size=(3, 7)) + np.array([[0.3], [0.0], [-0.2]])
        losses = generator.uniform(0.2, 3.0, size=3)
        present = [k for k in range(3) if step % 4 != 3 or k != step % 3]
        expected, _ = written_out.step(jacobian[present], losses[present], present)
        found = call(balancer, jacobian, losses, present)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(applied(balancer)[present], written_out.applied, rtol=1e-4, atol=1e-5)
        if len(present) == 3:
            history.append(written_out.applied)
    return np.array(history)


@pytest.mark.parametrize("options", MOCO)
def test_moco_follows_its_formulas(prescriptions, options):
    balancer = MoCoLoss(names(3), **options)
    weights = follow(balancer, prescriptions.MoCo(3, **options), 20)
    inside = weights.min(axis=1) > 0.02
    assert inside.any()
    assert (
        weights[inside].std(axis=0).min() > 0.005 or not options
    )  # it moves, not only from corner to corner


def test_moco_on_constant_gradients_comes_to_the_shortest_combination():
    balancer = MoCoLoss(("a", "b"), gamma=0.01, gamma_decay=0.0)
    for _ in range(60):
        found = call(balancer, JACOBIAN)
    np.testing.assert_allclose(applied(balancer), [0.6, 0.4], atol=1e-4)  # MGDA's
    np.testing.assert_allclose(found, [0.0, 1.0, 1.0], atol=1e-3)


def test_moco_is_steadier_than_single_batches():
    """What tracking is for: from gradients as noisy as they are long, the direction is still the mean's."""
    generator = np.random.default_rng(0)
    balancer = MoCoLoss(("a", "b"), gamma=0.001, beta=0.05, beta_decay=0.0)
    errors = []
    for step in range(400):
        found = call(balancer, JACOBIAN + 5 * generator.normal(size=JACOBIAN.shape))
        errors.append(np.linalg.norm(found - applied(balancer) @ JACOBIAN) if step >= 100 else 0.0)
    assert np.mean(errors[100:]) < 0.5 * 5 * math.sqrt(3) / math.sqrt(2)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 7), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_projection_is_the_nearest_point_of_the_simplex(prescriptions, seed, count, scale):
    generator = np.random.default_rng(seed)
    point = scale * generator.normal(size=count)
    present = generator.random(count) < 0.7
    present[generator.integers(count)] = True
    found = project_to_simplex(torch.from_numpy(point), torch.from_numpy(present)).numpy()
    expected = np.zeros(count)
    expected[present] = prescriptions.project(point[present])
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_projection_of_huge_values_in_float32():
    found = project_to_simplex(torch.tensor([-1e17, -1e15, -2e15]), torch.tensor([True, True, True]))
    assert found.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.8, "beta_decay": 0.5}])
def test_db_mtl_follows_its_formulas(prescriptions, options):
    follow(DBMTLLoss(names(3), **options), prescriptions.DBMTL(3, **options), 12)


def test_db_mtl_moves_the_trunk_equally_for_every_task_whatever_its_scale():
    generator = np.random.default_rng(4)
    plain, scaled = DBMTLLoss(names(3)), DBMTLLoss(names(3))
    factors = np.array([1e-4, 1.0, 1e5])
    for _ in range(5):
        jacobian, losses = generator.normal(size=(3, 6)), generator.uniform(0.5, 2.0, size=3)
        one = call(plain, jacobian, losses)
        other = call(scaled, factors[:, None] * jacobian, factors * losses)
        np.testing.assert_allclose(one, other, rtol=1e-5)
    lengths = plain.tracked.norm(dim=1)
    parts = plain.tracked * (lengths.max() / lengths)[:, None]
    np.testing.assert_allclose(parts.sum(dim=0).numpy(), one, rtol=1e-6)


def test_db_mtl_without_memory_is_its_weights():
    """With beta = 0 the weights reported are those whose weighted sum is delivered."""
    balancer, jacobian, losses = (
        DBMTLLoss(names(3), beta=0.0),
        random_jacobian(0, 3, 5),
        np.array([0.1, 2.0, 30.0]),
    )
    np.testing.assert_allclose(call(balancer, jacobian, losses), applied(balancer) @ jacobian, rtol=1e-5)


def test_db_mtl_on_a_loss_that_is_not_positive():
    balancer, jacobian = DBMTLLoss(("a", "b")), random_jacobian(0, 2, 5)
    call(balancer, jacobian, [1.0, 2.0])
    before = {name: value.clone() for name, value in balancer.named_buffers()}
    weights = applied(balancer)
    with pytest.warns(NonFiniteWarning, match="domain.*last good weights"):
        found = call(balancer, jacobian, [1.0, -2.0])
    np.testing.assert_allclose(found, weights @ jacobian, rtol=1e-6)
    assert balancer.num_nonfinite == 1
    for name, value in balancer.named_buffers():
        assert name == "nonfinite_calls" or torch.equal(value, before[name]), name


@pytest.mark.parametrize("cls", TRACKING)
def test_tracked_gradients_survive_a_save(cls):
    generator = np.random.default_rng(3)
    whole, parted = cls(names(3)), cls(names(3))
    for step in range(8):
        jacobian, losses = generator.normal(size=(3, 7)), generator.uniform(0.5, 2.0, size=3)
        if step == 4:
            state = parted.state_dict()
            parted = cls(names(3))
            call(parted, 9 * jacobian)  # also into one that has run
            parted.load_state_dict(state)
        assert np.array_equal(call(whole, jacobian, losses), call(parted, jacobian, losses))
    assert whole.tracked.shape == (3, 7)
    assert whole.tracked.dtype == torch.float64


@pytest.mark.parametrize("cls", TRACKING)
def test_tracking_says_what_it_cannot_read(cls, problem):
    p = problem(names(3))
    balancer = cls(names(3))
    features = p.trunk(p.inputs)
    with pytest.raises(SharedParametersError, match="must hold parameters, not representations"):
        balancer(p.per_sample(features), shared_params=features)
    p.call(balancer).backward()
    other = problem(names(3), trunk=nn.Linear(5, 6))
    with pytest.raises(SharedParametersError, match="the same parameters in every call"):
        other.call(balancer)


# ---------------------------------------------------------------------- what the base promises
@pytest.mark.parametrize("cls", COMBINING)
def test_a_suffix_of_what_is_shared_is_refused(cls, problem):
    p = problem(names(2))
    balancer = cls(names(2))
    with pytest.raises(SharedParametersError, match=r"2 parameter.*of shape \(8, 5\), \(8,\).*pass all of"):
        p.call(balancer, shared_params=p.trunk[2].parameters())
    p.heads["t1"] = p.heads["t0"]  # and one head for two tasks is shared
    with pytest.raises(SharedParametersError, match="must hold all that two tasks share"):
        p.call(balancer)
    assert balancer.calls == 0
    p.call(
        balancer, shared_params=None, model=nn.ModuleList([p.trunk, p.heads])
    ).backward()  # found by itself


def test_nested_representations_are_refused(problem):
    p = problem(names(2))
    low = p.trunk[:2](p.inputs)
    high = p.trunk[2:](low)
    with pytest.raises(SharedParametersError, match="is computed from another; pass the trunk's parameters"):
        GradDropLoss(names(2))(p.per_sample(high), shared_params=[low, high])


@pytest.mark.parametrize("cls", COMBINING)
def test_hooks_run_once_on_what_is_delivered(cls, problem):
    p, plain = problem(names(2)), problem(names(2))
    seen = []
    p.trunk[0].weight.register_hook(lambda gradient: seen.append("shared") or 10.0 * gradient)
    p.heads["t1"].weight.register_hook(lambda gradient: seen.append("head") or -gradient)
    for _ in range(2):
        hooked, expected = p.gradients(p.call(cls(names(2)))), plain.gradients(plain.call(cls(names(2))))
        torch.testing.assert_close(hooked[0], 10.0 * expected[0])
        torch.testing.assert_close(hooked[-2], -expected[-2])
        torch.testing.assert_close(hooked[1], expected[1])
    assert seen.count("shared") == seen.count("head") == 2


def test_hooks_on_a_representation_run_once(problem):
    p = problem(names(2))
    seen = []

    def run(hooked: bool):
        features = p.trunk(p.inputs)
        if hooked:
            features.register_hook(lambda gradient: seen.append(gradient) or 3.0 * gradient)
        return p.gradients(TrimmedMeanLoss(names(2))(p.per_sample(features), shared_params=features))

    plain, hooked = run(False), run(True)
    assert len(seen) == 1
    for one, other in zip(plain[:4], hooked[:4], strict=True):
        torch.testing.assert_close(3.0 * one, other)


@pytest.mark.parametrize("cls", COMBINING)
def test_a_gradient_that_is_not_finite_though_its_loss_is(cls):
    theta = torch.zeros(3, requires_grad=True)
    balancer = cls(("a", "b"))
    for _ in range(2):
        balancer(theta.sum() + 1, 2 * theta.sum() + 1, shared_params=[theta]).backward()
    before = {name: value.clone() for name, value in balancer.named_buffers()}
    theta.grad = None
    with pytest.warns(NonFiniteWarning):
        balancer(theta.sqrt().sum() + 1, 2 * theta.sum() + 1, shared_params=[theta]).backward()
    assert not theta.grad.isfinite().any()
    assert balancer.num_nonfinite == 1
    for name, value in balancer.named_buffers():
        if name != "nonfinite_calls":
            torch.testing.assert_close(value, before[name], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("cls", COMBINING)
def test_inputs_that_require_a_gradient_get_the_plain_sum(cls, problem):
    p = problem(names(2))
    p.inputs.requires_grad_()
    p.call(cls(names(2))).backward()
    found, p.inputs.grad = p.inputs.grad, None
    sum(loss.mean() for loss in p.losses().values()).backward()
    torch.testing.assert_close(found, p.inputs.grad)


@pytest.mark.parametrize("cls", COMBINING)
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_parameters(cls, kind):
    """Combined as dense real numbers: the same as for a parameter that is so from the start."""

    def run(unusual: bool) -> torch.Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=unusual and kind == "sparse", dtype=torch.float64)
        if unusual and kind == "complex":
            weight = nn.Parameter(torch.view_as_complex(table.weight.detach().clone()))
            rows = torch.view_as_real(weight)[torch.tensor([0, 3, 3])]
        else:
            weight, rows = table.weight, table(torch.tensor([0, 3, 3]))
        losses = [(k + 1.0 + rows.square() - (k * rows).sin()).mean() for k in range(3)]
        cls(names(3))(*losses, shared_params=[weight]).backward()
        return torch.view_as_real(weight.grad) if weight.is_complex() else weight.grad

    torch.testing.assert_close(run(True), run(False))


@pytest.mark.parametrize("cls", COMBINING)
def test_complex_parameters_behind_an_odd_count_of_real_ones(cls):
    """In one flat vector their numbers start where no complex view can."""
    real = torch.ones(3, requires_grad=True)
    complex_ = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    losses = [1.0 + real.sum() + k * torch.view_as_real(complex_)[:, 0].sum() for k in (1.0, 2.0)]
    cls(names(2))(*losses, shared_params=[real, complex_]).backward()
    assert (complex_.grad.real > 0).all()
    assert (complex_.grad.imag == 0).all()


@pytest.mark.parametrize(
    ("cls", "options", "loss", "gradient"),
    [
        (DBMTLLoss, {}, 1e-40, 1.0),  # no inverse in float32
        (DBMTLLoss, {}, 1e-30, 1e15),  # no such logarithm's gradient
        (MoCoLoss, {"normalise": True}, 1e25, 1e-18),
    ],
)
def test_what_is_too_large_once_scaled_is_not_remembered(cls, options, loss, gradient):
    balancer, good = cls(names(2), **options), torch.eye(2, dtype=torch.float32)
    call(balancer, good, losses=[1.0, 1.0], dtype=torch.float32)
    kept = {name: value.clone() for name, value in balancer.state_dict().items()}
    with pytest.warns(NonFiniteWarning, match="too large|finite slopes"):
        found = call(balancer, [[gradient, 0.0], [0.0, 1.0]], losses=[loss, 1.0], dtype=torch.float32)
    assert np.isfinite(found).all()
    assert balancer.num_nonfinite == 1
    for name in ("tracked", "tracked_calls", "task_weights"):
        assert torch.equal(kept[name], getattr(balancer, name))


def test_config_stays_finite_for_a_gradient_of_almost_nothing():
    """Its coefficient, one over the norm, is outside float32."""
    balancer = ConFIGLoss(names(2))
    assert np.isfinite(call(balancer, [[1e-40, 0.0], [0.0, 1.0]], dtype=torch.float32)).all()
    assert torch.isfinite(balancer.solved_weights).all()


@pytest.mark.parametrize("cls", [*TRACKING, ExcessMTLLoss])
def test_state_is_not_carried_over_to_other_parameters_of_the_same_size(cls):
    """One layer frozen and another of its size unfrozen, or the same ones in another order."""
    first, second, third = (torch.ones(2, requires_grad=True) for _ in range(3))

    def balance(*shared: torch.Tensor) -> None:
        losses = [1.0 + sum((k * tensor).sum() for tensor in shared) for k in (1.0, 2.0)]
        balancer(*losses, shared_params=shared).backward()

    balancer = cls(names(2))
    balance(first, second)
    for others in ((first, third), (second, first)):
        with pytest.raises(SharedParametersError, match="holds others, or in another order"):
            balance(*others)
    balance(first, second)
    balancer = copy.deepcopy(balancer)
    balance(*(torch.ones(2, requires_grad=True) for _ in range(2)))


def test_a_rank_trims_its_own_gradients_by_its_own_count():
    """With sync="norms" a rank without some tasks gives the mean of those that it has, by their share."""
    layout = Layout([torch.zeros(1)], torch.device("cpu"))
    tasks = TrimmedMeanLoss(names(4), sync="norms")._trimmed({0, 1}, 4, layout)
    for task, gradient in ((0, 2.0), (1, 6.0)):
        tasks.add(task, torch.tensor([gradient]))
    signals = Signals(torch.ones(4), torch.ones(4, dtype=torch.bool), None, torch.tensor(True))
    assert tasks.combine(signals).item() == 2.0  # 4, the mean of half of the tasks


@pytest.mark.parametrize("cls", [*COMBINING, ConFIGLoss])
def test_heads_get_their_own_gradient(cls, problem):
    p = problem(names(3))
    found = p.gradients(p.call(cls(names(3))))[4:]
    for k, task in enumerate(p.tasks):
        own = p.gradients(p.losses()[task].mean())[4 + 2 * k]
        factor = 1.0 / p.losses()[task].mean().item() if cls is DBMTLLoss else 1.0
        torch.testing.assert_close(found[2 * k], factor * own)


@pytest.mark.parametrize(("cls", "copies"), [(GradDropLoss, 3), (TrimmedMeanLoss, 8)])
def test_gradients_are_not_kept_until_the_last_is_known(cls, copies):
    """Of 12 tasks' gradients no more is alive at once than the methods say; methods that weigh tasks hold all."""

    def peak(balancer) -> float:
        theta = torch.zeros(50_000, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            losses = [((k + 1.0) * theta).cos().sum() for k in range(12)]
            balancer(*losses, shared_params=[theta]).backward()
        levels = np.cumsum(
            [
                event.nbytes()
                for event in profile.profiler.kineto_results.events()
                if event.name() == "[memory]"
            ]
        )
        return levels.max() / (4 * theta.numel())

    plain = peak(FixedWeightLoss(names(12)))
    assert peak(cls(names(12))) - plain < copies + 0.1 < 10 < peak(GABALoss(names(12))) - plain
