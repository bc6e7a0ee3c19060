"""DistributedDataParallel under torchrun: N processes weigh and train as one process on the whole batch would.

Use it when the loop is yours and runs on several devices. One line changes:

    -loss = losses["distance"] + losses["angle"]
    +loss = balancer(losses, shared_params=core.trunk.parameters())

- The forward pass goes through the wrapper, ``shared_params`` come from the module inside it.
- The balancer stays outside the wrapper: it agrees with the other ranks by itself, learned weights included.
- ``loss`` is this rank's own number; weights and gradients are those of all ranks.
- Where a rank may lack a task's labels, pass the empty loss of no samples (``loss[mask]``), or leave the task out and
  build the wrapper with ``find_unused_parameters=True``. ``static_graph=True`` is refused.

    torchrun --nproc-per-node 2 examples/recipes/ddp_torchrun.py [--method gaba|uncertainty|pcgrad|upgrad] [--steps 150]
    python examples/recipes/ddp_torchrun.py      # one process on the same batches: the same numbers
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtlbalance import Balancer, GABALoss, PCGradLoss, UncertaintyLoss, UPGradLoss

METHODS: dict[str, type[Balancer]] = {
    "gaba": GABALoss,
    "uncertainty": UncertaintyLoss,
    "pcgrad": PCGradLoss,
    "upgrad": UPGradLoss,
}
TASKS = ("distance", "angle")
BATCH_SIZE = 64


class Model(nn.Module):
    """A small trunk that both tasks share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return a prediction (B,) for each task."""
        features = self.trunk(inputs)
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


def batches(steps: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield this rank's part of every batch; squared, one target is a hundred times the other."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        whole = torch.randn(BATCH_SIZE, 8, generator=generator)
        inputs = whole.chunk(world_size)[rank]
        yield inputs, {"distance": inputs[:, 0] * inputs[:, 1], "angle": 0.1 * torch.sin(2 * inputs[:, 2])}


def train(method: str, steps: int, rank: int, world_size: int) -> tuple[Model, Balancer, Tensor]:
    """Return the trained model, its balancer, and the losses (steps, tasks) averaged over ranks."""
    torch.manual_seed(0)
    core = Model()
    model = DistributedDataParallel(core) if world_size > 1 else core
    balancer = METHODS[method](TASKS)
    groups: list[dict[str, Any]] = [{"params": core.parameters()}]
    groups += [{"params": balancer.parameters(), "weight_decay": 0.0}]  # none for most methods
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    history = torch.zeros(steps, len(TASKS))
    for step, (inputs, targets) in enumerate(batches(steps, rank, world_size)):
        predictions = model(inputs)
        losses = {task: nn.functional.mse_loss(predictions[task], targets[task]) for task in TASKS}
        loss = balancer(losses, shared_params=core.trunk.parameters())  # the one line that changes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history[step] = torch.stack([losses[task].detach() for task in TASKS])
    if world_size > 1:
        dist.all_reduce(history)
    return core, balancer, history / world_size


def same_everywhere(numbers: Tensor) -> bool:
    """Return whether all ranks hold exactly these numbers."""
    smallest, largest = numbers.clone(), numbers.clone()
    if dist.is_initialized():
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return torch.equal(smallest, largest)


def main(argv: Sequence[str] | None = None) -> None:
    """Train; rank 0 prints losses and weights, and whether all ranks hold the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gaba")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, help="where rank 0 saves the model and the balancer")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    rank, world_size = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")  # "nccl" for one GPU a process
        rank, world_size = dist.get_rank(), dist.get_world_size()
    core, balancer, history = train(options.method, options.steps, rank, world_size)
    learned = torch.cat([parameter.detach().flatten() for parameter in core.parameters()])
    same = same_everywhere(torch.cat([learned, balancer.applied_weights]))
    if rank == 0:
        first, last = history[0], history[-20:].mean(dim=0)
        for k, (task, weight) in enumerate(balancer.get_weights().items()):
            print(f"{task:8}  loss {first[k]:.5f} -> {last[k]:.5f}  weight {weight:.4f}")
        print(f"{world_size} process(es); the same on every rank: {same}")
        if options.out is not None:
            torch.save({"model": core.state_dict(), "balancer": balancer.state_dict()}, options.out)
    if world_size > 1:
        gc.collect()  # a wrapper that outlives its process group may abort the process at its end
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
