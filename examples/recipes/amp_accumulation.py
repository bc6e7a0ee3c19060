"""Mixed precision, gradient accumulation and clipping in a plain loop.

Use it when a batch does not fit into memory, or float16 or bfloat16 makes it faster. One line changes:

    -    loss = losses["distance"] + losses["angle"]
    +    loss = balancer(losses, shared_params=model.trunk.parameters())
         scaler.scale(loss / MICRO_BATCHES).backward()

A call of the balancer is a micro-batch, and everything it counts, it counts in calls:

- ``update_every=MICRO_BATCHES`` measures on the first micro-batch of a step and keeps its weights for the others, so
  that one step has one set of weights, at K + N − 1 passes through the trunk instead of K·N. Without it, weights
  follow every micro-batch. ``warmup_steps`` is then a multiple of N, or measuring falls in mid-step.
- GABA's ``beta`` to the power 1/N smooths as much a step as ``beta`` does without accumulation.
- Gradients of a micro-batch are noisier than those of the whole batch, and surgery on each is not surgery on their sum.
- float16: the probes have a scale of their own, and the GradScaler never sees them. Clip after ``unscale_``.

    python examples/recipes/amp_accumulation.py [--method gaba|uncertainty|pcgrad] [--dtype float16|bfloat16|float32]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlbalance import Balancer, GABALoss, PCGradLoss, UncertaintyLoss

TASKS = ("distance", "angle")
STEPS, MICRO_BATCHES, MICRO_BATCH_SIZE = 120, 4, 32


class Model(nn.Module):
    """A small trunk that both tasks share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})

    def losses(self, inputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean squared error of each task."""
        features = self.trunk(inputs)
        return {
            task: nn.functional.mse_loss(head(features).squeeze(1), targets[task])
            for task, head in self.heads.items()
        }


def make_data(samples: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return inputs (N, 8) and a target (N,) for each task; squared, one is a hundred times the other."""
    inputs = torch.randn(samples, 8)
    return inputs, {"distance": inputs[:, 0] * inputs[:, 1], "angle": 0.1 * torch.sin(2 * inputs[:, 2])}


def make_balancer(method: str) -> Balancer:
    """Return a balancer whose counts are in micro-batches."""
    if method == "uncertainty":
        return UncertaintyLoss(TASKS)
    if method == "pcgrad":
        return PCGradLoss(TASKS, update_every=MICRO_BATCHES)
    smoothing = 0.97 ** (1 / MICRO_BATCHES)
    return GABALoss(TASKS, beta=smoothing, warmup_steps=10 * MICRO_BATCHES, update_every=MICRO_BATCHES)


def train(
    model: Model, balancer: Balancer, inputs: Tensor, targets: dict[str, Tensor], dtype: torch.dtype
) -> int:
    """Make one pass over the data; return how many steps the GradScaler skipped."""
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    groups: list[dict[str, Any]] = [{"params": model.parameters()}]
    groups += [{"params": balancer.parameters(), "weight_decay": 0.0}]  # none for most methods
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    skipped = 0
    for step in torch.split(torch.arange(len(inputs)), MICRO_BATCHES * MICRO_BATCH_SIZE):
        for micro_batch in torch.split(step, MICRO_BATCH_SIZE):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                losses = model.losses(
                    inputs[micro_batch], {task: targets[task][micro_batch] for task in TASKS}
                )
            loss = balancer(losses, shared_params=model.trunk.parameters())  # the one line that changes
            scaler.scale(loss / MICRO_BATCHES).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
    return skipped


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tasks' losses before and after, the weights, and what overflowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=("gaba", "uncertainty", "pcgrad"), default="gaba")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    torch.manual_seed(0)
    inputs, targets = make_data(STEPS * MICRO_BATCHES * MICRO_BATCH_SIZE)
    model, balancer = Model(), make_balancer(options.method)

    def show(when: str) -> None:
        with torch.no_grad():
            losses = model.losses(inputs, targets)
        print(f"{when:7}" + "".join(f"  {task} {loss.item():.5f}" for task, loss in losses.items()))

    show("before")
    skipped = train(model, balancer, inputs, targets, getattr(torch, options.dtype))
    show("after")
    print("weights" + "".join(f"  {task} {weight:.3f}" for task, weight in balancer.get_weights().items()))
    print(f"skipped {skipped} of {STEPS} steps; {balancer.num_nonfinite} calls not finite")


if __name__ == "__main__":
    main()
