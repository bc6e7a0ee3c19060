"""What the contract promises of every balancer, whatever its method."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from mtlbalance import GABALoss
from mtlbalance.errors import BalancerError, NonFiniteWarning, SharedParametersError, StateMismatchError

TASKS = ("a", "b", "c")


def make_optimizer(problem, balancer) -> torch.optim.Optimizer:
    groups = [{"params": problem.parameters()}, {"params": balancer.parameters(), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def current(balancer) -> dict[str, float]:
    """The weights that a call without training would apply."""
    present = torch.ones(len(balancer.tasks), dtype=torch.bool)
    return dict(zip(balancer.tasks, balancer.current_weights(present).tolist(), strict=True))


def steps(problem, balancer, count: int) -> list[dict[str, float]]:
    optimizer = make_optimizer(problem, balancer)
    history = []
    for _ in range(count):
        optimizer.zero_grad()
        problem.call(balancer).backward()
        optimizer.step()
        history.append(balancer.get_weights())
    return history


def budget(balancer, present: int) -> float:
    """What the weights of so many present tasks sum to; a single task has it all."""
    return float(present) if balancer.weight_sum == "K" else 1.0


def test_it_is_a_module_with_uniform_weights_before_the_first_call(method, make):
    balancer = make(method, TASKS)
    assert isinstance(balancer, nn.Module)
    weights = balancer.get_weights()
    assert list(weights) == list(TASKS)
    assert len(set(weights.values())) == 1
    assert balancer.get_name()
    assert set(balancer.report()) <= {"applied", "smoothed", "raw", "grad_norm"}
    balancer.end_epoch()


def test_value_is_the_sum_of_applied_weights_times_losses(method, facts, make, problem):
    """Or the method's own objective, where it minimises one."""
    p = problem(TASKS)
    balancer = make(method, TASKS, warmup_steps=0, max_weight=1.0)
    for _ in range(3):
        value = p.call(balancer)
        applied = balancer.get_weights()
        losses = {task: loss.mean().item() for task, loss in p.losses().items()}
        expected = sum(applied[task] * loss for task, loss in losses.items())
        if facts.objective:
            expected = facts.objective(np.array(list(losses.values())))
        assert value.dim() == 0
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_positional_losses_and_mapping_agree(method, make, problem):
    p = problem(TASKS)
    by_name, by_position = make(method, TASKS), make(method, TASKS)
    losses = p.losses()
    shared = {"shared_params": list(p.trunk.parameters()), "targets": p.targets, "some_future_keyword": 1}
    first = by_name(dict(reversed(losses.items())), **shared)
    second = by_position(*p.losses().values(), **shared)
    assert first.item() == second.item()
    assert by_name.get_weights() == by_position.get_weights()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_tasks(method, facts, make, problem, count):
    tasks = tuple("abcde"[:count])
    p = problem(tasks)
    balancer = make(method, tasks, warmup_steps=0)
    history = steps(p, balancer, 3)
    for weights in history:
        assert all(math.isfinite(weight) for weight in weights.values())
        if balancer.weight_sum != "free" or (count == 1 and not facts.scales_freely):
            assert sum(weights.values()) == pytest.approx(budget(balancer, count))


