"""What methods that combine task gradients prescribe, written out in float64 NumPy from the papers' formulas.

One object follows one balancer from call to call: ``step(jacobian, losses)`` takes the (K, P) gradients and the (K,)
losses of the present tasks, with their indices, and returns the shared gradient and each head's factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Prescribed = tuple[Array, Array]


class GradDrop:
    def __init__(self, count: int, leak: float | Sequence[float] = 0.0, seed: int = 0) -> None:
        self.leak, self.seed, self.calls = np.full(count, 1.0) * leak, seed, 0

    def uniform(self, size: int, dtype: torch.dtype) -> Array:
        """The draw that the docstring describes."""
        seed = int(np.random.SeedSequence([self.seed, self.calls]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(size, generator=generator, dtype=dtype).double().numpy()

    def step(
        self, jacobian: Array, losses: Array, present: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Prescribed:
        drawn = self.uniform(jacobian.shape[1], dtype)
        self.calls += 1
        total = np.abs(jacobian).sum(axis=0)
        purity = 0.5 * (1.0 + jacobian.sum(axis=0) / np.where(total > 0, total, 1.0))
        mask = (purity > drawn) * (jacobian > 0) + (purity < drawn) * (jacobian < 0)
        leak = self.leak[list(present), None]
        return ((leak + (1.0 - leak) * mask) * jacobian).sum(axis=0), np.ones(len(losses))


class TrimmedMean:
    def __init__(self, count: int, trim_fraction: float = 0.25) -> None:
        self.trim_fraction = trim_fraction

    def step(self, jacobian: Array, losses: Array, present: Sequence[int], **_: object) -> Prescribed:
        trim = int(self.trim_fraction * len(losses) + 1e-9)
        kept = np.sort(jacobian, axis=0)[trim : len(losses) - trim]
        return kept.mean(axis=0), np.ones(len(losses))


class ConFIG:
    def __init__(self, count: int) -> None:
        pass

    def step(self, jacobian: Array, losses: Array, present: Sequence[int], **_: object) -> Prescribed:
        norms = np.linalg.norm(jacobian, axis=1)
        units = jacobian[norms > 0] / norms[norms > 0, None]
        direction = np.linalg.pinv(units, rcond=1e-7) @ np.ones(len(units))
        length = np.linalg.norm(direction)
        if length < 1e-6:
            return np.zeros(jacobian.shape[1]), np.ones(len(losses))
        direction /= length
        return (jacobian @ direction).sum() * direction, np.ones(len(losses))


def project(point: Array) -> Array:
    """The nearest point of the simplex, by bisection on what is subtracted."""
    low, high = point.min() - 1.0, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(point - middle, 0, None).sum() > 1 else (low, middle)
    return np.clip(point - (low + high) / 2, 0, None)


class MoCo:
    def __init__(
        self,
        count: int,
        beta: float = 0.5,
        beta_decay: float = 0.5,
        gamma: float = 0.1,
        gamma_decay: float = 0.5,
        rho: float = 0.0,
        normalise: bool = False,
    ) -> None:
        self.beta, self.beta_decay, self.gamma, self.gamma_decay = beta, beta_decay, gamma, gamma_decay
        self.rho, self.normalise = rho, normalise
        self.weights, self.calls = np.full(count, 1.0 / count), np.zeros(count)
        self.tracked: dict[int, Array] = {}

    def step(self, jacobian: Array, losses: Array, present: Sequence[int], **_: object) -> Prescribed:
        for row, loss, task in zip(jacobian, losses, present, strict=True):
            self.calls[task] += 1
            if self.normalise:
                row = row * loss / max(np.linalg.norm(row), 1e-300)
            before = self.tracked.get(task, row)
            rate = self.beta / self.calls[task] ** self.beta_decay
            self.tracked[task] = before - rate * (before - row)
        tasks = list(present)
        rows = np.stack([self.tracked[task] for task in tasks])
        share = self.weights[tasks].sum()
        weights = self.weights[tasks] / share
        step = self.gamma / self.calls[tasks].max() ** self.gamma_decay
        weights = project(weights - step * (rows @ rows.T + self.rho * np.eye(len(tasks))) @ weights)
        self.weights[tasks] = share * weights
        self.applied = weights
        return weights @ rows, np.ones(len(losses))


class DBMTL:
    """The mean starts at 0, as the authors' does; only its length is then corrected."""

    def __init__(self, count: int, beta: float = 0.9, beta_decay: float = 0.0) -> None:
        self.beta, self.beta_decay = beta, beta_decay
        self.means: dict[int, Array] = {}
        self.shares, self.calls = np.zeros(count), np.zeros(count)

    def step(self, jacobian: Array, losses: Array, present: Sequence[int], **_: object) -> Prescribed:
        for row, loss, task in zip(jacobian, losses, present, strict=True):
            self.calls[task] += 1
            beta = self.beta / self.calls[task] ** self.beta_decay
            self.means[task] = beta * self.means.get(task, np.zeros_like(row)) + (1 - beta) * row / loss
            self.shares[task] = beta * self.shares[task] + 1 - beta
        rows = np.stack([self.means[task] / self.shares[task] for task in present])
        norms = np.linalg.norm(rows, axis=1)
        scale = np.where(norms > 0, norms.max() / np.where(norms > 0, norms, 1.0), 1.0)
        self.applied = scale / losses
        return scale @ rows, 1.0 / losses


PRESCRIPTIONS: dict[str, Callable[..., GradDrop | TrimmedMean | ConFIG | MoCo | DBMTL]] = {
    "graddrop": GradDrop,
    "trimmed-mean": TrimmedMean,
    "config": ConFIG,
    "moco": MoCo,
    "db-mtl": DBMTL,
}
