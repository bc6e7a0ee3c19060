"""One small multi-task problem, for every check of a balancer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtlbalance.balancers.base import Balancer

BATCH = 12
Gradients = list[Tensor | None]


@dataclass
class Problem:
    """A trunk, a head a task, and one batch; task k's loss is scaled by 100**-k.

    Args:
        tasks: the tasks' names.
        trunk: inputs (B, 5) -> features (B, 6).
        heads: by task, features -> (B, 1).
        inputs: (B, 5).
        targets: by task, (B,), in [0, 10).
    """

    tasks: tuple[str, ...]
    trunk: nn.Module
    heads: nn.ModuleDict
    inputs: Tensor
    targets: dict[str, Tensor]

    def per_sample(self, features: Tensor) -> dict[str, Tensor]:
        """Return every task's squared errors, (B,), from the features."""
        return {
            task: 100.0**-k * (self.heads[task](features).squeeze(-1) - self.targets[task]).square()
            for k, task in enumerate(self.tasks)
        }

    def losses(self) -> dict[str, Tensor]:
        """Return every task's squared errors, (B,)."""
        return self.per_sample(self.trunk(self.inputs))

    def parameters(self) -> list[nn.Parameter]:
        """Return the trunk's parameters, then the heads'."""
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def call(self, balancer: Balancer, losses: Any = None, **arguments: Any) -> Tensor:
        """Return one training call with everything that a method may want; all losses unless given."""
        passed = {"shared_params": self.trunk.parameters(), "targets": self.targets} | arguments
        total: Tensor = balancer(self.losses() if losses is None else losses, **passed)
        return total

    def gradients(self, loss: Tensor) -> Gradients:
        """Return the gradients that ``loss.backward()`` leaves, taken out of ``.grad``."""
        for parameter in self.parameters():
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        found = [parameter.grad for parameter in self.parameters()]
        for parameter in self.parameters():
            parameter.grad = None
        return found

    def optimizer(self, balancer: Balancer) -> torch.optim.Optimizer:
        """Return AdamW over the model and what the balancer has to train."""
        learned: dict[str, Any] = {"params": list(balancer.parameters()), "weight_decay": 0.0}
        return torch.optim.AdamW([{"params": self.parameters()}, learned], lr=1e-2)

    def train(self, balancer: Balancer, steps: int) -> list[dict[str, float]]:
        """Train for some steps and return the weights applied in each."""
        optimizer = self.optimizer(balancer)
        history = []
        for _ in range(steps):
            optimizer.zero_grad()
            self.call(balancer).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            history.append(balancer.get_weights())
        return history


def make_problem(
    tasks: Sequence[str] = ("a", "b"),
    trunk: Callable[[], nn.Module] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Return the problem for these tasks, the same for the same seed; global generators stay as they are.

    Args:
        tasks: names; each gets a head and targets.
        trunk: makes a trunk, inputs (B, 5) -> (B, 6); default: two layers with tanh.
        dtype: of parameters, inputs and targets.
        seed: of parameters and batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        body = trunk() if trunk else nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in tasks})
        inputs = torch.randn(BATCH, 5)
        targets = {task: 10.0 * torch.rand(BATCH) for task in tasks}
    return Problem(
        tuple(tasks),
        body.to(dtype),
        heads.to(dtype),
        inputs.to(dtype),
        {task: target.to(dtype) for task, target in targets.items()},
    )


def along(found: Gradients, single: Gradients) -> float:
    """Return c of c·``single`` nearest to ``found``, over the parameters that have both."""
    pairs = [
        (one, other)
        for one, other in zip(found, single, strict=True)
        if one is not None and other is not None
    ]
    product = sum(float((one.double() * other.double()).sum()) for one, other in pairs)
    return product / sum(float(other.double().square().sum()) for _, other in pairs)


def plain_gradients(problem: Problem, losses: Iterable[Tensor], weights: Iterable[float]) -> Gradients:
    """Return the gradients of Σ w_k·L_k by an ordinary backward pass: what a balancer is held to."""
    terms = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return problem.gradients(torch.stack(terms).sum())