def test_wrong_calls_say_what_is_wrong(method, make, problem):
    p = problem(("rul", "health"))
    balancer = make(method, ("rul", "health"))
    loss = p.losses()["rul"]
    shared = {"shared_params": p.trunk, "targets": p.targets}
    with pytest.raises(BalancerError, match=r"unknown task 'healht'.*did you mean 'health'"):
        balancer({"rul": loss, "healht": loss}, **shared)
    with pytest.raises(BalancerError, match="2 losses in the order"):
        balancer(loss, **shared)
    with pytest.raises(BalancerError, match="'health' must be a tensor; got float"):
        balancer({"rul": loss, "health": 1.0}, **shared)
    with pytest.raises(BalancerError, match="0-d, or per sample"):
        balancer({"rul": loss, "health": loss[:, None]}, **shared)
    with pytest.raises(BalancerError, match="floating-point"):
        balancer({"rul": loss, "health": torch.tensor(1)}, **shared)
    with pytest.raises(BalancerError, match="no task has a loss"):
        balancer({}, **shared)
    with pytest.raises(BalancerError, match=r"sample_weights: unknown task 'rull'.*did you mean 'rul'"):
        balancer(p.losses(), sample_weights={"rull": loss.detach()}, **shared)
    with pytest.raises(BalancerError, match="has shape"):
        balancer(p.losses(), sample_weights={"health": torch.ones(3)}, **shared)
    with pytest.raises(BalancerError, match="it is 0-d"):
        balancer(
            p.losses() | {"health": loss.mean()}, sample_weights={"health": torch.ones(len(loss))}, **shared
        )
    assert balancer.calls == 0


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((), "empty"),
        (("a", "a"), "unique"),
        ("ab", "sequence of names"),
        (("a", 1), "non-empty string"),
        (("a", ""), "non-empty string"),
        (None, "sequence of names"),
    ],
)
def test_task_names_are_checked(tasks, message):
    with pytest.raises(BalancerError, match=message):
        GABALoss(tasks)


def test_sample_weights_multiply_the_samples(method, make, problem):
    p = problem()
    weight = torch.rand(len(p.inputs), requires_grad=True)
    weighted, plain = make(method), make(method)
    first = p.call(weighted, sample_weights={"b": weight})
    losses = p.losses()
    second = plain(
        {"a": losses["a"], "b": losses["b"] * weight.detach()},
        shared_params=p.trunk,
        targets=p.targets,
    )
    for one, other in zip(p.gradients(first), p.gradients(second), strict=True):
        torch.testing.assert_close(one, other)
    assert weight.grad is None
    assert first.item() == second.item()


def test_absent_tasks_have_weight_zero_and_the_others_share_the_budget(method, facts, make, problem):
    p = problem(TASKS)
    balancer = make(method, TASKS, warmup_steps=0)
    steps(p, balancer, 2)
    state = copy.deepcopy(balancer.state_dict())
    losses = p.losses()
    absent = {"a": losses["a"], "b": None} | ({"c": losses["c"][:0]})
    value = balancer(absent, shared_params=p.trunk, targets=p.targets)
    alone = 3.0 if balancer.weight_sum == "K" else 1.0
    weights = balancer.get_weights()
    assert weights["b"] == weights["c"] == 0.0
    assert weights["a"] > 0.0 if facts.scales_freely else weights["a"] == pytest.approx(alone)
    gradients = dict(zip(map(id, p.parameters()), p.gradients(value), strict=True))
    assert all(gradients[id(parameter)] is None for parameter in p.heads["b"].parameters())
    assert gradients[id(p.heads["a"].weight)] is not None
    for name, before in state.items():
        if name != "applied_weights" and before.is_floating_point() and before.shape[:1] == (3,):
            torch.testing.assert_close(
                balancer.state_dict()[name][1:], before[1:], rtol=0.0, atol=0.0, equal_nan=True
            )
    losses = p.losses()
    balancer({"a": losses["a"], "c": losses["c"]}, shared_params=p.trunk, targets=p.targets)
    weights = balancer.get_weights()
    assert weights["b"] == 0.0
    if balancer.weight_sum != "free":
        assert weights["a"] + weights["c"] == pytest.approx(alone)


