"""A run in float64 equals the cadence written out in NumPy: network, gradients, AdamW, EMA, schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from mtlbalance.training import run_training

EPOCHS, BATCH, LR, START, WARMUP, DECAY, CLIP = 40, 16, 0.1, 0.1, 3, 0.9, 0.5
Arrays = dict[str, np.ndarray[Any, Any]]
A1, B1, A2, B2, A3, B3 = (
    "trunk.0.weight", "trunk.0.bias", "heads.level.weight", "heads.level.bias", "heads.kind.weight", "heads.kind.bias",
)  # fmt: skip


def forward(w: Arrays, x: Any) -> tuple[Any, Any, Any]:
    features = np.tanh(x @ w[A1].T + w[B1])
    return features, features @ w[A2][0] + w[B2][0], features @ w[A3].T + w[B3]


def losses_and_gradient(w: Arrays, x: Any, level: Any, kind: Any) -> tuple[float, float, Arrays]:
    """0.5·MSE + 0.5·cross-entropy and its gradient."""
    features, predicted, logits = forward(w, x)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    shares = odds / odds.sum(1, keepdims=True)
    hot = np.eye(3)[kind]
    mse, ce = float(((predicted - level) ** 2).mean()), float(-np.log((shares * hot).sum(1)).mean())
    d_level, d_logits = (predicted - level) / len(x), 0.5 * (shares - hot) / len(x)
    d_hidden = (np.outer(d_level, w[A2][0]) + d_logits @ w[A3]) * (1 - features**2)
    gradient = {
        A1: d_hidden.T @ x, B1: d_hidden.sum(0), A2: (d_level @ features)[None], B2: np.array([d_level.sum()]),
        A3: d_logits.T @ features, B3: d_logits.sum(0),
    }  # fmt: skip
    return mse, ce, gradient


def reference(
    w: Arrays, train: Any, validation: Any, *, patience: int, plateau_patience: int
) -> dict[str, Any]:
    """The cadence of the study, written out."""
    x, level, kind = train
    shadow = {name: value.copy() for name, value in w.items()}
    first, second = ({name: np.zeros_like(value) for name, value in w.items()} for _ in range(2))
    order = torch.Generator().manual_seed(3)
    lr, t, best, best_weights, best_epoch = LR, 0, math.inf, dict(w), -1
    plateau_best, bad_epochs, rows = math.inf, 0, []
    for epoch in range(EPOCHS):
        if epoch <= WARMUP:
            lr = LR * (START + (1 - START) * epoch / WARMUP)
        weight_decay = 0.02 if epoch > 5 else 0.2
        used, sums = lr, np.zeros(2)
        permutation = torch.randperm(len(x), generator=order).numpy()
        for begin in range(0, len(x), BATCH):
            rows_B = permutation[begin : begin + BATCH]
            mse, ce, gradient = losses_and_gradient(w, x[rows_B], level[rows_B], kind[rows_B])
            sums += np.array([mse, ce]) * len(rows_B)
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
            scale = min(1.0, CLIP / (norm + 1e-6))
            t += 1
            for name, g in gradient.items():
                g = g * scale
                w[name] *= 1 - lr * weight_decay
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                denominator = np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8
                w[name] -= lr * first[name] / (1 - 0.9**t) / denominator
                shadow[name] = DECAY * shadow[name] + (1 - DECAY) * w[name]
        rmse = math.sqrt(((forward(shadow, validation[0])[1] - validation[1]) ** 2).mean())
        if epoch >= WARMUP:
            if rmse < plateau_best * (1 - 1e-4):
                plateau_best, bad_epochs = rmse, 0
            else:
                bad_epochs += 1
            if bad_epochs > plateau_patience:
                lr, bad_epochs = max(lr * 0.5, 5e-6), 0
        if rmse < best:
            best, best_epoch = rmse, epoch
            best_weights = {name: value.copy() for name, value in shadow.items()}
        rows.append([used, weight_decay, *(sums / len(x)), rmse])
        if epoch - best_epoch >= patience:
            break
    return {"rows": np.array(rows), "best_epoch": best_epoch, "weights": best_weights}


def test_a_run_equals_the_cadence_in_numpy(
    configure: Any, plugin: Any, read_csv: Any, tmp_path: Path
) -> None:
    config = configure(
        "dataset.float64=true", "backbone.float64=true", "backbone.normalise=false", "backbone.dropout=0.0",
        "balancer.name=fixed", f"training.epochs={EPOCHS}", f"training.lr={LR}", f"training.warmup_epochs={WARMUP}",
        f"training.warmup_start={START}", f"training.ema_decay={DECAY}", f"training.grad_clip={CLIP}",
        "training.weight_decay=0.2", "training.weight_decay_late=0.02", "training.weight_decay_late_epoch=5",
        "training.patience=5", "training.scheduler_patience=1",
    )  # fmt: skip
    outcome = run_training(config, quiet=True)

    data = plugin.build_pairs(config.dataset.options)
    torch.manual_seed(3)
    net = plugin.Net(config.backbone.options)
    weights = {name: value.numpy().copy() for name, value in net.state_dict().items()}
    train, validation = (
        (part.inputs.numpy(), part.targets["level"].numpy(), part.targets["kind"].numpy())
        for part in (data.train, data.validation)
    )
    expected = reference(weights, train, validation, patience=5, plateau_patience=1)

    columns = ("lr", "weight_decay", "train_loss_level", "train_loss_kind", "level_rmse")
    rows = read_csv(outcome.run_dir / "metrics.csv")
    found = np.array([[float(row[column]) for column in columns] for row in rows])
    assert found.shape == expected["rows"].shape
    np.testing.assert_allclose(found[:, [0, 1, 4]], expected["rows"][:, [0, 1, 4]], rtol=1e-6)
    np.testing.assert_allclose(found[:, 2:4], expected["rows"][:, 2:4], rtol=1e-6)  # kept in float32
    assert outcome.results["best_epoch"] == expected["best_epoch"]
    assert 5 < len(rows) < EPOCHS  # the early stop took part
    assert len(set(found[WARMUP + 1 :, 0])) > 1  # so did the plateau schedule
    saved = safetensors.numpy.load_file(outcome.run_dir / "model.safetensors")
    assert saved.keys() == expected["weights"].keys()
    for name, value in saved.items():
        np.testing.assert_allclose(value, expected["weights"][name], rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("storage", ["memory", "items"])
def test_batches_cover_every_sample_once(configure: Any, plugin: Any, storage: str, read_csv: Any) -> None:
    config = configure(f"dataset.storage={storage}", "balancer.name=fixed", "training.lr=1e-30",
                       "training.scheduler_min_lr=0", "backbone.normalise=false", "backbone.dropout=0.0")  # fmt: skip
    rows = read_csv(run_training(config, quiet=True).run_dir / "metrics.csv")
    means = [float(row["train_loss_level"]) for row in rows]
    assert means == pytest.approx(
        [means[0]] * len(means), rel=1e-6
    )  # nothing moves: the mean over all samples stays
