"""Ways to take a training step: the plain sum, bare backward passes, every method here, and GABA's other forms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import methods
import torch
from torch import Tensor, nn
from workloads import Losses, Workload

from mtlbalance import Balancer

PLAIN = "plain sum"
BARE = "K backward passes"
UPDATE_EVERY = 10
OptimizerForm = Literal[
    "adamw", "fused", "sgd"
]  # torch's default AdamW for the device; the fused one; for memory
LEARNING_RATE = 1e-5  # small: what is measured late should be the problem that was measured early


class Training:
    """A copy of a workload's model with its own optimizer: what every variant trains."""

    def __init__(
        self, workload: Workload, optimizer: OptimizerForm, also_learned: Sequence[nn.Parameter] = ()
    ) -> None:
        self.workload = workload
        self.trunk, self.heads, self.model = workload.fresh_model()
        self.shared = list(self.trunk.parameters())
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        if also_learned:
            groups.append({"params": list(also_learned), "weight_decay": 0.0})
        self.optimizer = optimizer_of(groups, optimizer)

    def forward(self, per_sample: Collection[str] = ()) -> tuple[Tensor, Losses]:
        """Return the trunk's features and each task's loss."""
        with ExitStack() as stack:
            for context in self.workload.contexts:
                stack.enter_context(context())
            features = self.trunk(self.workload.inputs)
            predictions = {task: self.heads[task](features) for task in self.workload.tasks}
            return features, self.workload.losses(predictions, per_sample)


def optimizer_of(groups: Any, form: OptimizerForm) -> torch.optim.Optimizer:
    """Return the optimizer of all variants."""
    if form == "sgd":
        return torch.optim.SGD(groups, lr=LEARNING_RATE)
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True if form == "fused" else None)


Steps = Callable[[Workload, OptimizerForm], Iterator[None]]


@dataclass(frozen=True)
class Variant:
    """A way to take a step.

    Args:
        source: ``floor`` (no balancing), ``mtlbalance``, ``torchjd`` or ``LibMTL``.
        method: the name that mtlbalance has for it.
        form: how, where there are several ways.
        steps: makes the endless iterator of steps.
        multiple_of: in a measurement, a multiple of so many steps.
        plain: the name of the plain sum of its kind: as it is, or compiled, say, as this is.
        asks_much: it needs what torch does not have for every trunk, so that an error is a finding.
    """

    source: str
    method: str
    form: str
    steps: Steps
    multiple_of: int = 1
    plain: str = PLAIN
    asks_much: bool = False

    @property
    def may_fail(self) -> bool:
        """Whether an error is a finding, and not the end; code of others may."""
        return self.asks_much or self.source not in ("floor", "mtlbalance")

    @property
    def name(self) -> str:
        """Unique within a workload."""
        by = "" if self.source == "floor" else f"{self.source} "
        return f"{by}{self.method}" + (f" ({self.form})" if self.form else "")


