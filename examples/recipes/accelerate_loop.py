"""Accelerate in a plain loop: gradient accumulation, checkpoints, one process or several.

Use it when the loop is yours and Accelerate places it on devices. One line changes:

    -loss = losses["distance"] + losses["angle"]
    +loss = balancer(losses, shared_params=accelerator.unwrap_model(model).trunk.parameters())

- ``prepare`` takes model, optimizer and data, not the balancer: it agrees with the other processes by itself, and as
  a wrapped module it would lose its methods. ``balancer.to(accelerator.device)`` before its parameters are used.
- ``accelerator.backward`` divides by the number of micro-batches; a call is a micro-batch, see amp_accumulation.py.
- ``register_for_checkpointing(balancer)`` puts its state into ``save_state`` and ``load_state``.
- ``split_batches=True``: a batch is shared out to the processes, so that N processes train as one.
- Without GPUs say ``cpu=True`` and start with torchrun: else each of the processes trains alone, and none says so.

    python examples/recipes/accelerate_loop.py [--method gaba|uncertainty|pcgrad|upgrad] [--accumulate 2]
        [--out FOLDER] [--resume FOLDER]      # needs accelerate
    torchrun --nproc-per-node 2 examples/recipes/accelerate_loop.py      # on GPUs also: accelerate launch
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtlbalance import Balancer, GABALoss, PCGradLoss, UncertaintyLoss, UPGradLoss

METHODS: dict[str, type[Balancer]] = {
    "gaba": GABALoss,
    "uncertainty": UncertaintyLoss,
    "pcgrad": PCGradLoss,
    "upgrad": UPGradLoss,
}
TASKS = ("distance", "angle")


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


def make_loader(epoch: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return an epoch of 40 fresh batches; squared, one target is a hundred times the other."""
    inputs = torch.randn(40 * 64, 8, generator=torch.Generator().manual_seed(epoch))
    targets = torch.stack([inputs[:, 0] * inputs[:, 1], 0.1 * torch.sin(2 * inputs[:, 2])], dim=1)
    return DataLoader(TensorDataset(inputs, targets), batch_size=64)


def train(options: argparse.Namespace) -> None:
    """Train for two epochs, or resume after the first, and print each epoch's last losses and the weights."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=options.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    torch.manual_seed(0)
    core = Model()
    balancer = METHODS[options.method](TASKS).to(accelerator.device)
    groups: list[dict[str, Any]] = [{"params": core.parameters()}]
    groups += [{"params": balancer.parameters(), "weight_decay": 0.0}]  # none for most methods
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    model, optimizer = accelerator.prepare(core, optimizer)
    accelerator.register_for_checkpointing(balancer)
    if options.resume is not None:
        accelerator.load_state(options.resume)
    for epoch in range(0 if options.resume is None else 1, 2):
        for inputs, targets in accelerator.prepare_data_loader(make_loader(epoch)):
            with accelerator.accumulate(model):
                predictions = model(inputs)
                losses = {
                    task: nn.functional.mse_loss(predictions[task], targets[:, k])
                    for k, task in enumerate(TASKS)
                }
                shared = accelerator.unwrap_model(model).trunk.parameters()
                loss = balancer(losses, shared_params=shared)  # the one line that changes
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        balancer.end_epoch()
        mean_losses = accelerator.reduce(torch.stack([losses[task].detach() for task in TASKS]), "mean")
        for (task, weight), last in zip(balancer.get_weights().items(), mean_losses.tolist(), strict=True):
            accelerator.print(f"epoch {epoch}  {task:8}  loss {last:.6f}  weight {weight:.6f}")
        if options.out is not None and epoch == 0:
            accelerator.save_state(options.out)
    accelerator.print(f"{accelerator.num_processes} process(es)")
    if options.save is not None and accelerator.is_main_process:
        torch.save({"model": core.state_dict(), "balancer": balancer.state_dict()}, options.save)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, in one process or in those that a launcher has started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gaba")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--out", help="a folder for the state after the first epoch")
    parser.add_argument("--resume", help="such a folder, to continue from")
    parser.add_argument("--save", help="a file for what was trained")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    train(options)
    gc.collect()  # a wrapper that outlives its process group may abort the process at its end
    Accelerator().end_training()


if __name__ == "__main__":
    main()
