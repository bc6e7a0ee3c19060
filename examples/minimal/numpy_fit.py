"""The study's training cadence on one page of NumPy: fourteen stages in their order, for reading.

Three sensor readings and two tasks behind one small shared layer, the trunk: the remaining useful life in cycles
(squared error: large gradients) and whether the part is worn (cross-entropy: small gradients). All parameters
lie in one flat vector, the trunk's first. Where this tiny problem needs another constant, the study's is noted.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
HIDDEN = 8
TRUNK = 4 * HIDDEN  # three inputs and a bias; then each head has HIDDEN weights and a bias
SHARED = slice(0, TRUNK)


class GABA:
    """The controller: the larger a task's gradient on the shared parameters, the smaller its weight."""

    def __init__(self, beta: float = 0.99, warmup_steps: int = 100, min_weight: float = 0.05) -> None:
        self.beta, self.warmup_steps, self.min_weight = beta, warmup_steps, min_weight
        self.smoothed, self.calls = np.full(2, 0.5), 0

    def weigh(self, norms: Array) -> Array:
        """Return the weights to apply, given the norm of each task's gradient."""
        self.calls += 1
        if self.calls <= self.warmup_steps:
            return np.full(2, 0.5)
        self.smoothed = self.beta * self.smoothed + (1 - self.beta) * (1 - norms / norms.sum())
        floored = np.maximum(self.smoothed, self.min_weight)
        return np.asarray(floored / floored.sum())


def make_data(rng: np.random.Generator, samples: int) -> tuple[Array, Array]:
    """Return three sensor readings and a one for the bias (N, 4), and the targets (2, N): cycles, worn or not."""
    sensors = np.column_stack([rng.normal(size=(samples, 3)), np.ones(samples)])
    cycles = 60 - 25 * np.tanh(sensors @ [1, 0.5, 0, 0]) - 6 * sensors[:, 2] + 3 * rng.normal(size=samples)
    return sensors, np.stack([cycles, cycles < 50])


def forward(parameters: Array, sensors: Array) -> tuple[Array, Array]:
    """Return the shared features (N, 9) and the outputs (2, N): predicted cycles, probability of worn."""
    features = np.tanh(sensors @ parameters[SHARED].reshape(4, HIDDEN))
    features = np.column_stack([features, np.ones(len(features))])
    rul_cycles, worn_logit = parameters[TRUNK:].reshape(2, HIDDEN + 1) @ features.T
    return features, np.stack([rul_cycles, 1 / (1 + np.exp(-worn_logit))])


def task_losses(outputs: Array, targets: Array) -> Array:
    """Return mean squared error and mean cross-entropy, (2,)."""
    likelihood = np.clip(np.where(targets[1] == 1, outputs[1], 1 - outputs[1]), 1e-12, None)
    return np.array([np.mean((outputs[0] - targets[0]) ** 2), -np.mean(np.log(likelihood))])


def task_gradients(parameters: Array, sensors: Array, features: Array, errors: Array) -> Array:
    """Return the gradient of each task's loss on all parameters, by hand, (2, P): one trunk pass a task."""
    gradients = np.zeros((2, len(parameters)))
    for task, upstream in enumerate([2 * errors[0] / len(sensors), errors[1] / len(sensors)]):
        head = slice(TRUNK + task * (HIDDEN + 1), TRUNK + (task + 1) * (HIDDEN + 1))
        before_tanh = np.outer(upstream, parameters[head][:-1]) * (1 - features[:, :-1] ** 2)
        gradients[task, SHARED] = (sensors.T @ before_tanh).ravel()
        gradients[task, head] = features.T @ upstream  # the other task's head stays at zero
    return gradients


