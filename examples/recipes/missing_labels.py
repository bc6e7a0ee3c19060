"""Tasks from different data sets: a sample has labels for some tasks, a batch may lack a task altogether.

Use it when no sample, or not every sample, has all labels. One line changes, and absent tasks stay out of the mapping:

    -loss = sum(losses.values())
    +loss = balancer(losses, shared_params=model.trunk.parameters())

An absent task (not in the mapping, None, or a per-sample loss of no samples) gets weight 0, and its state waits; the
tasks that are there share the whole budget, and a task that is alone has weight 1. So ``--batches`` matters:

- ``joint``: every step takes a batch from each data set, and one call balances their losses. Do this where you can.
- ``mixed``: batches hold samples of both; each loss covers the samples that have its label, and may cover none.
- ``alternating``: one data set a batch. No call ever sees two tasks, so GABA and gradient surgery balance nothing;
  Uncertainty, which learns a scale a task, still works.

With ``update_every=N``, a task is measured only when it is there in an N-th call.

    python examples/recipes/missing_labels.py [--method gaba|uncertainty|pcgrad] [--batches joint|mixed|alternating]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlbalance import Balancer, GABALoss, PCGradLoss, UncertaintyLoss

METHODS: dict[str, type[Balancer]] = {"gaba": GABALoss, "uncertainty": UncertaintyLoss, "pcgrad": PCGradLoss}
TASKS = ("distance", "angle")
STEPS, BATCH_SIZE = 200, 32
Batch = tuple[
    Tensor, dict[str, Tensor]
]  # inputs (B, 8), and targets (B,) by task, NaN where there is no label


class Model(nn.Module):
    """A small trunk that both tasks share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})

    def losses(self, inputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return each task's squared errors on the samples that have its label."""
        features = self.trunk(inputs)
        losses = {}
        for task, target in targets.items():
            labelled = ~target.isnan()
            prediction = self.heads[task](features[labelled]).squeeze(1)
            losses[task] = (prediction - target[labelled]).square()
        return losses


def samples(tasks: Sequence[str], count: int = BATCH_SIZE) -> Batch:
    """Return samples with labels for ``tasks``; squared, one target is a hundred times the other."""
    inputs = torch.randn(count, 8)
    every = {"distance": inputs[:, 0] * inputs[:, 1], "angle": 0.1 * torch.sin(2 * inputs[:, 2])}
    return inputs, {task: every[task] for task in tasks}


def steps(batches: str) -> Iterator[list[Batch]]:
    """Yield the batches of each step."""
    for step in range(STEPS):
        if batches == "joint":
            yield [samples(["distance"]), samples(["angle"])]
        elif batches == "alternating":
            yield [samples([TASKS[step % 2]])]
        else:
            inputs, targets = samples(TASKS)
            has_angle = torch.rand(BATCH_SIZE) < 0.05  # in one batch of five, none
            targets["distance"][has_angle], targets["angle"][~has_angle] = torch.nan, torch.nan
            yield [(inputs, targets)]


def train(model: Model, balancer: Balancer, batches: str) -> Counter[str]:
    """Train, and return in how many steps each task had labels."""
    groups: list[dict[str, Any]] = [{"params": model.parameters()}]
    groups += [{"params": balancer.parameters(), "weight_decay": 0.0}]  # none for most methods
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    seen: Counter[str] = Counter()
    for parts in steps(batches):
        losses: dict[str, Tensor] = {}
        for inputs, targets in parts:
            losses |= model.losses(inputs, targets)
        seen.update(task for task, loss in losses.items() if len(loss) > 0)
        loss = balancer(losses, shared_params=model.trunk.parameters())  # the one line that changes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tasks' losses before and after, and the weights applied last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gaba")
    parser.add_argument("--batches", choices=("joint", "mixed", "alternating"), default="joint")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    torch.manual_seed(0)
    model, balancer = Model(), METHODS[options.method](TASKS)
    inputs, targets = samples(TASKS, 2048)
    with torch.no_grad():
        before = model.losses(inputs, targets)
    seen = train(model, balancer, options.batches)
    with torch.no_grad():
        after = model.losses(inputs, targets)
    for task, weight in balancer.get_weights().items():
        change = f"loss {before[task].mean():.5f} -> {after[task].mean():.5f}"
        print(f"{task:8}  {change}  weight {weight:.3f}  labels in {seen[task]} of {STEPS} steps")


if __name__ == "__main__":
    main()
