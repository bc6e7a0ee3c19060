"""The study's whole training cadence on one page of NumPy: fourteen stages in their order, for reading.

Three sensor readings and two tasks behind one small shared layer: the remaining useful life in cycles
(squared error: large gradients) and whether the part is worn (cross-entropy: small gradients).
Every parameter lives in one flat vector, the shared ones first, so that each stage is a line or two.
The study's constants stand beside those that this tiny problem needs.

    python examples/minimal/numpy_fit.py
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HIDDEN = 8
# One row an input, and a last row for the bias.
SHAPES = {"trunk": (4, HIDDEN), "rul_head": (HIDDEN + 1,), "worn_head": (HIDDEN + 1,)}
SIZES = [int(np.prod(shape)) for shape in SHAPES.values()]
SHARED = slice(0, SIZES[0])  # what both tasks use: the trunk

STEPS_PER_EPOCH = 16


@dataclass
class GABA:
    """The controller: the larger a task's gradient on the shared parameters, the smaller its weight."""

    beta: float = 0.99
    warmup_steps: int = 100
    min_weight: float = 0.05
    smoothed: Array = field(default_factory=lambda: np.full(2, 0.5))
    calls: int = 0

    def weigh(self, norms: Array) -> Array:
        """Return the weights to apply, given the norm of each task's gradient."""
        self.calls += 1
        if self.calls <= self.warmup_steps:
            return np.full(len(norms), 1 / len(norms))
        total = norms.sum()
        raw = (total - norms) / ((len(norms) - 1) * total)
        self.smoothed = self.beta * self.smoothed + (1 - self.beta) * raw
        floored = np.maximum(self.smoothed, self.min_weight)
        weights: Array = floored / floored.sum()
        return weights


def make_data(rng: np.random.Generator, samples: int) -> tuple[Array, Array, Array]:
    """Return sensor readings (N, 3), remaining useful life in cycles (N,) and worn or not (N,)."""
    sensors = rng.normal(size=(samples, 3))
    rul_cycles = 60 - 25 * np.tanh(sensors[:, 0] + 0.5 * sensors[:, 1]) - 6 * sensors[:, 2]
    rul_cycles += 3 * rng.normal(size=samples)
    return sensors, rul_cycles, (rul_cycles < 50).astype(float)


def initial_parameters(rng: np.random.Generator, mean_rul_cycles: float) -> Array:
    """Return the flat parameter vector; the regression starts at the mean of its targets."""
    parameters = rng.normal(scale=0.5, size=sum(SIZES))
    parameters[SIZES[0] + HIDDEN] = mean_rul_cycles
    return parameters


def with_ones(columns: Array) -> Array:
    """Append a column of ones, which the last row of a weight turns into a bias."""
    return np.column_stack([columns, np.ones(len(columns))])


def forward(parameters: Array, sensors: Array) -> tuple[Array, Array, Array]:
    """Return the shared features (N, 9), the predicted cycles (N,) and the probability of worn (N,)."""
    trunk, rul_head, worn_head = np.split(parameters, np.cumsum(SIZES)[:-1])
    features = with_ones(np.tanh(with_ones(sensors) @ trunk.reshape(SHAPES["trunk"])))
    return features, features @ rul_head, 1 / (1 + np.exp(-features @ worn_head))


def task_losses(rul: Array, worn: Array, rul_target: Array, worn_target: Array) -> Array:
    """Return mean squared error and mean cross-entropy, (2,)."""
    likelihood = np.clip(np.where(worn_target == 1, worn, 1 - worn), 1e-12, None)
    return np.array([np.mean((rul - rul_target) ** 2), -np.mean(np.log(likelihood))])


def task_gradients(
    parameters: Array, sensors: Array, features: Array, rul_error: Array, worn_error: Array
) -> Array:
    """Return the gradient of each task's loss on all parameters, by hand, (2, P): one trunk pass a task."""
    _, rul_head, worn_head = np.split(parameters, np.cumsum(SIZES)[:-1])
    slope = 1 - features[:, :-1] ** 2  # of tanh
    no_gradient = np.zeros(HIDDEN + 1)

    def on_trunk(head: Array, upstream: Array) -> Array:
        return (with_ones(sensors).T @ (np.outer(upstream, head[:-1]) * slope)).ravel()

    d_rul, d_worn = 2 * rul_error / len(sensors), worn_error / len(sensors)
    return np.stack(
        [
            np.concatenate([on_trunk(rul_head, d_rul), features.T @ d_rul, no_gradient]),
            np.concatenate([on_trunk(worn_head, d_worn), no_gradient, features.T @ d_worn]),
        ]
    )


def evaluate(parameters: Array, data: tuple[Array, Array, Array]) -> tuple[float, float]:
    """Return the RMSE in cycles and the accuracy of worn or not."""
    sensors, rul_target, worn_target = data
    _, rul, worn = forward(parameters, sensors)
    return float(np.sqrt(np.mean((rul - rul_target) ** 2))), float(np.mean((worn > 0.5) == worn_target))


