"""Methods with an objective of their own: GLS, STCH, PBI and COSMOS in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlbalance import COSMOSLoss, GLSLoss, PBILoss, STCHLoss
from mtlbalance.errors import BalancerError, NonFiniteWarning

TASKS = ("a", "b", "c")
PREFERENCE = np.array([1.0, 3.0, 0.5])


def call(balancer, values) -> tuple[float, np.ndarray]:
    """The value, and the slopes that reach the losses, which are those reported."""
    losses = {
        task: torch.tensor(float(value), dtype=torch.float64, requires_grad=True)
        for task, value in zip(TASKS, values, strict=True)
        if value is not None
    }
    total = balancer(losses)
    total.backward()
    slopes = np.array([losses[task].grad.item() if task in losses else 0.0 for task in TASKS])
    np.testing.assert_allclose(list(balancer.get_weights().values()), slopes, rtol=1e-6)
    return total.item(), slopes


def numerical_slopes(function, values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    slopes = []
    for k in range(len(values)):
        step = 1e-5 * values[k] * np.eye(len(values))[k]
        slopes.append((function(values + step) - function(values - step)) / (2e-5 * values[k]))
    return np.array(slopes)


def gls(losses) -> float:
    return float(np.prod(losses) ** (1 / len(losses)))


def stch(losses, nadir, mu) -> float:
    return float(mu * np.log(np.exp(PREFERENCE * np.log(losses / nadir) / mu).sum()))


def pbi(losses, penalty, ideal) -> float:
    direction = PREFERENCE / np.linalg.norm(PREFERENCE)
    along = abs((losses - ideal) @ direction)
    return float(along + penalty * np.linalg.norm(losses - ideal - along * direction))


def cosmos(losses, penalty) -> float:
    shares = PREFERENCE / PREFERENCE.sum()
    cosine = losses @ shares / (np.linalg.norm(losses) * np.linalg.norm(shares))
    return float(losses @ shares - penalty * cosine)


def check(balancer, function, values) -> None:
    value, slopes = call(balancer, values)
    assert value == pytest.approx(function(np.asarray(values)), rel=1e-5, abs=1e-6)
    expected = numerical_slopes(function, values)
    np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


POSITIVE = st.floats(0.01, 20.0)


@settings(max_examples=60, deadline=None)
@given(values=st.tuples(POSITIVE, POSITIVE, POSITIVE), penalty=st.sampled_from([0.0, 1.0, 5.0]))
def test_values_and_slopes(values, penalty):
    check(GLSLoss(TASKS), gls, values)
    check(
        PBILoss(TASKS, preference=PREFERENCE.tolist(), penalty=penalty, ideal=[0.005, 0.0, 0.001]),
        lambda losses: pbi(losses, penalty, np.array([0.005, 0.0, 0.001])),
        values,
    )
    check(
        COSMOSLoss(TASKS, preference=PREFERENCE.tolist(), penalty=penalty),
        lambda losses: cosmos(losses, penalty),
        values,
    )


@pytest.mark.parametrize("mu", [0.1, 1.0, 10.0])
def test_stch_takes_its_nadirs_from_the_first_calls(mu):
    balancer = STCHLoss(TASKS, mu=mu, preference=PREFERENCE.tolist(), nadir_steps=3)
    generator = np.random.default_rng(0)
    first = generator.uniform(1.0, 9.0, size=(3, 3))
    for values in first:
        check(balancer, lambda losses: float(np.log(losses).mean()), values)
    np.testing.assert_allclose(balancer.nadir, first.mean(axis=0), rtol=1e-6)
    for values in generator.uniform(0.1, 9.0, size=(5, 3)):
        check(balancer, lambda losses: stch(losses, first.mean(axis=0), mu), values)
    np.testing.assert_allclose(balancer.nadir, first.mean(axis=0), rtol=1e-6)


def test_stch_saves_its_nadirs():
    generator = np.random.default_rng(1)
    whole, parted = STCHLoss(TASKS, nadir_steps=4), STCHLoss(TASKS, nadir_steps=4)
    for step, values in enumerate(generator.uniform(0.1, 9.0, size=(8, 3))):
        if step in (2, 6):
            fresh = STCHLoss(TASKS, nadir_steps=4)
            fresh.load_state_dict(parted.state_dict())
            parted = fresh
        assert call(whole, values)[0] == call(parted, values)[0]


def test_stch_waits_for_the_nadir_of_a_task_that_joins_late():
    balancer = STCHLoss(TASKS, nadir_steps=2)
    for _ in range(4):
        value, _ = call(balancer, [2.0, 4.0, None])
    assert value == pytest.approx(math.log(2.0), rel=1e-5)  # log(1 + 1): both are at their nadirs
    for _ in range(2):
        value, slopes = call(balancer, [2.0, 4.0, 8.0])
        assert value == pytest.approx(math.log(64.0) / 3, rel=1e-5)
        np.testing.assert_allclose(slopes, [1 / 6, 1 / 12, 1 / 24], rtol=1e-5)
    value, _ = call(balancer, [2.0, 4.0, 8.0])
    assert value == pytest.approx(math.log(3.0), rel=1e-5)


def test_stch_near_the_maximum_serves_the_worst_task():
    balancer = STCHLoss(TASKS, mu=0.01, nadir_steps=1)
    call(balancer, [1.0, 1.0, 1.0])
    _, slopes = call(balancer, [0.5, 0.9, 0.6])
    np.testing.assert_allclose(slopes, [0.0, 1 / 0.9, 0.0], atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gls_works_in_logarithms(scale):
    """The product of these losses is 0 or infinite in float32."""
    balancer = GLSLoss(TASKS)
    losses = [torch.tensor(scale * factor) for factor in (1.0, 2.0, 4.0)]
    assert balancer(*losses).item() == pytest.approx(2.0 * scale, rel=1e-4)
    np.testing.assert_allclose(list(balancer.get_weights().values()), [2 / 3, 1 / 3, 1 / 6], rtol=1e-4)


def test_gls_is_over_the_present_tasks():
    value, slopes = call(GLSLoss(TASKS), [4.0, None, 9.0])
    assert value == pytest.approx(6.0)
    np.testing.assert_allclose(slopes, [6 / 8, 0.0, 6 / 18], rtol=1e-6)


@pytest.mark.parametrize("cls", [GLSLoss, STCHLoss])
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_losses_that_are_not_positive_are_counted_and_never_silent(cls, bad):
    balancer = cls(TASKS)
    call(balancer, [1.0, 2.0, 4.0])
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    weights = balancer.get_weights()
    with pytest.warns(NonFiniteWarning, match="outside the domain"):
        value, _ = call(balancer, [1.0, 2.0, bad])
    assert math.isfinite(value)
    assert balancer.get_weights() == weights
    assert balancer.num_nonfinite == 1
    after = balancer.state_dict()
    for key in before.keys() - {"calls", "nonfinite_calls"}:
        assert torch.equal(before[key], after[key]), key


def test_losses_at_the_preferred_proportions_have_the_slopes_of_the_sum():
    preference = dict(zip(TASKS, PREFERENCE, strict=True))
    for balancer in (
        COSMOSLoss(TASKS, preference=preference),
        PBILoss(TASKS, preference=preference, penalty=0),
    ):
        _, slopes = call(balancer, 2.0 * PREFERENCE)
        np.testing.assert_allclose(slopes / slopes[0], PREFERENCE, rtol=1e-4)


def test_pbi_drives_the_losses_to_the_preferred_proportions():
    """Two quadratics that want different points: the compromise has losses 1 : 4."""
    theta = torch.zeros(1, requires_grad=True)
    balancer = PBILoss(("a", "b"), preference=(1.0, 4.0))
    optimizer = torch.optim.Adam([theta], lr=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        balancer((theta - 1).square().sum(), (theta + 2).square().sum()).backward()
        optimizer.step()
    losses = (theta.item() - 1) ** 2, (theta.item() + 2) ** 2
    assert losses[1] / losses[0] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("cls", [PBILoss, COSMOSLoss, GLSLoss, STCHLoss])
def test_without_training_the_value_is_the_objective(cls):
    balancer = cls(TASKS)
    expected, slopes = call(balancer, [1.0, 2.0, 4.0])
    balancer.eval()
    value, found = call_in_eval(balancer, [1.0, 2.0, 4.0])
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-7)
    np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-7)


def call_in_eval(balancer, values) -> tuple[float, np.ndarray]:
    losses = [torch.tensor(float(value), dtype=torch.float64, requires_grad=True) for value in values]
    total = balancer(*losses)
    total.backward()
    return total.item(), np.array([loss.grad.item() for loss in losses])


@pytest.mark.parametrize("cls", [PBILoss, COSMOSLoss, STCHLoss])
def test_preferences_are_checked(cls):
    for given_preference, message in [
        ({"a": 1.0, "b": 1.0}, "no weight for 'c'"),
        ([1.0, 0.0, 1.0], "preference.'b'. must be > 0"),
        ([1.0, -1.0, 1.0], "preference.'b'."),
        ({"a": 1.0, "b": 1.0, "x": 1.0}, "unknown task 'x'"),
    ]:
        with pytest.raises(BalancerError, match=message):
            cls(TASKS, preference=given_preference)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (STCHLoss, {"mu": 0.0}),
        (STCHLoss, {"nadir_steps": 0}),
        (PBILoss, {"penalty": -1.0}),
        (PBILoss, {"ideal": [1.0]}),
        (COSMOSLoss, {"penalty": -1.0}),
    ],
)
def test_arguments_are_checked(cls, options):
    with pytest.raises(BalancerError, match=next(iter(options))):
        cls(TASKS, **options)
