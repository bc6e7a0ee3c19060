"""What a call takes, what it returns, and how it refuses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mtlbalance.errors import BalancerError
from mtlbalance.testing.balancers.case import TASKS, BalancerCase, all_present, reduced
from mtlbalance.testing.checks import Checks
from mtlbalance.testing.expectations import expect, expect_close, expect_equal, expect_error, where
from mtlbalance.testing.generators import expect_no_draw
from mtlbalance.testing.problem import BATCH, make_problem

COLUMNS = {"applied", "smoothed", "raw", "grad_norm"}
_SLOPE_STEP = 1e-3

CHECKS: Checks[BalancerCase] = Checks()


@CHECKS.add(first=True)
def can_be_made(case: BalancerCase) -> None:
    """make(tasks) returns a subclass of mtlbalance.Balancer, in training mode, for one task or several."""
    for tasks in (TASKS, TASKS[:1]):
        expect(case.new(tasks).training, "expected a balancer in training mode")


@CHECKS.add()
def shows_its_weights(case: BalancerCase) -> None:
    """get_name, get_weights, report and end_epoch work from the start, by task and in task order."""
    balancer = case.new()
    expect_equal(balancer.tasks, TASKS, "balancer.tasks")
    report = balancer.report()
    expect("applied" in report, f"report(): expected a column 'applied'; found {sorted(report)}")
    expect(set(report) <= COLUMNS, f"report(): expected columns of {sorted(COLUMNS)}; found {sorted(report)}")
    for column, values in report.items():
        expect_equal(tuple(values), TASKS, f"the tasks of report()[{column!r}]")
    expect_close(balancer.get_weights(), report["applied"], "get_weights() against report()['applied']")
    name = balancer.get_name()
    expect(isinstance(name, str) and name, f"get_name(): expected a name; found {name!r}")
    balancer.end_epoch()


@CHECKS.add()
def value_is_what_it_minimises(case: BalancerCase) -> None:
    """The value is 0-d and Σ applied·loss; if the class says shows = "objective", its slopes are what is applied.

    Without task weights (weight_sum = "none") it is the plain sum.
    """
    problem = make_problem(TASKS)
    balancer = case.new(warmup_steps=0)
    for call in range(3):
        before = copy.deepcopy(balancer)
        losses = {task: loss.item() for task, loss in reduced(balancer, problem).items()}
        value = problem.call(balancer)
        applied = balancer.get_weights()
        expect(value.dim() == 0, f"the returned tensor: expected 0-d; found shape {tuple(value.shape)}")
        if not case.has_task_weights:
            expect_close(value.item(), sum(losses.values()), f"the value of call {call + 1}, the plain sum")
        elif balancer.shows == "weighted sum":
            expected = sum(applied[task] * loss for task, loss in losses.items())
            expect_close(value.item(), expected, f"the value of call {call + 1}")
        else:
            expect_close(
                applied, _slopes(before, losses), f"the slopes in call {call + 1}", rtol=1e-3, atol=1e-5
            )


def _slopes(balancer: Any, losses: dict[str, float]) -> dict[str, float]:
    """Return the slopes of what ``eval()`` shows, by central differences."""
    balancer.eval()
    slopes = {}
    for task, loss in losses.items():
        step = _SLOPE_STEP * abs(loss)
        shifted = [
            {name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}
            | {task: torch.tensor(loss + sign * step, dtype=torch.float64)}
            for sign in (1.0, -1.0)
        ]
        high, low = (balancer.double()(terms).item() for terms in shifted)
        slopes[task] = (high - low) / (2 * step)
    return slopes


@CHECKS.add()
def positions_and_names_agree(case: BalancerCase) -> None:
    """Losses may be given by name in any order or by position in task order; unknown keywords are ignored."""
    problem = make_problem(TASKS)
    by_name, by_position = case.new(), case.new()
    backwards = dict(reversed(problem.losses().items()))
    first = problem.call(by_name, backwards, some_future_keyword=1)
    shared = {"shared_params": problem.trunk, "targets": problem.targets}
    second = by_position(*problem.losses().values(), **shared)
    expect_equal(second.item(), first.item(), "the value of losses by position, against by name")
    expect_equal(by_position.get_weights(), by_name.get_weights(), "the weights of losses by position")


@CHECKS.add()
def scalars_and_samples_agree(case: BalancerCase) -> None:
    """A loss is 0-d, or one value a sample, and then its mean counts."""
    problem = make_problem(TASKS)
    by_sample, by_scalar = case.new(warmup_steps=0), case.new(warmup_steps=0)
    first = problem.call(by_sample)
    own = by_scalar.sample_weights_of(problem.losses(), {}, {"targets": problem.targets})
    losses = {task: loss if task in own else loss.mean() for task, loss in problem.losses().items()}
    second = problem.call(by_scalar, losses)
    expect_close(by_scalar.get_weights(), by_sample.get_weights(), "the weights of 0-d losses, against (B,)")
    expect_close(second.item(), first.item(), "the value of 0-d losses, against (B,)")


@CHECKS.add()
def sample_weights_multiply_the_samples(case: BalancerCase) -> None:
    """sample_weights={task: w} counts that task's loss as mean(w·l), and w gets no gradient."""
    problem = make_problem()
    weight = torch.rand(BATCH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first = problem.call(weighted := case.new(("a", "b")), sample_weights={"b": weight})
    losses = problem.losses()
    second = problem.call(plain := case.new(("a", "b")), losses | {"b": losses["b"] * weight.detach()})
    expect_close(
        first.item(), second.item(), "the value with sample_weights, against losses multiplied before"
    )
    for one, other in zip(problem.gradients(first), problem.gradients(second), strict=True):
        assert one is not None
        expect_close(one, other, "a gradient with sample_weights, against losses multiplied before")
    expect_close(weighted.get_weights(), plain.get_weights(), "the weights")
    expect(weight.grad is None, "sample_weights: expected no gradient for them; found one")


@CHECKS.add()
def wrong_calls_say_what_is_wrong(case: BalancerCase) -> None:
    """A wrong call is a BalancerError that names what is wrong, with "did you mean", and counts as no call."""
    problem = make_problem(("a", "health"))
    balancer = case.new(("a", "health"))

    def refused(says: str, what: str, losses: Any, **arguments: Any) -> None:
        expect_error(BalancerError, says, what, lambda: problem.call(balancer, losses, **arguments))

    losses = problem.losses()
    loss = losses["a"]
    refused("did you mean 'health'", "the loss of an unknown task", {"a": loss, "healht": loss})
    refused("unknown task 'healht'", "the loss of an unknown task", {"a": loss, "healht": loss})
    refused("2 losses in the order", "one positional loss for two tasks", loss)
    refused("'health' must be a tensor; got float", "a loss that is a float", {"a": loss, "health": 1.0})
    refused("0-d, or per sample", "a loss of shape (B, 1)", {"a": loss, "health": loss[:, None]})
    refused("floating-point", "a loss of integers", {"a": loss, "health": torch.tensor(1)})
    refused("no task has a loss", "no losses", {})
    unknown = {"helth": loss.detach()}
    refused("did you mean 'health'", "sample weights of an unknown task", losses, sample_weights=unknown)
    refused("has shape", "sample weights of another shape", losses, sample_weights={"health": torch.ones(3)})
    scalar = losses | {"health": loss.mean()}
    refused(
        "it is 0-d", "sample weights for a 0-d loss", scalar, sample_weights={"health": torch.ones(BATCH)}
    )
    expect_equal(balancer.calls, 0, "balancer.calls after calls that were refused")


@CHECKS.add()
def wrong_task_names_are_refused(case: BalancerCase) -> None:
    """Task names are at least one, unique, non-empty strings; anything else is a BalancerError."""
    wrong: list[tuple[Any, str]] = [
        ((), "empty"),
        (("a", "a"), "unique"),
        ("ab", "sequence of names"),
        (("a", 1), "non-empty string"),
        (("a", ""), "non-empty string"),
        (None, "sequence of names"),
    ]
    for tasks, says in wrong:
        expect_error(BalancerError, says, f"tasks={tasks!r}", lambda given=tasks: case.new(given))  # type: ignore[misc]


@CHECKS.add()
def eval_moves_nothing(case: BalancerCase) -> None:
    """In eval() a call needs no shared_params, probes nothing and changes no state; the value is differentiable."""
    value = _without_training(case, "eval()")
    expect(value.requires_grad, "the value in eval(): expected one that can be differentiated")


@CHECKS.add()
def no_grad_moves_nothing(case: BalancerCase) -> None:
    """Under torch.no_grad() a call needs no shared_params, probes nothing and changes no state."""
    value = _without_training(case, "torch.no_grad()")
    expect(
        not value.requires_grad, "the value under torch.no_grad(): expected none that can be differentiated"
    )


def _without_training(case: BalancerCase, how: str) -> torch.Tensor:
    problem = make_problem()
    balancer = case.new(("a", "b"), warmup_steps=0)
    problem.train(balancer, 2)
    before = copy.deepcopy(balancer.state_dict())
    weights = balancer.current_weights(all_present(balancer))
    passes: list[int] = []
    handle = problem.trunk.register_full_backward_hook(lambda *_: passes.append(1))
    balancer.train(how != "eval()")
    with torch.set_grad_enabled(how == "eval()"):
        for _ in range(3):
            value: torch.Tensor = balancer(problem.losses(), targets=problem.targets)
    handle.remove()
    expect(not passes, f"{how}: expected no backward pass through the trunk; found {len(passes)}")
    for key, saved in balancer.state_dict().items():
        expect_equal(saved, before[key], f"{how}: the state {key!r} after three calls")
    if balancer.shows == "weighted sum":
        losses = torch.stack([loss.detach() for loss in reduced(balancer, problem).values()])
        weights = torch.ones_like(losses) if not case.has_task_weights else weights
        expect_close(
            value.item(), float((weights * losses).sum()), f"{how}: the value with the current weights"
        )
    return value


@CHECKS.add()
def global_generators_stay_untouched(case: BalancerCase) -> None:
    """Nothing is drawn from a global random generator: a method that draws has its own, which is saved with it."""
    problem = make_problem(TASKS)
    with expect_no_draw("making and calling the balancer"):
        balancer = case.new(warmup_steps=0)
        for _ in range(2):
            problem.gradients(problem.call(balancer))


def waits(case: BalancerCase) -> str:
    """Say why a step may wait for the device."""
    return "its class says copies_to_host" if case.facts.copies_to_host else ""


@CHECKS.add(applies=waits)
def a_step_waits_for_nothing(case: BalancerCase) -> None:
    """A training step makes no copy to the host (no .item(), float() or if on a tensor), unless copies_to_host says so.

    On the meta device any copy to the host raises, so a step that passes makes none.
    """
    trunk, heads = nn.Linear(4, 3, device="meta"), [nn.Linear(3, 1, device="meta") for _ in "ab"]
    balancer = case.new(("a", "b"), warmup_steps=1)
    for _ in range(2):
        features = trunk(torch.zeros(5, 4, device="meta"))
        losses = {task: head(features).squeeze(-1) for task, head in zip("ab", heads, strict=True)}
        targets = {task: torch.zeros(5, device="meta") for task in "ab"}
        try:
            balancer(losses, shared_params=trunk, targets=targets).backward()
        except (RuntimeError, NotImplementedError) as error:
            raise AssertionError(
                f"expected no copy to the host; the step makes one: {str(error).splitlines()[0]} "
                f"({where(error)}); compute with tensors on their device, or set copies_to_host = True"
            ) from error
    expect(trunk.weight.grad is not None, "expected a gradient for the trunk; found none")
    found = balancer.applied_weights.device.type
    expect(
        found == "meta", f"expected the state to follow the losses to their device, meta; it is on {found}"
    )
