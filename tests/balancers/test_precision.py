"""Mixed precision, with a real GradScaler: nothing underflows in probes, overflow is seen and skipped."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from reference_loop import amp_loop
from torch import nn

from mtlbalance.errors import NonFiniteWarning

TASKS = ("a", "b")


def reads_gradients(balancer) -> bool:
    return balancer.reads in ("gradient norms", "gramian", "jacobian")


def losses(p, scale: float, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Per-sample losses of a trunk under autocast; both tasks' losses are scaled."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        features = p.trunk(p.inputs)
        predictions = {task: p.heads[task](features).squeeze(-1) for task in p.tasks}
    factors = {"a": scale, "b": 0.1 * scale}
    return {
        task: factors[task] * (predictions[task].to(p.targets[task].dtype) - p.targets[task]).square()
        for task in p.tasks
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_probes_neither_vanish_nor_overflow(method, make, problem, dtype, scale):
    if not reads_gradients(make(method)):
        return
    p, exact = problem(TASKS), problem(TASKS, dtype=torch.float64)
    measured, expected = (
        make(method, warmup_steps=0, max_weight=1.0),
        make(method, warmup_steps=0, max_weight=1.0),
    )
    delivered = p.gradients(measured(losses(p, scale, dtype), shared_params=p.trunk, targets=p.targets))
    expected(losses(exact, scale, None), shared_params=exact.trunk, targets=exact.targets)
    assert measured.num_nonfinite == 0
    if "grad_norm" in measured.report():
        assert measured.report()["grad_norm"] == pytest.approx(expected.report()["grad_norm"], rel=0.05)
    assert all(gradient.isfinite().all() for gradient in delivered)
    assert delivered[0].abs().max() > 0
    if measured.weight_sum not in ("free", "none"):
        assert measured.get_weights() == pytest.approx(expected.get_weights(), abs=0.02)


@pytest.mark.parametrize("delivery", ["direct", "weighted_sum"])
def test_the_scale_leaves_no_trace_in_what_is_delivered(method, make, problem, delivery):
    """With float16 in the graph the probe scale works; powers of two must cancel to the last bit in float32."""
    if not reads_gradients(make(method)):
        return
    p = problem(TASKS)
    scaled, plain = (
        make(method, warmup_steps=0, delivery=delivery),
        make(method, warmup_steps=0, delivery=delivery),
    )
    scaled._in_half, plain._in_half = True, False
    first = p.gradients(p.call(scaled))
    second = p.gradients(p.call(plain))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
    weightless = plain.weight_sum == "none"
    assert scaled.get_weights() == pytest.approx(plain.get_weights(), rel=1e-6, nan_ok=weightless)


def test_the_scale_leaves_no_trace_in_the_state(method, make, problem):
    """The scale follows the losses from call to call; what is summed or smoothed over calls must not."""
    if not reads_gradients(make(method)):
        return
    p = problem(TASKS)
    scaled, plain = make(method, warmup_steps=0, beta=0.5), make(method, warmup_steps=0, beta=0.5)
    scaled._in_half, plain._in_half = True, False
    for factor in (1.0, 0.1, 1e-3, 1e-4):
        for balancer in (scaled, plain):
            shrinking = {task: factor * loss for task, loss in p.losses().items()}
            p.gradients(balancer(shrinking, shared_params=p.trunk, targets=p.targets))
    expected = plain.state_dict()
    for name, value in scaled.state_dict().items():
        if not name.startswith("probe_scale."):
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.situation("fp16 overflow")
def test_a_loop_with_a_grad_scaler(method, make, problem):
    """Twenty steps in float16 follow float32; an overflow is skipped by the scaler and leaves no trace."""
    p, exact = problem(TASKS), problem(TASKS)
    balancer, reference = make(method, warmup_steps=2), make(method, warmup_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ours, theirs = (torch.optim.SGD(x.parameters(), lr=1e-4) for x in (p, exact))
    for step in range(20):
        overflows = step == 10
        before = copy.deepcopy(balancer.state_dict())
        parameters = [parameter.detach().clone() for parameter in p.parameters()]
        found = losses(p, 1.0, torch.float16)
        if overflows:
            found["a"] = found["a"] * torch.inf
        ours.zero_grad()
        if overflows:
            with pytest.warns(NonFiniteWarning):
                loss = balancer(found, shared_params=p.trunk, targets=p.targets)
        else:
            loss = balancer(found, shared_params=p.trunk, targets=p.targets)
        scaler.scale(loss).backward()
        scaler.unscale_(ours)
        nn.utils.clip_grad_norm_(p.parameters(), 10.0)
        scaler.step(ours)
        scaler.update()
        if overflows:
            assert scaler.get_scale() == 2.0**9
            for parameter, old in zip(p.parameters(), parameters, strict=True):
                assert torch.equal(parameter, old)
            after = balancer.state_dict()
            moving = [key for key, value in before.items() if value.is_floating_point()]
            for key in set(moving) - {"applied_weights"}:
                assert torch.equal(before[key].nan_to_num(), after[key].nan_to_num()), key
            continue
        theirs.zero_grad()
        reference(losses(exact, 1.0, None), shared_params=exact.trunk, targets=exact.targets).backward()
        nn.utils.clip_grad_norm_(exact.parameters(), 10.0)
        theirs.step()
    assert balancer.num_nonfinite == 1
    for parameter, other in zip(p.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0.05, atol=5e-3)


def test_an_overflowing_probe_lowers_its_scale_and_recovers():
    """A graph in float16 whose gradients overflow at the first scale: a few counted calls, then it measures."""
    from mtlbalance import GABALoss

    theta = torch.full((4,), 1.0, requires_grad=True)
    balancer = GABALoss(TASKS, warmup_steps=0)

    def call():
        wide = (theta.half() * 1.0).repeat(2000) * 30.0
        return balancer(wide.float().sum() - 239_999.0, theta.half().float().sum(), shared_params=[theta])

    with pytest.warns(NonFiniteWarning):
        call().backward()
    for _ in range(8):
        theta.grad = None
        call().backward()
    assert theta.grad.isfinite().all()
    assert 0 < balancer.num_nonfinite < 6
    assert balancer.report()["grad_norm"]["a"] == pytest.approx(2 * 2000 * 30.0, rel=0.01)


@pytest.mark.parametrize("update_every", [1, 4])
@pytest.mark.parametrize("delivery", ["direct", "weighted_sum"])
def test_a_head_that_overflows_where_the_trunk_does_not(method, make, problem, delivery, update_every):
    """Heads are probed at the scale of the trunk: if only they overflow, it falls, and steps are lost no longer."""
    balancer = make(
        method,
        warmup_steps=0,
        max_weight=1.0,
        delivery=delivery,
        update_every=update_every,
        update_interval=1,
    )
    if not reads_gradients(balancer):
        return
    p = problem(TASKS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        near = {task: p.heads[task](p.trunk(p.inputs)).squeeze(-1).float() - 0.003 for task in p.tasks}
    p.targets.update(near)

    def delivered():
        return p.gradients(balancer(losses(p, 1.0, torch.float16), shared_params=p.trunk, targets=p.targets))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)  # weighted sums may show it in ``.grad`` alone
        lost = [not all(gradient.isfinite().all() for gradient in delivered()) for _ in range(12)]
    assert sum(lost) <= 4
    assert not any(lost[-4:])
    assert balancer.num_nonfinite <= 4


SITUATIONS = [
    pytest.param(torch.bfloat16, 1.0, marks=pytest.mark.situation("bf16 autocast"), id="bf16"),
    pytest.param(torch.float16, 1.0, marks=pytest.mark.situation("fp16 + GradScaler"), id="fp16"),
    *(
        pytest.param(
            torch.float16, scale, marks=pytest.mark.situation("loss scale 1e-6 … 1e6"), id=f"fp16-{scale:g}"
        )
        for scale in (1e-6, 1e6)
    ),
]


@pytest.mark.parametrize(("dtype", "scale"), SITUATIONS)
def test_a_loop_in_mixed_precision_goes_the_way_of_float64(method, make, problem, dtype, scale):
    balancer, twin = (make(method, TASKS, warmup_steps=1, beta=0.5, max_weight=1.0) for _ in range(2))
    distance, skips = amp_loop(balancer, twin, problem(TASKS), dtype, scale)
    assert distance < (0.01 if dtype == torch.bfloat16 else 0.002)
    assert skips == 0 or scale >= 1.0
    assert skips == balancer.num_nonfinite or balancer.num_nonfinite == 0
