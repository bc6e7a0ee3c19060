"""The numbers of a report: spread, ranks, and paired differences with intervals and exact p-values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
LEVEL = 0.05  # of significance
_MAX_EXACT_PAIRS = 22  # four million sign patterns
_NUM_RANDOM_PATTERNS = 99_999
_NUM_BOOTSTRAP = 9_999
_SEED = 0  # so that a report is the same each time


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1) of n values; no deviation for one value."""

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class PairedDifference:
    """What n paired differences say.

    Args:
        n: the pairs.
        mean: of the differences.
        low: of a bootstrap interval (95 %, bias-corrected and accelerated) of the mean; None for one pair.
        high: likewise.
        p_value: two-sided, of the sign-flip permutation test; None for one pair.
        exact: whether all 2^n sign patterns were counted.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    exact: bool


def summarise(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), std)


def mean_ranks(
    blocks: Sequence[Mapping[str, float]], levels: Sequence[str], mode: Literal["min", "max"]
) -> tuple[dict[str, float], int]:
    """Return each level's rank (1 is best, ties share theirs) averaged over blocks, and how many counted.

    Args:
        blocks: value by level; a block that lacks a level is left out, for ranks among fewer mean less.
        levels: those to rank.
        mode: whether small or large values are good.
    """
    from scipy.stats import rankdata

    sign = 1.0 if mode == "min" else -1.0
    complete = [[sign * block[level] for level in levels] for block in blocks if set(levels) <= block.keys()]
    if not complete or len(levels) < 2:
        return {}, 0
    ranks = rankdata(np.array(complete), axis=1).mean(axis=0)
    return dict(zip(levels, map(float, ranks), strict=True)), len(complete)


def paired_difference(differences: Sequence[float]) -> PairedDifference:
    """Describe differences of pairs: runs that share seed and data, and differ in the method.

    The test: if the two methods were alike, each difference would as likely have the other sign. The p-value
    is the share of all 2^n sign patterns whose mean is at least as far from zero. It is never below 2/2^n.
    """
    values = np.asarray(differences, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return PairedDifference(n, mean, None, None, None, exact=False)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # all alike: there is nothing to resample
        low = high = mean
    else:
        low, high = _bootstrap(values)
    exact = n <= _MAX_EXACT_PAIRS
    return PairedDifference(n, mean, low, high, _sign_flip(values, exact=exact), exact)


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    # Third powers are taken on the way, which of 1e110 are infinite; scaling by a power of two rounds nothing.
    _, exponent = np.frexp(np.abs(values).max())
    found = bootstrap(
        (np.ldexp(values, -exponent),), np.mean, n_resamples=_NUM_BOOTSTRAP, confidence_level=CONFIDENCE, method="BCa",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval  # fmt: skip
    return float(np.ldexp(found.low, exponent)), float(np.ldexp(found.high, exponent))


def _sign_flip(values: np.ndarray, *, exact: bool) -> float:
    if exact:  # SciPy's test gives the same, a hundred times slower at 20 pairs
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        # What is equal but for rounding counts as equal.
        limit = abs(values.sum()) - 1e-12 * np.abs(values).sum()
        return float(np.mean(np.abs(sums) >= limit))
    from scipy.stats import permutation_test

    found = permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=_NUM_RANDOM_PATTERNS,
        rng=np.random.default_rng(_SEED),
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several (Holm 1979): the chance of any false alarm is bounded.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = so_far
    return corrected


def smallest_p(n: int) -> float:
    """Return the smallest p-value that n paired differences can have."""
    return 2.0 / 2.0**n


def pairs_needed(num_comparisons: int = 1) -> int:
    """Return how many pairs can reach significance at all, corrected for so many comparisons.

    >>> pairs_needed(), pairs_needed(6)
    (6, 8)
    """
    return math.ceil(math.log2(2 * num_comparisons / LEVEL))
