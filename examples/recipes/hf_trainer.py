"""Hugging Face's Trainer: ``compute_loss`` returns what the balancer gives.

Use it when ``transformers.Trainer`` runs the loop. One line changes, in ``compute_loss``:

    -loss = losses["topic"] + losses["tone"]
    +loss = core.balancer(losses, shared_params=core.trunk.parameters())

- ``core = self.model`` is the model without wrappers; ``model``, the argument, does the forward pass.
- As a submodule the balancer's state is in every checkpoint. Keep it beside a pretrained model, as
  here, not inside: ``from_pretrained`` cannot load what is no parameter or buffer, such as its count of calls.
- ``gradient_accumulation_steps=N``: the Trainer divides the loss by N, unless it takes the loss for one that
  is divided by ``num_items_in_batch`` already, which these are not: ``model_accepts_loss_kwargs = False`` says so.
  A call is a micro-batch, see amp_accumulation.py; all micro-batches count alike, however many tokens they have.
- ``label_names`` keeps the labels in the batches, and has evaluation report the weighted loss, which moves no state.
- Learned weights (Uncertainty, IMTL-L) are kept out of the weight decay by ``get_decay_parameter_names``.
- Several processes: ``ddp_find_unused_parameters=False``, for DDP would take learned weights, which work outside the
  forward pass, for unused. Where labels may be missing on one rank it must be True: then keep the balancer outside.
- Methods that work by epoch (DWA) need the callback, and checkpoints by epoch, which are saved after it.

    python examples/recipes/hf_trainer.py [--method gaba|uncertainty|dwa|pcgrad|upgrad] [--accumulate 1]
        [--out FOLDER] [--resume]      # needs transformers and accelerate; downloads nothing
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from mtlbalance import Balancer, DWALoss, GABALoss, PCGradLoss, UncertaintyLoss, UPGradLoss

METHODS: dict[str, type[Balancer]] = {
    "gaba": GABALoss,
    "uncertainty": UncertaintyLoss,
    "dwa": DWALoss,
    "pcgrad": PCGradLoss,
    "upgrad": UPGradLoss,
}
TASKS = {"topic": 4, "tone": 1}  # the width of each head
VOCABULARY, LENGTH = 32, 12


class Model(nn.Module):
    """A tiny BERT that both tasks share, a linear head for each, and the balancer."""

    def __init__(self, method: str) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.trunk = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(32, width) for task, width in TASKS.items()})
        self.balancer = METHODS[method](tuple(TASKS))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the prediction of each task: topic (B, 4), tone (B, 1)."""
        features = self.trunk(input_ids=input_ids).last_hidden_state.mean(dim=1)
        return {task: head(features) for task, head in self.heads.items()}


class BalancedTrainer(Trainer):
    """A Trainer that balances the losses of the tasks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the losses are means over a micro-batch: divide by N

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, *_: Any, **__: Any
    ) -> Any:
        """Return the balanced loss, with the predictions where they are asked for."""
        outputs = model(inputs["input_ids"])
        losses = {
            "topic": nn.functional.cross_entropy(outputs["topic"], inputs["topic"]),
            "tone": nn.functional.mse_loss(outputs["tone"].squeeze(1), inputs["tone"]),
        }
        core: Any = self.model
        loss = core.balancer(losses, shared_params=core.trunk.parameters())  # the one line that changes
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave learned weights out of the weight decay."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.startswith("balancer.")]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the weights applied last beside the loss."""
        core: Any = self.model
        weights = {f"weight_{task}": weight for task, weight in core.balancer.get_weights().items()}
        super().log(logs | weights, *args, **kwargs)


class EndEpoch(TrainerCallback):
    """Close the epoch for methods that work by epoch."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Runs before a checkpoint of this epoch is saved."""
        model.balancer.end_epoch()


def make_data(samples: int = 2048) -> list[dict[str, Tensor]]:
    """Return token sequences with a topic (their most frequent quarter of the vocabulary) and a tone."""
    tokens = torch.randint(VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(1))
    topics = nn.functional.one_hot(tokens // (VOCABULARY // 4), 4).sum(dim=1).argmax(dim=1)
    tones = 10.0 * tokens.float().mean(dim=1) / VOCABULARY
    return [
        {"input_ids": ids, "topic": topic, "tone": tone}
        for ids, topic, tone in zip(tokens, topics, tones, strict=True)
    ]


def make_trainer(method: str, folder: str, **options: Any) -> BalancedTrainer:
    """Return a trainer for a fresh model; ``options`` go to ``TrainingArguments``."""
    set_seed(0)
    settings: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "logging_strategy": "epoch",
        "save_strategy": "epoch",
        "ddp_find_unused_parameters": False,
    }
    arguments = TrainingArguments(
        folder,
        label_names=list(TASKS),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings | options,
    )
    return BalancedTrainer(Model(method), arguments, train_dataset=make_data(), callbacks=[EndEpoch()])


def main(argv: Sequence[str] | None = None) -> None:
    """Train; the Trainer prints loss and weights after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gaba")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--out", help="a folder for checkpoints; default: a temporary one")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    with tempfile.TemporaryDirectory() as temporary:
        trainer = make_trainer(
            options.method, options.out or temporary, gradient_accumulation_steps=options.accumulate
        )
        trainer.train(resume_from_checkpoint=options.resume)


if __name__ == "__main__":
    main()
