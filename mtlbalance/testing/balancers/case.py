"""The balancer under test: how it is made, and what its class says of itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer
from mtlbalance.testing.expectations import NotKeptError, expect
from mtlbalance.testing.problem import Gradients, Problem, plain_gradients

TASKS = ("a", "b", "c")


class BalancerCase:
    """A way to make balancers, and what their class promises.

    Args:
        make: ``make(tasks) -> Balancer``: a class, or a function that fixes options.
        accepts: the options that checks may vary through ``make(tasks, option=...)``; default: those that its
            signature names.
    """

    def __init__(self, make: Callable[..., Any], accepts: Collection[str] | None = None) -> None:
        self._make = make
        self._accepts = _named_parameters(make) if accepts is None else set(accepts)
        self._facts: Balancer | None = None

    def new(self, tasks: Sequence[str] = TASKS, **options: Any) -> Balancer:
        """Make a balancer in training mode; options that ``make`` does not take are left out."""
        made = self._make(tasks, **{name: value for name, value in options.items() if name in self._accepts})
        if not isinstance(made, Balancer):
            raise NotKeptError(
                f"make(tasks): expected a subclass of mtlbalance.Balancer; found {type(made).__name__}"
            )
        return made

    @property
    def facts(self) -> Balancer:
        """A fresh balancer of three tasks, for reading what its class says."""
        if self._facts is None:
            self._facts = self.new()
        return self._facts

    @property
    def reads_gradients(self) -> bool:
        """Whether it measures task gradients."""
        return self.facts.reads in ("gradient norms", "gramian", "jacobian")

    @property
    def has_task_weights(self) -> bool:
        """Whether it weighs tasks; a method that combines their gradients otherwise has no weights to look at."""
        return self.facts.weight_sum != "none"

    @property
    def combines(self) -> bool:
        """Whether what it delivers is no weighted sum that its read-outs would tell."""
        return self.facts.delivers == "combination" or not self.has_task_weights

    def budget(self, balancer: Balancer, present: int) -> float:
        """Return what the weights of so many present tasks sum to, where that is fixed."""
        if balancer.weight_sum == "given":
            return float(balancer.current_weights(all_present(balancer)).sum())
        return float(present) if balancer.weight_sum == "K" else 1.0


def _named_parameters(make: Callable[..., Any]) -> set[str]:
    parameters = list(inspect.signature(make).parameters.values())[1:]
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def all_present(balancer: Balancer) -> Tensor:
    """Return the mask of a batch that has every task."""
    return torch.ones(len(balancer.tasks), dtype=torch.bool)


def current(balancer: Balancer) -> dict[str, float]:
    """Return the weights that a call without training would apply to all tasks."""
    return dict(zip(balancer.tasks, balancer.current_weights(all_present(balancer)).tolist(), strict=True))


def reduced(balancer: Balancer, problem: Problem) -> dict[str, Tensor]:
    """Return fresh 0-d losses by task, with the method's own sample weights where it has some."""
    losses = problem.losses()
    own = balancer.sample_weights_of(losses, {}, {"targets": problem.targets})
    return {task: (loss * own[task]).mean() if task in own else loss.mean() for task, loss in losses.items()}


def prescribed(balancer: Balancer, problem: Problem, weights: Mapping[str, float]) -> Gradients:
    """Return the gradients of Σ w_k·L_k; those of heads unweighted where the method leaves heads alone."""
    weighted = plain_gradients(problem, reduced(balancer, problem).values(), weights.values())
    if balancer.scale_heads:
        return weighted
    unweighted = plain_gradients(problem, reduced(balancer, problem).values(), [1.0] * len(weights))
    in_trunk = len(list(problem.trunk.parameters()))
    return weighted[:in_trunk] + unweighted[in_trunk:]


def expect_sound(case: BalancerCase, weights: Mapping[str, float], what: str) -> None:
    """Raise unless the weights are finite, and none is negative where the class does not say so; or are all NaN."""
    if not case.has_task_weights:
        nothing = all(map(math.isnan, weights.values()))
        expect(nothing, f"{what}: expected NaN for every task, as weight_sum says 'none'; found {weights}")
        return
    expect(all(map(math.isfinite, weights.values())), f"{what}: expected finite weights; found {weights}")
    low = min(weights.values())
    expect(
        case.facts.signed_weights or low >= 0.0,
        f"{what}: expected no negative weight; found {weights} (or set signed_weights = True)",
    )


def has_task_weights(case: BalancerCase) -> str:
    """Say why a check of task weights does not apply."""
    return "" if case.has_task_weights else "it has no task weights"


def delivers_a_weighted_sum(case: BalancerCase) -> str:
    """Say why gradients cannot be told from the weights."""
    return "it combines the gradients otherwise" if case.combines else ""


def delivers_a_combination(case: BalancerCase) -> str:
    """Say why a check of combinations does not apply."""
    return "" if case.combines else "it delivers the weighted sum"


def reads_gradients(case: BalancerCase) -> str:
    """Say why a check of measuring does not apply."""
    return "" if case.reads_gradients else "it reads no task gradients"


def tells_tasks_apart_by_name_alone(case: BalancerCase) -> str:
    """Say why tasks cannot be exchanged."""
    if case.facts.draws_weights:
        return "its weights are drawn"
    fresh = set(current(case.facts).values())
    return (
        ""
        if len(fresh) == 1 or not case.has_task_weights
        else "its options treat tasks differently from the start"
    )
