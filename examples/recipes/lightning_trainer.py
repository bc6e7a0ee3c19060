"""Lightning with automatic optimisation: the balancer is a submodule, and ``training_step`` returns what it gives.

Use it when Lightning runs the loop. One line changes, in ``training_step``:

    -loss = losses["distance"] + losses["angle"]
    +loss = self.balancer(losses, shared_params=self.trunk.parameters())

- As a submodule, the balancer follows the model to its device and its state is in every checkpoint.
- ``on_train_epoch_end`` calls ``end_epoch()``, which DWA needs. Save checkpoints with ``save_on_train_epoch_end=True``:
  where validation runs within the epoch, Lightning else saves before that hook, and a resumed DWA lacks an epoch.
- Learned weights (Uncertainty, IMTL-L) go to the optimizer in a group without weight decay.
- Reading weights waits for the device, so they are logged once an epoch.
- ``accumulate_grad_batches=N``: a call is a micro-batch, see amp_accumulation.py.

    python examples/recipes/lightning_trainer.py [--method gaba|uncertainty|dwa|pcgrad|upgrad] [--epochs 3]
        [--out FOLDER] [--resume FOLDER/last.ckpt]      # needs pytorch-lightning
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtlbalance import Balancer, DWALoss, GABALoss, PCGradLoss, UncertaintyLoss, UPGradLoss

METHODS: dict[str, type[Balancer]] = {
    "gaba": GABALoss,
    "uncertainty": UncertaintyLoss,
    "dwa": DWALoss,
    "pcgrad": PCGradLoss,
    "upgrad": UPGradLoss,
}
TASKS = ("distance", "angle")


class Model(pl.LightningModule):
    """A small trunk that both tasks share, a linear head for each, and the balancer."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})
        self.balancer = METHODS[method](TASKS)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the mean squared error of each task."""
        features = self.trunk(inputs)
        return {
            task: nn.functional.mse_loss(self.heads[task](features).squeeze(1), targets[:, k])
            for k, task in enumerate(TASKS)
        }

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the balanced loss; Lightning calls ``backward()`` on it."""
        losses = self.losses(*batch)
        self.log_dict({f"loss/{task}": loss for task, loss in losses.items()}, on_step=False, on_epoch=True)
        loss: Tensor = self.balancer(
            losses, shared_params=self.trunk.parameters()
        )  # the one line that changes
        return loss

    def on_train_epoch_end(self) -> None:
        """Close the epoch for methods that work by epoch, and log the weights applied last."""
        self.balancer.end_epoch()
        self.log_dict({f"weight/{task}": weight for task, weight in self.balancer.get_weights().items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Decay the model's parameters, never the balancer's; of most methods there are none."""
        groups: list[dict[str, Any]] = [{"params": [*self.trunk.parameters(), *self.heads.parameters()]}]
        groups += [{"params": self.balancer.parameters(), "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=5e-3)


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    """Return 50 batches; squared, one target is a hundred times the other.

    The samples are drawn at random, so their order stays as it is: a resumed run sees what the whole one saw.
    """
    inputs = torch.randn(50 * 64, 8, generator=torch.Generator().manual_seed(1))
    targets = torch.stack([inputs[:, 0] * inputs[:, 1], 0.1 * torch.sin(2 * inputs[:, 2])], dim=1)
    return DataLoader(TensorDataset(inputs, targets), batch_size=64)


def fit(method: str, epochs: int, folder: Path | None, resume: Path | None = None, **options: Any) -> Model:
    """Train, and return the model; ``options`` go to Lightning's trainer."""
    pl.seed_everything(0, verbose=False)
    model = Model(method)
    keep = [] if folder is None else [ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)]
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*keep],
        enable_checkpointing=folder is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, make_loader(), ckpt_path=resume)
    print("  ".join(f"{name} {value:.5f}" for name, value in sorted(trainer.callback_metrics.items())))
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Print the losses and weights of the last epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gaba")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder for checkpoints")
    parser.add_argument("--resume", type=Path, help="a checkpoint to continue from")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    fit(options.method, options.epochs, options.out, options.resume)


if __name__ == "__main__":
    main()
