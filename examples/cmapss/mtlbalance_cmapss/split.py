"""Holding out training engines, each cut before its end as test engines are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import MULTI_CONDITION_SUBSETS, Subset
from .files import Floats, Trajectories

# A cut leaves at least this share of the life on record, and at most so much life to come: about the longest
# that NASA's test engines have.
MIN_FLOWN_SHARE = 0.2
MAX_RUL_CYCLES = 145
MAX_RUL_CYCLES_MULTI_CONDITION = 195


@dataclass(frozen=True)
class EngineSplit:
    """Training engines apart from held-out ones.

    Args:
        train: engines that ran to failure.
        held_out: other engines, each up to its cut.
        held_out_rul_cycles: the life left to each held-out engine at its cut.
    """

    train: Trajectories
    held_out: Trajectories
    held_out_rul_cycles: Floats


def draw_rul_at_cut(lives_cycles: Floats, subset: Subset, rng: np.random.Generator) -> Floats:
    """Draw how much life is left where each engine is cut.

    Uniform over the last four fifths of an engine's life, from one cycle left up to the subset's longest. The
    draws are stratified: each of N engines gets its own one of N equal slices of the law, in random order, so
    that a few engines cover it too and no seed is off by chance. Lives below 2 cycles give 0.

    Args:
        lives_cycles: (N,) how long each engine flew.
        subset: decides the longest life left.
        rng: shuffles the slices and draws within them.
    """
    longest = MAX_RUL_CYCLES_MULTI_CONDITION if subset in MULTI_CONDITION_SUBSETS else MAX_RUL_CYCLES
    high = np.minimum(np.floor((1 - MIN_FLOWN_SHARE) * lives_cycles), longest)
    low = np.minimum(1, high)
    num_engines = len(lives_cycles)
    share = (rng.permutation(num_engines) + rng.random(num_engines)) / num_engines
    return np.floor(low + (high - low + 1) * share)


def split_engines(train: Trajectories, subset: Subset, fraction: float, seed: int) -> EngineSplit:
    """Hold out a share of engines, picked and cut by ``seed`` alone (not by the run's seed).

    Args:
        train: engines that ran to failure.
        subset: decides the range of remaining lives at the cut.
        fraction: share of engines held out, in (0, 1); at least one engine stays on each side.
        seed: of the choice and of the cuts.
    """
    rng = np.random.default_rng(seed)
    lengths = train.lengths
    num_engines = len(lengths)
    num_held_out = min(max(1, round(fraction * num_engines)), num_engines - 1)
    is_held_out = np.zeros(num_engines, dtype=bool)
    is_held_out[rng.permutation(num_engines)[:num_held_out]] = True
    rul_at_cut = np.zeros(num_engines)
    rul_at_cut[is_held_out] = draw_rul_at_cut(lengths[is_held_out].astype(np.float64), subset, rng)
    engine_of_row = np.repeat(np.arange(num_engines), lengths)
    before_cut = train.cycle <= (lengths - rul_at_cut)[engine_of_row]
    held_out_row = is_held_out[engine_of_row]
    return EngineSplit(
        train=train.select(~held_out_row),
        held_out=train.select(held_out_row & before_cut),
        held_out_rul_cycles=rul_at_cut[is_held_out],
    )