def fit(seed: int = 42, epochs: int = 150) -> dict[str, float]:
    """Train, print a line every tenth epoch, and return the test metrics of the best epoch."""
    rng = np.random.default_rng(seed)
    train, validation, test = (make_data(rng, samples) for samples in (1024, 256, 256))
    parameters = rng.normal(scale=0.5, size=TRUNK + 2 * (HIDDEN + 1))
    parameters[TRUNK + HIDDEN] = train[1][0].mean()  # the regression starts at the mean of its targets
    shadow = best_parameters = parameters
    momentum, variance, controller = np.zeros_like(parameters), np.zeros_like(parameters), GABA()
    base_lr, step = 0.02, 0  # study: 1e-3
    best_rmse, best_epoch, plateau_best, plateau_bad = np.inf, 0, np.inf, 0
    for epoch in range(epochs):
        # 1. learning-rate warm-up over ten epochs, from a tenth
        lr = base_lr * min(1.0, 0.1 + 0.9 * epoch / 10)
        # 2. weight decay halves late in training (study: once epoch > 100)
        weight_decay = 1e-4 if epoch <= 60 else 5e-5
        for batch in np.array_split(rng.permutation(len(train[0])), 16):
            # 3. fetch
            sensors, targets = train[0][batch], train[1][:, batch]
            # 4. forward
            features, outputs = forward(parameters, sensors)
            # 5. the tasks' own losses
            losses = task_losses(outputs, targets)
            # 6. balancer: the norm of each task's gradient on the shared parameters decides its weight
            gradients = task_gradients(parameters, sensors, features, outputs - targets)
            weights = controller.weigh(norms := np.linalg.norm(gradients[:, SHARED], axis=1))
            # 7. backward: the gradients that were measured, weighted and summed; nothing is derived twice
            gradient = weights @ gradients
            # 8. clip the joint norm at 1
            gradient /= max(1.0, float(np.linalg.norm(gradient)))
            # 9. AdamW: the decay acts on the parameters, not through the moments
            step += 1
            momentum, variance = 0.9 * momentum + 0.1 * gradient, 0.999 * variance + 0.001 * gradient**2
            update = (momentum / (1 - 0.9**step)) / (np.sqrt(variance / (1 - 0.999**step)) + 1e-8)
            parameters = parameters * (1 - lr * weight_decay) - lr * update
            # 10. weight average (study: .999, which lags too far behind for 16 steps an epoch)
            shadow = 0.98 * shadow + 0.02 * parameters
        # 11. evaluate the averaged weights
        rmse = task_losses(forward(shadow, validation[0])[1], validation[1])[0] ** 0.5
        # 12. plateau, only after warm-up: halve the learning rate (study: patience 30)
        if epoch >= 10:
            plateau_best, plateau_bad = min(plateau_best, rmse), 0 if rmse < plateau_best else plateau_bad + 1
            if plateau_bad > 8:
                base_lr, plateau_bad = max(base_lr / 2, 5e-6), 0
        # 13. best so far: keep it
        if rmse < best_rmse:
            best_rmse, best_epoch, best_parameters = rmse, epoch, shadow
        if epoch % 10 == 0:
            print(f"epoch {epoch:3d}  losses {losses.round(3)}  weights {weights.round(3)}", end="  ")
            print(f"norm ratio {norms[0] / norms[1]:.0f}  validation RMSE {rmse:.2f}")
        # 14. early stop, last (study: patience 80)
        if epoch - best_epoch >= 25:
            break
    (_, outputs), (rul_cycles, worn) = forward(best_parameters, test[0]), test[1]
    rmse, accuracy = np.mean((outputs[0] - rul_cycles) ** 2) ** 0.5, np.mean((outputs[1] > 0.5) == worn)
    constant_rmse = np.mean((rul_cycles - train[1][0].mean()) ** 2) ** 0.5
    majority = np.mean(worn == (train[1][1].mean() > 0.5))
    print(f"stopped after epoch {epoch}; best epoch {best_epoch}")
    print(f"test RMSE {rmse:.2f} cycles (predicting the mean: {constant_rmse:.2f}; the noise alone: 3)")
    print(f"test accuracy {accuracy:.3f} (predicting the larger class: {majority:.3f})")
    result = {"rmse": rmse, "constant_rmse": constant_rmse, "accuracy": accuracy, "majority": majority}
    return result | {"weight_rul": weights[0], "best_epoch": best_epoch, "epochs_run": epoch + 1}


if __name__ == "__main__":
    fit()
