"""A balancer in a plain PyTorch loop: no config, no plugins, one changed line.

Use it when the loop is yours and fits on one device in full precision.

    -loss = losses["distance"] + losses["angle"]
    +loss = balancer(losses, shared_params=model.trunk.parameters())

Two regression tasks share a trunk: a distance in metres (spread about 0.7) and an angle in radians (spread
about 0.07), so that one squared error is a hundred times the other. The loop runs once with the plain sum of
the losses and once balanced, on the same data, initial weights and batches, for each seed.

    python examples/recipes/own_loop.py [--method gaba|uncertainty|pcgrad|upgrad] [--seeds 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlbalance import Balancer, GABALoss, PCGradLoss, UncertaintyLoss, UPGradLoss

METHODS: dict[str, type[Balancer]] = {
    "gaba": GABALoss,
    "uncertainty": UncertaintyLoss,
    "pcgrad": PCGradLoss,
    "upgrad": UPGradLoss,
}
TASKS = ("distance", "angle")
STEPS, BATCH_SIZE = 500, 64


class Model(nn.Module):
    """A small trunk that both tasks share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return a prediction (B,) for each task."""
        features = self.trunk(inputs)
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


def make_data(mix: Tensor, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return inputs (N, 10) and a target (N,) for each task; a tenth of a target's scale is noise."""
    inputs = torch.randn(samples, 10)
    waves = torch.sin(2 * inputs @ mix) + 0.1 * torch.randn(samples, 2)
    return inputs, {"distance": waves[:, 0], "angle": 0.1 * waves[:, 1]}


def train(seed: int, balancer: Balancer | None) -> tuple[dict[str, float], dict[str, float]]:
    """Return each task's test error, relative to the error of predicting the mean, and its last weight."""
    torch.manual_seed(seed)
    mix = torch.randn(10, 2) / 10**0.5
    (inputs, targets), (test_inputs, test_targets) = make_data(mix, 1024), make_data(mix, 1024)
    model = Model()
    learned = [] if balancer is None else list(balancer.parameters())  # of Uncertainty and IMTL-L; else empty
    optimizer = torch.optim.Adam([*model.parameters(), *learned], lr=5e-3)

    for _ in range(STEPS):
        batch = torch.randint(len(inputs), (BATCH_SIZE,))
        predictions = model(inputs[batch])
        losses = {task: nn.functional.mse_loss(predictions[task], targets[task][batch]) for task in TASKS}
        if balancer is not None:
            loss = balancer(losses, shared_params=model.trunk.parameters())  # the one line that changes
        else:
            loss = losses["distance"] + losses["angle"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        predictions = model(test_inputs)
        errors = {
            task: float((predictions[task] - target).square().mean().sqrt() / target.std())
            for task, target in test_targets.items()
        }
    return errors, balancer.get_weights() if balancer is not None else dict.fromkeys(TASKS, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tasks' errors and weights under the plain sum and balanced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gaba")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # tensors this small only wait for more
    method = METHODS[options.method]
    print("test error as a fraction of predicting the mean (1.00: nothing learned; about 0.14: the noise)")
    print("seed  method       distance  angle   weight distance  weight angle")
    mean_errors: dict[str, list[float]] = {}
    for name in ("plain sum", method.method):
        runs = []
        for seed in range(options.seeds):
            errors, weights = train(seed, None if name == "plain sum" else method(TASKS))
            runs.append([errors[task] for task in TASKS])
            print(f"{seed:4d}  {name:11}  {errors['distance']:8.2f}  {errors['angle']:5.2f}", end="  ")
            print(f"{weights['distance']:16.3f}  {weights['angle']:12.3f}")
        mean_errors[name] = torch.tensor(runs).mean(dim=0).tolist()
    plain, balanced = mean_errors["plain sum"], mean_errors[method.method]
    for task, before, after in zip(TASKS, plain, balanced, strict=True):
        change = 100 * (after / before - 1)
        print(f"mean error of {task}: plain sum {before:.3f}, {method.method} {after:.3f} ({change:+.0f} %)")


if __name__ == "__main__":
    main()
