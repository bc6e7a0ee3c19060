"""The process's random generators: left as they were, and seen when something draws from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mtlbalance.testing.expectations import expect


def _states() -> dict[str, object]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch's": torch.get_rng_state().tolist(),
        "NumPy's": (kind, np.asarray(keys).tolist(), *rest),
        "Python's": random.getstate(),
    }


@contextmanager
def kept_generators(seed: int) -> Iterator[None]:
    """Run the body from ``seed`` and give the generators (of the CPU) back as they were."""
    ours, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)


@contextmanager
def expect_no_draw(what: str) -> Iterator[None]:
    """Raise if the body draws from a global generator of the CPU."""
    before = _states()
    yield
    drawn = [name for name, state in _states().items() if state != before[name]]
    expect(
        not drawn,
        f"{what}: expected no use of global random generators; {' and '.join(drawn)} moved "
        "(draw from a torch.Generator of your own, made from a seed)",
    )