def test_a_task_absent_at_first_joins_later(method, facts, make, problem):
    p = problem()
    balancer = make(method, warmup_steps=5)
    for _ in range(50):
        balancer({"a": p.losses()["a"]}, shared_params=p.trunk, targets=p.targets).backward()
    total = 2.0 if balancer.weight_sum == "K" else 1.0
    weights = balancer.get_weights()
    assert weights["b"] == 0.0
    assert facts.scales_freely or weights["a"] == pytest.approx(total)
    p.call(balancer).backward()
    weights = balancer.get_weights()
    if facts.signed:
        assert weights["b"] != 0.0
    else:
        assert weights["b"] > 0.1  # its state waited: it starts where it would have started at first
    if balancer.weight_sum != "free":
        assert sum(weights.values()) == pytest.approx(total)


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_without_training_nothing_is_probed_and_nothing_moves(method, make, problem, how):
    p = problem()
    balancer = make(method, warmup_steps=0)
    steps(p, balancer, 2)
    before, weights = copy.deepcopy(balancer.state_dict()), balancer.get_weights()
    counted = []
    handle = p.trunk.register_full_backward_hook(lambda *_: counted.append(1))
    if how == "eval":
        balancer.eval()
        value = balancer(p.losses(), targets=p.targets)
    else:
        with torch.no_grad():
            value = balancer(p.losses(), targets=p.targets)
    handle.remove()
    assert counted == []
    assert value.requires_grad is (how == "eval")
    if method in ("fixed", "gaba"):
        expected = sum(weights[task] * loss.mean().item() for task, loss in p.losses().items())
        assert value.item() == pytest.approx(expected, rel=1e-5)
    after = balancer.state_dict()
    assert all(torch.equal(before[key], after[key]) or before[key].isnan().any() for key in before)


def test_state_is_tensors_and_continues_bit_for_bit(method, make, problem):
    p, q = problem(TASKS), problem(TASKS)
    whole = make(method, TASKS, warmup_steps=2, update_every=3)
    expected = steps(p, whole, 11)
    first = make(method, TASKS, warmup_steps=2, update_every=3)
    optimizer = make_optimizer(q, first)
    history = []
    for step in range(11):
        if step == 6:
            buffer = io.BytesIO()
            torch.save(first.state_dict(), buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
            assert all(isinstance(value, torch.Tensor) for value in state.values())
            first = make(method, TASKS, warmup_steps=2, update_every=3)
            first.load_state_dict(state)
            moments = optimizer.state_dict()
            optimizer = make_optimizer(q, first)
            optimizer.load_state_dict(moments)
        optimizer.zero_grad()
        q.call(first).backward()
        optimizer.step()
        history.append(first.get_weights())
    assert history == expected
    for one, other in zip(p.parameters(), q.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_other_tasks_is_refused(method, make):
    state = make(method, ("a", "b")).state_dict()
    with pytest.raises(StateMismatchError, match=r"\('a', 'b'\).*\('a', 'x'\)"):
        make(method, ("a", "x")).load_state_dict(state)
    with pytest.raises(RuntimeError):
        make(method, ("a", "b")).load_state_dict({})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda balancer: pickle.loads(pickle.dumps(balancer))])
def test_copies_go_on_alike(method, make, problem, how):
    p, q = problem(), problem()
    balancer = make(method, warmup_steps=1)
    steps(p, balancer, 3)
    steps(q, make(method, warmup_steps=1), 3)
    twin = how(balancer)
    assert steps(p, balancer, 2) == steps(q, twin, 2)


