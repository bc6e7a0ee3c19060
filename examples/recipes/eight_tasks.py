"""Eight tasks: what changes when K is larger than two, and how to pay for it.

Use it when measuring K gradients a step costs too much, or K tasks differ widely in scale. One line changes:

    -loss = sum(losses.values())
    +loss = balancer(losses, shared_params=model.trunk.parameters())

- A measured step passes the trunk K times and holds K copies of its gradients. ``--update-every 10`` measures in one
  step of ten, 1 + (K − 1)/10 passes on average; ``--features`` reads gradients where trunk meets heads, one pass
  through the trunk, and balances another norm.
- GABA's floor ``min_weight`` must be at most 1/K, and its weights are no longer those of 1/norm: with K = 8 no raw
  weight exceeds 1/7, so it calms the largest task and tells the others little apart.
- No method here makes up for targets 56 times apart, as the errors show: rescale the targets first.
- A weight is by name: tasks may be listed in any order, and a state is refused by a balancer of other tasks.

    python examples/recipes/eight_tasks.py [--method gaba|uncertainty|upgrad|pcgrad] [--update-every 10] [--features]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlbalance import Balancer, GABALoss, PCGradLoss, UncertaintyLoss, UPGradLoss

GRADIENT_METHODS: dict[str, Callable[..., Balancer]] = {
    "gaba": GABALoss,
    "upgrad": UPGradLoss,
    "pcgrad": PCGradLoss,
}
SCALES = {f"sensor_{k}": 10.0 ** (-k / 4) for k in range(8)}  # of the targets; losses span 10^3.5
TASKS = tuple(SCALES)
STEPS, BATCH_SIZE = 250, 64


class Model(nn.Module):
    """A small trunk that all tasks share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(32, 1) for task in TASKS})

    def losses(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the mean squared error of each task, from the trunk's features."""
        return {
            task: nn.functional.mse_loss(self.heads[task](features).squeeze(1), SCALES[task] * targets[:, k])
            for k, task in enumerate(TASKS)
        }


def make_data(samples: int) -> tuple[Tensor, Tensor]:
    """Return inputs (N, 16), and targets (N, 8) that depend on two inputs each; every task has the same variance."""
    inputs = torch.randn(samples, 16)
    return inputs, torch.sin(2 * inputs[:, :8]) + 0.5 * inputs[:, 8:]


def make_balancer(method: str, update_every: int) -> Balancer:
    """Return a balancer for eight tasks."""
    if method == "uncertainty":
        return UncertaintyLoss(TASKS)
    return GRADIENT_METHODS[method](TASKS, update_every=update_every)


def train(model: Model, balancer: Balancer, data: tuple[Tensor, Tensor], features_only: bool) -> None:
    """Train for a few hundred steps."""
    groups: list[dict[str, Any]] = [{"params": model.parameters()}]
    groups += [{"params": balancer.parameters(), "weight_decay": 0.0}]  # none for most methods
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    inputs, targets = data
    for _ in range(STEPS):
        batch = torch.randint(len(inputs), (BATCH_SIZE,))
        features = model.trunk(inputs[batch])
        losses = model.losses(features, targets[batch])
        shared = features if features_only else model.trunk.parameters()
        loss = balancer(losses, shared_params=shared)  # the one line that changes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> None:
    """Print each task's weight, and its error before and after, as a fraction of predicting the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=(*GRADIENT_METHODS, "uncertainty"), default="gaba")
    parser.add_argument("--update-every", type=int, default=1)
    parser.add_argument("--features", action="store_true", help="read gradients of the features")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    torch.manual_seed(0)
    model, balancer = Model(), make_balancer(options.method, options.update_every)
    train_data, (inputs, targets) = make_data(4096), make_data(2048)

    def errors() -> dict[str, float]:
        with torch.no_grad():
            losses = model.losses(model.trunk(inputs), targets)
        variances = targets.var(dim=0)
        return {
            task: float((losses[task] / (SCALES[task] ** 2 * variances[k])).sqrt())
            for k, task in enumerate(TASKS)
        }

    before = errors()
    train(model, balancer, train_data, options.features)
    after = errors()
    for task, weight in balancer.get_weights().items():
        print(
            f"{task}  scale {SCALES[task]:.3f}  error {before[task]:.2f} -> {after[task]:.2f}  weight {weight:.4f}"
        )


if __name__ == "__main__":
    main()
