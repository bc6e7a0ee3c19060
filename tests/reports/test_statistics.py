"""The statistics against SciPy, against counting by hand, and against what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlbalance.reports import statistics
from mtlbalance.reports.statistics import (
    holm,
    mean_ranks,
    paired_difference,
    pairs_needed,
    smallest_p,
    summarise,
)

Differences = st.lists(st.integers(-20, 20).map(lambda number: number / 4), min_size=2, max_size=9)


def counted_by_hand(differences: list[float]) -> float:
    """Two-sided p-value: the share of sign patterns whose sum is at least as far from zero (exact in quarters)."""
    observed = abs(sum(differences))
    patterns = list(itertools.product([1, -1], repeat=len(differences)))
    far = [p for p in patterns if abs(sum(s * d for s, d in zip(p, differences, strict=True))) >= observed]
    return len(far) / len(patterns)


@given(Differences)
@settings(max_examples=60)
def test_the_sign_flip_test_counts_all_patterns(differences: list[float]) -> None:
    found = paired_difference(differences)
    assert found.exact
    assert found.p_value == pytest.approx(counted_by_hand(differences), abs=1e-12)
    assert found.p_value >= smallest_p(len(differences)) - 1e-12


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_the_sign_flip_test_is_scipys(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.4, 1.0, n)
    scipys = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert paired_difference(list(differences)).p_value == pytest.approx(scipys.pvalue, abs=1e-12)


def test_five_pairs_cannot_go_below_a_sixteenth() -> None:
    assert paired_difference([1.0, 2.0, 3.0, 4.0, 5.0]).p_value == smallest_p(5) == 0.0625
    assert paired_difference([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p_value == smallest_p(6) == 0.03125
    # By hand: of 8 sign patterns of 1, 2, -4, sums at least 1 away from zero are all 8 (7, 3, 5, 1, and negated).
    assert paired_difference([1.0, 2.0, -4.0]).p_value == 1.0
    assert paired_difference([3.0, 4.0, -1.0]).p_value == 0.5  # +-8 and +-6 of +-8, +-6, +-2, +-0


def test_rounding_does_not_break_ties() -> None:
    assert 0.1 + 0.2 - 0.3 != 0  # in floats; and 0.1 * 3 is not 0.3
    assert paired_difference([0.1, 0.2, -0.3]).p_value == 1.0
    assert paired_difference([0.1 * 3, 0.3, 0.3]).p_value == 0.25


def test_many_pairs_are_sampled() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1.0, 40)
    found = paired_difference(list(differences))
    assert not found.exact
    assert found.p_value is not None
    exact_in_the_limit = scipy.stats.ttest_1samp(differences, 0.0).pvalue
    assert found.p_value == pytest.approx(exact_in_the_limit, abs=0.01)
    assert found == paired_difference(list(differences))


def test_twenty_pairs_are_exact_and_like_the_t_test() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1.0, 20)
    found = paired_difference(list(differences))
    assert found.exact
    assert found.p_value == pytest.approx(scipy.stats.ttest_1samp(differences, 0.0).pvalue, abs=0.01)


def test_the_interval_holds_the_mean_about_as_often_as_the_report_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "_NUM_BOOTSTRAP", 399)
    rng = np.random.default_rng(3)
    found = [paired_difference(list(rng.normal(1.0, 2.0, 5))) for _ in range(300)]
    held = np.mean([item.low <= 1.0 <= item.high for item in found if item.low is not None and item.high])
    assert 0.78 < held < 0.90  # the report says 84 %, not 95 %


def test_an_interval_lies_around_the_mean_and_is_the_same_again() -> None:
    differences = [0.3, -0.1, 0.7, 0.4, 0.2, 0.6]
    found = paired_difference(differences)
    assert found.low is not None
    assert found.high is not None
    assert min(differences) <= found.low < found.mean < found.high <= max(differences)
    assert found == paired_difference(differences)
    # As wide as normal theory has it, within a third: 2 x 1.96 standard errors.
    width = 2 * 1.96 * float(np.std(differences, ddof=1)) / math.sqrt(6)
    assert found.high - found.low == pytest.approx(width, rel=0.34)


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**366])
def test_the_interval_has_the_scale_of_the_differences(scale: float) -> None:
    differences = [0.3, -0.1, 0.7, 0.4, 0.2, 0.6]
    ordinary, found = (
        paired_difference(differences),
        paired_difference([scale * value for value in differences]),
    )
    assert found.low is not None
    assert found.high is not None
    assert (found.low / scale, found.high / scale) == (ordinary.low, ordinary.high)


def test_the_interval_is_that_of_an_independent_bca() -> None:
    """Efron 1987: bias from the share of resampled means below, acceleration from the jackknife."""
    values = np.random.default_rng(5).exponential(1.0, 12)
    n, mean = len(values), values.mean()
    resampled = values[np.random.default_rng(6).integers(0, n, (100_000, n))].mean(axis=1)
    below = (np.mean(resampled < mean) + np.mean(resampled <= mean)) / 2
    bias = scipy.stats.norm.ppf(below)
    jackknife = np.array([np.delete(values, index).mean() for index in range(n)])
    away = jackknife.mean() - jackknife
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    ends = []
    for tail in (0.025, 0.975):
        z = bias + scipy.stats.norm.ppf(tail)
        ends.append(np.quantile(resampled, scipy.stats.norm.cdf(bias + z / (1 - acceleration * z))))
    found = paired_difference(list(values))
    assert found.low is not None
    assert found.high is not None
    width = ends[1] - ends[0]
    assert (found.low, found.high) == (
        pytest.approx(ends[0], abs=0.04 * width),
        pytest.approx(ends[1], abs=0.04 * width),
    )


def test_too_few_or_equal_differences() -> None:
    alone = paired_difference([2.5])
    assert (alone.n, alone.mean, alone.low, alone.p_value) == (1, 2.5, None, None)
    equal = paired_difference([2.5, 2.5, 2.5])
    assert (equal.low, equal.high, equal.p_value) == (2.5, 2.5, 0.25)
    zero = paired_difference([0.0, 0.0])
    assert (zero.low, zero.high, zero.p_value) == (0.0, 0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_a_step_down_bonferroni(p_values: list[float]) -> None:
    found = holm(p_values)
    m = len(p_values)
    for index, p in enumerate(p_values):
        # Independently: the largest (m - rank) p over all that are not larger, ties in the order given.
        below = sorted(range(m), key=lambda i: (p_values[i], i))
        expected = max(
            min(1.0, (m - rank) * p_values[i])
            for rank, i in enumerate(below)
            if below.index(i) <= below.index(index)
        )
        assert found[index] == pytest.approx(expected)
        assert p <= found[index] <= min(1.0, m * p) + 1e-12


def test_holm_by_hand() -> None:
    # Holm 1979's procedure on .01, .04, .03, .005: x4, x3, x2, x1 in order of size, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_how_many_pairs_are_needed() -> None:
    for comparisons in range(1, 40):
        n = pairs_needed(comparisons)
        assert smallest_p(n) * comparisons <= 0.05 < smallest_p(n - 1) * comparisons


def test_summaries_and_ranks_by_hand() -> None:
    assert (summarise([4.0]).mean, summarise([4.0]).std) == (4.0, None)
    found = summarise([2.0, 4.0, 9.0])
    assert (found.n, found.mean, found.std) == (3, 5.0, pytest.approx(math.sqrt(13.0)))
    blocks = [{"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 5.0, "b": 5.0, "c": 4.0}, {"a": 0.0, "b": 9.0}]
    assert mean_ranks(blocks, ["a", "b", "c"], "min") == ({"a": 1.75, "b": 2.25, "c": 2.0}, 2)
    assert mean_ranks(blocks, ["a", "b", "c"], "max") == ({"a": 2.25, "b": 1.75, "c": 2.0}, 2)
    assert mean_ranks(blocks[2:], ["a", "b", "c"], "min") == ({}, 0)