def test_inside_a_model_its_state_is_saved_and_keeps_its_precision(method, make, problem):
    p = problem()
    balancer = make(method, warmup_steps=0)
    steps(p, balancer, 2)
    outer = nn.ModuleDict({"trunk": nn.Linear(2, 2), "balancer": balancer})
    other = nn.ModuleDict({"trunk": nn.Linear(2, 2), "balancer": make(method, warmup_steps=0)})
    other.load_state_dict(outer.state_dict())
    assert other["balancer"].get_weights() == balancer.get_weights()
    before = balancer.get_weights()
    outer.half()
    assert outer["trunk"].weight.dtype == torch.float16
    assert balancer.get_weights() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_never_reaches_the_state(method, facts, make, problem, bad):
    p = problem()
    balancer = make(method, warmup_steps=0, beta=0.5)
    steps(p, balancer, 3)
    before, weights = copy.deepcopy(balancer.state_dict()), current(balancer)
    losses = p.losses()
    with pytest.warns(NonFiniteWarning, match="last good weights"):
        value = balancer({"a": losses["a"] * bad, "b": losses["b"]}, shared_params=p.trunk, targets=p.targets)
    assert not math.isfinite(value.item())
    gradients = p.gradients(value)  # what was computed is delivered, so that a GradScaler sees it
    assert not all(gradient.isfinite().all() for gradient in gradients)
    assert balancer.num_nonfinite == 1
    assert balancer.get_weights() == weights
    after = balancer.state_dict()
    for key in before.keys() - {"nonfinite_calls", "applied_weights", "generator", *balancer._counters}:
        torch.testing.assert_close(after[key], before[key], rtol=0.0, atol=0.0, equal_nan=True)
    if "generator" in before:  # only a draw that every call makes may go on
        assert facts.draws or torch.equal(before["generator"], after["generator"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once already
        balancer({"a": p.losses()["a"] * bad, "b": p.losses()["b"]}, shared_params=p.trunk, targets=p.targets)
    assert balancer.num_nonfinite == 2
    assert all(math.isfinite(weight) for weights in steps(p, balancer, 3) for weight in weights.values())


def test_the_first_call_may_be_non_finite(method, make, problem):
    p = problem()
    balancer = make(method, warmup_steps=0)
    fresh = balancer.get_weights()
    with pytest.warns(NonFiniteWarning):
        balancer(
            {"a": p.losses()["a"] * math.nan, "b": p.losses()["b"]}, shared_params=p.trunk, targets=p.targets
        )
    assert balancer.get_weights() == fresh


def test_all_losses_zero(method, facts, make):
    theta = torch.ones(3, requires_grad=True)
    balancer = make(method, warmup_steps=0)
    losses = {"a": (0.0 * theta), "b": (0.0 * theta).sum()}
    expected = (
        pytest.warns(NonFiniteWarning, match="domain") if facts.needs_positive_losses else nullcontext()
    )
    with expected:
        value = balancer(losses, shared_params=[theta], targets={"a": torch.ones(3)})
    assert math.isfinite(value.item())
    value.backward()
    weights = balancer.get_weights()
    assert weights["a"] > 0
    assert facts.draws or weights["a"] == weights["b"]
    assert torch.equal(theta.grad, torch.zeros(3))
    assert balancer.num_nonfinite == int(facts.needs_positive_losses)


def test_a_step_waits_for_nothing(method, make):
    """On the meta device any copy to the host raises, so a step that passes makes none."""
    if make(method).copies_to_host:
        assert "to the host" in "".join(str(base.__doc__) for base in type(make(method)).__mro__)
        pytest.skip("solves a small problem on the host, and says so under Cost")
    trunk, heads = nn.Linear(4, 3, device="meta"), [nn.Linear(3, 1, device="meta") for _ in "ab"]
    balancer = make(method, warmup_steps=1).to("meta")
    for _ in range(3):
        features = trunk(torch.zeros(5, 4, device="meta"))
        losses = {task: head(features).squeeze(-1) for task, head in zip("ab", heads, strict=True)}
        loss = balancer(losses, shared_params=trunk, targets={"a": torch.zeros(5, device="meta")})
        loss.backward()
    assert trunk.weight.grad is not None


def test_gradient_readers_say_what_to_pass(method, make, problem):
    balancer = make(method)
    if balancer.reads not in ("gradient norms", "gramian", "jacobian"):
        return
    p = problem()
    stranger = nn.Linear(2, 2)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for shared, message in [
        (None, "needs shared_params"),
        ([], "empty"),
        (iter(()), "used up"),
        (stranger, "task 'a' does not depend"),
        (frozen, "none of the 2 tensors"),
        (list(p.trunk.named_parameters()), "named_parameters"),
        ([1.0], "holds a float"),
        (3, "is a int"),
    ]:
        for fresh in (balancer, make(method, update_every=7)):  # also where the first call measures nothing
            with pytest.raises(SharedParametersError, match=message):
                fresh(p.losses(), shared_params=shared, targets=p.targets)
    with pytest.raises(BalancerError, match="'b' does not require a gradient"):
        balancer(p.losses() | {"b": torch.tensor(1.0)}, shared_params=p.trunk, targets=p.targets)
    assert balancer.calls == 0
