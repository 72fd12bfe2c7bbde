"""Intervals of scores, against SciPy and published numbers."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # scikit-learn brings it

from kmerge_mlx.evaluation import intervals
from kmerge_mlx.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    mean_proportion_interval,
    wilson_interval,
)
from kmerge_mlx.evaluation.metrics import label_outcomes, macro_f1, perplexity

LABELS = ("a", "b")
EXACT = {"rel": 0, "abs": 1e-12}


# Newcombe 1998 (Stat. Med. 17, 857), table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(successes, n, low, high):
    interval = wilson_interval(successes, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    mirrored = wilson_interval(n - successes, n)
    assert (mirrored.low, mirrored.high) == pytest.approx(
        (1 - interval.high, 1 - interval.low), **EXACT
    )


@given(st.integers(1, 100_000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilsons_interval_is_scipys_and_holds_the_proportion(n, share, level):
    k = round(n * share)
    interval = wilson_interval(k, n, level)
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= interval.low <= k / n <= interval.high <= 1


def test_wilsons_interval_of_all_or_none_ends_exactly_there():
    assert all(wilson_interval(0, n).low == 0 for n in range(1, 300))
    assert all(wilson_interval(n, n).high == 1 for n in range(1, 300))


def test_the_interval_of_a_mean_of_two_is_newcombes_of_a_difference():
    # 56/70 - 48/80: 0.0524 to 0.3339 (method 10). A share's complement turns - into +.
    interval = mean_proportion_interval([56, 80 - 48], [70, 80])
    assert round(2 * interval.low - 1, 4) == 0.0524
    assert round(2 * interval.high - 1, 4) == 0.3339


def test_the_interval_of_a_mean_of_one_is_wilsons_and_a_label_without_answers_is_left_out():
    expected = wilson_interval(97, 100)
    for successes, totals in (([97], [100]), ([97, 0], [100, 0])):
        interval = mean_proportion_interval(successes, totals)
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_a_mean_stays_within_0_and_1():
    for share in (0, 1):
        interval = mean_proportion_interval(np.array([3, 5, 1]) * share, [3, 5, 1])
        assert 0 <= interval.low < interval.high <= 1


def share_held(truth: np.ndarray, totals: tuple[int, ...], seed: int) -> float:
    """How often the interval of a mean holds the mean of truths (draws, L)."""
    draws = np.random.default_rng(seed).binomial(totals, truth)
    mean = cache(lambda *successes: mean_proportion_interval(successes, totals))
    found = [mean(*successes) for successes in draws.tolist()]
    aim = truth.mean(axis=1)
    return np.mean([i.low <= t <= i.high for i, t in zip(found, aim, strict=True)])


@pytest.mark.parametrize("totals", [(50,), (25, 25)])
def test_intervals_of_proportions_hold_the_truth_as_often_as_they_say(totals):
    # Of a single truth it is a matter of luck which counts fall outside; hence the wide bounds.
    held = share_held(np.full((20_000, len(totals)), 0.97), totals, seed=0)
    assert 0.93 <= held <= 0.99


@pytest.mark.parametrize("totals", [(50,), (50, 50), (100, 20), (50, 50, 50)])
def test_intervals_of_proportions_near_1_hold_the_truth_as_often_as_they_say_on_average(totals):
    truth = np.random.default_rng(1).uniform(0.9, 1, (20_000, len(totals)))
    assert 0.93 <= share_held(truth, totals, seed=2) <= 0.97


def test_a_higher_level_is_a_wider_interval():
    x = np.random.default_rng(0).random(100)
    for interval in (
        lambda **level: wilson_interval(30, 50, **level),
        lambda **level: mean_proportion_interval([30, 40], [50, 50], **level),
        lambda **level: bootstrap_interval(x, lambda sums: sums / 100, **level),
    ):
        assert interval() == interval(level=0.95)
        assert interval(level=0.99).low < interval().low < interval().high
        assert interval().high < interval(level=0.99).high


@pytest.mark.parametrize(
    ("successes", "n", "level", "message"),
    [
        (0, 0, 0.95, "0 to as many as there are, at least 1"),
        (3, 2, 0.95, r"successes are \[3\] of \[2\]"),
        (-1, 2, 0.95, r"successes are \[-1\] of \[2\]"),
        (1, 2, 1, "level is 1, expected more than 0 and less than 1"),
    ],
)
def test_impossible_proportions_are_the_callers_bug(successes, n, level, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, n, level)
    with pytest.raises(ValueError, match=message if n else "no trials"):
        mean_proportion_interval([successes], [n], level)
    with pytest.raises(ValueError, match=r"successes are \[1, 1\] of \[0, 2\]"):
        mean_proportion_interval([1, 1], [0, 2])
    with pytest.raises(ValueError, match=r"successes are \(2,\), expected \(1,\) as totals"):
        mean_proportion_interval([1, 1], [2])


def test_the_bootstrap_is_scipys_but_for_the_drawing():
    rng = np.random.default_rng(0)
    nll, tokens = rng.gamma(2, 3, 80), rng.integers(1, 20, 80)
    ours = bootstrap_interval(
        np.stack([nll, tokens], axis=1),
        lambda sums: perplexity(sums[:, 0], sums[:, 1]),
        resamples=20_000,
    )
    theirs = stats.bootstrap(
        (nll, tokens),
        lambda n, t, axis: np.exp(n.sum(axis) / t.sum(axis)),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    # The ends of 20,000 resamples still scatter by 1% of the width or so.
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def test_the_bootstrap_resamples_examples_whole():
    # One number a resample however the terms of an example are shaped, and they stay together.
    x = np.random.default_rng(0).random(30)
    pairs = np.stack([x, 1 - x], axis=1)
    interval = bootstrap_interval(pairs, lambda sums: sums.sum(axis=1))
    assert (interval.low, interval.high) == pytest.approx((30, 30))


def test_the_bootstrap_draws_equal_examples_as_often_as_there_are():
    # The number of successes is binomial: 5 +- 2.2 of 100.
    rare = np.repeat([1.0, 0.0], [5, 95])
    ends = stats.binom(100, 0.05).ppf([0.025, 0.975])
    interval = bootstrap_interval(rare, lambda sums: sums)
    assert (interval.low, interval.high) == tuple(ends)


def test_a_label_that_a_resample_lacks_is_no_failure():
    answers, labels = ["a"] * 19 + ["b"], ("a", "b", "never")
    outcomes = label_outcomes(answers, answers, labels)
    counts, lacking = outcomes.sum(axis=0), outcomes[:19].sum(axis=0)
    # Without "b"; what never occurs counts as it does in the score itself.
    assert macro_f1(counts, resampled_from=counts) == macro_f1(counts) == 2 / 3
    assert macro_f1(lacking) == 1 / 3
    assert macro_f1(lacking, resampled_from=counts) == 1 / 2
    whole = partial(macro_f1, resampled_from=counts[..., :2])
    assert bootstrap_interval(outcomes[..., :2], whole) == Interval(1, 1)


def test_equal_calls_give_equal_intervals_in_any_chunk(monkeypatch):
    rng = np.random.default_rng(0)
    outcomes = label_outcomes(rng.choice(LABELS, 300), rng.choice(LABELS, 300), LABELS)
    interval = bootstrap_interval(outcomes, macro_f1)
    assert interval.low < macro_f1(outcomes.sum(axis=0)) < interval.high
    assert bootstrap_interval(outcomes, macro_f1) == interval
    monkeypatch.setattr(intervals, "AT_ONCE", 30)
    assert bootstrap_interval(outcomes, macro_f1) == interval
    assert bootstrap_interval(outcomes, macro_f1, seed=1) != interval


def test_a_last_digit_of_a_term_moves_an_interval_by_no_more():
    rng = np.random.default_rng(0)
    terms = np.stack([rng.integers(3, size=500) * 0.1, np.ones(500)], axis=1)

    def mean(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    moved = terms + rng.uniform(-1e-7, 1e-7, terms.shape) * [1, 0]
    interval, other = bootstrap_interval(terms, mean), bootstrap_interval(moved, mean)
    assert abs(interval.low - other.low) < 1e-7
    assert abs(interval.high - other.high) < 1e-7


def test_the_bootstrap_holds_few_weights_at_a_time():
    sizes = []

    def mean(sums: np.ndarray) -> np.ndarray:
        sizes.append(len(sums))
        return sums / 50_000

    bootstrap_interval(np.arange(50_000), mean, resamples=100)
    assert sum(sizes) == 100
    assert max(sizes) * 50_000 <= intervals.AT_ONCE


def test_an_infinite_perplexity_has_an_infinite_end():
    terms = np.array([[1e9, 1.0], [1.0, 1.0]])
    interval = bootstrap_interval(terms, lambda s: perplexity(s[:, 0], s[:, 1]))
    assert interval == Interval(np.exp(1.0), np.inf)
    hopeless = bootstrap_interval(
        terms + np.array([1e9, 0]), lambda s: perplexity(s[:, 0], s[:, 1])
    )
    assert hopeless == Interval(np.inf, np.inf)


def test_what_cannot_be_resampled_is_the_callers_bug():
    ones = np.ones(3)
    for terms in (np.ones(0), np.ones((3, 0)), np.float64(1), np.array([1, np.nan])):
        with pytest.raises(ValueError, match="expected finite numbers, at least one of each"):
            bootstrap_interval(terms, lambda sums: sums)
    with pytest.raises(ValueError, match="0 resamples"):
        bootstrap_interval(ones, lambda sums: sums, resamples=0)
    with pytest.raises(ValueError, match="level is 0"):
        bootstrap_interval(ones, lambda sums: sums, level=0)
    with pytest.raises(ValueError, match=r"the statistic is \(2000, 1\), expected \(2000,\)"):
        bootstrap_interval(ones, lambda sums: sums[:, None])
    with pytest.raises(ValueError, match="expected low <= high"):
        bootstrap_interval(ones, lambda sums: sums * np.nan)