def plain_steps(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
    """Sum the losses: the equal weighting that all ratios are to."""
    training = Training(workload, optimizer)
    while True:
        training.optimizer.zero_grad()
        _, losses = training.forward()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        training.optimizer.step()
        yield


def bare_passes(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
    """Differentiate the losses one after another, and nothing else.

    About the least that a method pays which reads every task's gradient on the whole trunk.
    """
    training = Training(workload, optimizer)
    while True:
        training.optimizer.zero_grad()
        _, losses = training.forward()
        left = len(losses)
        for loss in losses.values():
            left -= 1
            loss.backward(retain_graph=left > 0)  # type: ignore[no-untyped-call]
        training.optimizer.step()
        yield


def gaba_by_hand(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
    """Weigh by GABA's rule in the fewest operations that come to mind.

    No names, no absent tasks, no look at the graph for what is shared, no check of anything, nothing kept to be read or
    saved but the smoothed weights: what a library adds to that is what its promises cost.
    """
    training = Training(workload, optimizer)
    shared, tasks = training.shared, workload.tasks
    heads = {task: list(training.heads[task].parameters()) for task in tasks}
    smoothed = torch.full((len(tasks),), 1.0 / len(tasks), device=workload.inputs.device)
    while True:
        training.optimizer.zero_grad()
        _, losses = training.forward()
        left, rows, norms = len(tasks), [], []
        for task, loss in losses.items():
            left -= 1
            rows.append(torch.autograd.grad(loss, [*shared, *heads[task]], retain_graph=left > 0))
            norms.append(torch.stack(torch._foreach_norm(rows[-1][: len(shared)])))
        norms_K = torch.linalg.vector_norm(torch.stack(norms), dim=1)
        total = norms_K.sum()
        smoothed.lerp_((total - norms_K) / ((len(tasks) - 1) * total), 0.01)
        floored = smoothed.clamp(min=0.05)
        weights = (floored / floored.sum()).unbind()
        sums = torch._foreach_mul(rows[0][: len(shared)], weights[0])
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            torch._foreach_addcmul_(sums, row[: len(shared)], [weight] * len(shared))
        for parameter, gradient in zip(shared, sums, strict=True):
            parameter.grad = gradient
        for task, row, weight in zip(tasks, rows, weights, strict=True):
            for parameter, gradient in zip(heads[task], row[len(shared) :], strict=True):
                parameter.grad = gradient * weight
        training.optimizer.step()
        yield


def balanced_steps(
    make: Callable[[Sequence[str]], Balancer], per_sample: Callable[[Sequence[str]], Collection[str]], at: str
) -> Steps:
    """Return the steps with a balancer that reads gradients ``at`` the ``trunk`` or the ``features``."""

    def steps(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
        balancer = make(workload.tasks).to(workload.inputs.device)
        training = Training(workload, optimizer, also_learned=list(balancer.parameters()))
        raw = per_sample(workload.tasks)
        context = {"targets": {task: workload.targets[task].flatten() for task in raw}}
        while True:
            training.optimizer.zero_grad()
            features, losses = training.forward(raw)
            shared = features if at == "features" else training.shared
            balancer(losses, shared_params=shared, **context).backward()
            training.optimizer.step()
            yield

    return steps


def method_variant(
    method: str, form: str = "", *, at: str = "trunk", multiple_of: int = 1, **options: Any
) -> Variant:
    """Return a registered method as a variant."""
    steps = balanced_steps(
        lambda tasks: methods.make(method, tasks, **options),
        lambda tasks: methods.per_sample_tasks(method, tasks),
        at,
    )
    return Variant("mtlbalance", method, form, steps, multiple_of)


FLOORS = (Variant("floor", PLAIN, "", plain_steps), Variant("floor", BARE, "", bare_passes))
BY_HAND = Variant("floor", "gaba by hand", "", gaba_by_hand)
FUSED_PLAIN = Variant("floor", PLAIN, "fused AdamW", lambda workload, _: plain_steps(workload, "fused"))
GABA_FORMS = (
    method_variant("gaba", "K+1 passes", delivery="weighted_sum"),
    method_variant(
        "gaba", f"every {UPDATE_EVERY}th step", update_every=UPDATE_EVERY, multiple_of=UPDATE_EVERY
    ),
    method_variant("gaba", "features", at="features"),
)
LOW_MEMORY = tuple(
    method_variant(method, "low memory", delivery="low_memory") for method in ("gaba", "pcgrad")
)
BATCHED = tuple(
    replace(method_variant(method, "batched", delivery="batched"), asks_much=True)
    for method in ("gaba", "pcgrad")
)


def own_variants(wanted: Sequence[str]) -> list[Variant]:
    """Return the wanted methods, and the other forms of those that have some here."""
    others = [variant for variant in (*GABA_FORMS, *LOW_MEMORY) if variant.method in wanted]
    return [*(method_variant(method) for method in wanted), *others]


def by_name(variants: Sequence[Variant]) -> Mapping[str, Variant]:
    """Return variants by their names."""
    return {variant.name: variant for variant in variants}