def fit(seed: int = 42, epochs: int = 150) -> dict[str, float]:
    """Train, print a line every tenth epoch, and return the test metrics of the best epoch."""
    rng = np.random.default_rng(seed)
    train, validation, test = (make_data(rng, samples) for samples in (1024, 256, 256))
    parameters = initial_parameters(rng, train[1].mean())
    shadow, best_parameters = parameters.copy(), parameters.copy()
    momentum, variance, controller = np.zeros_like(parameters), np.zeros_like(parameters), GABA()
    base_lr, step = 0.02, 0  # study: 1e-3
    best_rmse, best_epoch, bad_epochs, plateau_best, plateau_bad = np.inf, 0, 0, np.inf, 0
    print("epoch      lr  loss rul  loss worn   w_rul  w_worn  norm ratio  val RMSE (cycles)  val accuracy")

    for epoch in range(epochs):
        # 1. learning-rate warm-up over ten epochs, from a tenth
        lr = base_lr * min(1.0, 0.1 + 0.9 * epoch / 10)
        # 2. weight decay halves late in training (study: once epoch > 100)
        weight_decay = 1e-4 if epoch <= 60 else 5e-5
        epoch_losses = np.zeros(2)
        for batch in np.array_split(rng.permutation(len(train[0])), STEPS_PER_EPOCH):
            # 3. fetch
            sensors, rul_target, worn_target = (column[batch] for column in train)
            # 4. forward
            features, rul, worn = forward(parameters, sensors)
            # 5. the tasks' own losses
            epoch_losses += task_losses(rul, worn, rul_target, worn_target) / STEPS_PER_EPOCH
            # 6. balancer: the norm of each task's gradient on the shared parameters decides its weight
            gradients = task_gradients(parameters, sensors, features, rul - rul_target, worn - worn_target)
            norms = np.linalg.norm(gradients[:, SHARED], axis=1)
            weights = controller.weigh(norms)
            # 7. backward: the gradients that were measured, weighted and summed; nothing is derived twice
            gradient = weights @ gradients
            # 8. clip the joint norm at 1
            gradient = gradient / max(1.0, float(np.linalg.norm(gradient)))
            # 9. AdamW: the decay acts on the parameters, not through the moments
            step += 1
            momentum = 0.9 * momentum + 0.1 * gradient
            variance = 0.999 * variance + 0.001 * gradient**2
            update = (momentum / (1 - 0.9**step)) / (np.sqrt(variance / (1 - 0.999**step)) + 1e-8)
            parameters = parameters * (1 - lr * weight_decay) - lr * update
            # 10. weight average (study: .999, which lags too far behind for 16 steps an epoch)
            shadow = 0.98 * shadow + 0.02 * parameters

        # 11. evaluate the averaged weights
        rmse, accuracy = evaluate(shadow, validation)
        # 12. plateau, only after warm-up: halve the learning rate (study: patience 30)
        if epoch >= 10:
            plateau_bad = 0 if rmse < plateau_best else plateau_bad + 1
            plateau_best = min(plateau_best, rmse)
            if plateau_bad > 8:
                base_lr, plateau_bad = max(base_lr / 2, 5e-6), 0
        # 13. best so far: keep a copy
        if rmse < best_rmse:
            best_rmse, best_epoch, best_parameters, bad_epochs = rmse, epoch, shadow.copy(), 0
        else:
            bad_epochs += 1
        if epoch % 10 == 0:
            print(f"{epoch:5d}  {lr:.4f}  {epoch_losses[0]:8.2f}  {epoch_losses[1]:9.4f}", end="  ")
            print(f"{weights[0]:6.4f}  {weights[1]:6.4f}  {norms[0] / norms[1]:10.1f}", end="  ")
            print(f"{rmse:17.2f}  {accuracy:12.3f}")
        # 14. early stop, last (study: patience 80)
        if bad_epochs >= 25:
            break

    rmse, accuracy = evaluate(best_parameters, test)
    constant_rmse = float(np.sqrt(np.mean((test[1] - train[1].mean()) ** 2)))
    majority = float(np.mean(test[2] == (train[2].mean() > 0.5)))
    print(f"stopped after epoch {epoch}; best epoch {best_epoch}")
    print(f"test RMSE {rmse:.2f} cycles (predicting the mean: {constant_rmse:.2f}; the noise alone: 3)")
    print(f"test accuracy {accuracy:.3f} (predicting the larger class: {majority:.3f})")
    return {
        "rmse": rmse,
        "accuracy": accuracy,
        "constant_rmse": constant_rmse,
        "majority_accuracy": majority,
        "weight_rul": float(weights[0]),
        "best_epoch": best_epoch,
        "epochs_run": epoch + 1,
    }


if __name__ == "__main__":
    fit()
