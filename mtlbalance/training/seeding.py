"""Random generators: seeding all of them, and reading and writing their states."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_determinism: Any = torch.utils.deterministic  # a module whose switches are properties, which mypy cannot see


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every accelerator)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of every global generator, as tensors, numbers and strings only."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, cached_gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words), cached_gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every global generator back; a device that this machine lacks is left out."""
    version, words, cached_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), cached_gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for index, generator_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator_state, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def reproducible(seed: int, *, deterministic: bool) -> Iterator[None]:
    """Run the body from ``seed``; afterwards give the process its generators and torch flags back.

    Args:
        seed: for every global generator.
        deterministic: ask torch for deterministic algorithms; an operation that has none warns instead of
            failing, so that any backbone can be trained.
    """
    generators = rng_state()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = _determinism.fill_uninitialized_memory
    was_benchmark, was_cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Filling every empty tensor with NaN finds bugs in operators, at a price in each step.
            _determinism.fill_uninitialized_memory = False
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        seed_everything(seed)
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        _determinism.fill_uninitialized_memory = was_filling
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = was_benchmark, was_cudnn
        set_rng_state(generators)
