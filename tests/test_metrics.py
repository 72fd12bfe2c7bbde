"""Scores and their intervals, against scikit-learn, RapidFuzz, SciPy and published numbers."""

from __future__ import annotations

import time
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from scipy import stats  # scikit-learn brings it
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from kmerge_mlx.evaluation import intervals
from kmerge_mlx.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    mean_proportion_interval,
    wilson_interval,
)
from kmerge_mlx.evaluation.metrics import (
    ANSWERED,
    PREDICTED,
    RIGHT,
    accuracy,
    balanced_accuracy,
    edit_similarity,
    exact_matches,
    f1,
    label_outcomes,
    macro_f1,
    majority_accuracy,
    majority_balanced_accuracy,
    perplexity,
)

EXACT = {"rel": 0, "abs": 1e-12}
LABELS = ("a", "b")
# About a single label, and a prediction that is no answer.
SCIKIT_LEARN_WONDERS = pytest.mark.filterwarnings("ignore:A single label", "ignore:y_pred contains")


def random_labels(rng: np.random.Generator) -> tuple[list[str], list[str], list[str]]:
    """Answers, predictions and 2 to 6 labels, unbalanced; some labels occur in neither."""
    labels = [f"label {i}" for i in range(rng.integers(2, 7))]
    n = int(rng.integers(1, 201))
    words = [*labels, "", "else"][: len(labels) + int(rng.integers(3))]
    rare = 10.0 ** rng.uniform(-1.5, 1)  # of the Dirichlet: from one label only to all alike
    answers = rng.choice(labels, n, p=rng.dirichlet([rare] * len(labels))).tolist()
    guesses = rng.choice(words, n, p=rng.dirichlet([rare] * len(words)))
    knows = rng.random(n) < rng.random()
    return answers, np.where(knows, answers, guesses).tolist(), labels


def counts_of(answers, predictions, labels=LABELS) -> np.ndarray:
    return label_outcomes(answers, predictions, labels).sum(axis=0)


@SCIKIT_LEARN_WONDERS
def test_scores_of_labels_are_scikit_learns():
    rng = np.random.default_rng(0)
    kinds = {"a label that is no answer": 0, "a prediction that is no label": 0, "binary": 0}
    for _ in range(1_000):
        answers, predictions, labels = random_labels(rng)
        counts = counts_of(answers, predictions, labels)
        assert accuracy(counts) == pytest.approx(accuracy_score(answers, predictions), **EXACT)
        balanced = balanced_accuracy_score(answers, predictions)
        assert balanced_accuracy(counts) == pytest.approx(balanced, **EXACT)
        macro = f1_score(answers, predictions, labels=labels, average="macro", zero_division=0)
        assert macro_f1(counts) == pytest.approx(macro, **EXACT)
        positive = int(rng.integers(len(labels)))
        # scikit-learn's binary F1 is only for two labels that both occur, and no other word.
        if set(answers) | set(predictions) == set(labels) and len(labels) == 2:
            how = {"pos_label": labels[positive]}
            kinds["binary"] += 1
        else:
            how = {"labels": labels[positive : positive + 1], "average": "macro"}
        positives = f1_score(answers, predictions, **how, zero_division=0)
        assert f1(counts)[positive] == pytest.approx(positives, **EXACT)
        kinds["a label that is no answer"] += bool(set(labels) - set(answers))
        kinds["a prediction that is no label"] += bool(set(predictions) - set(labels))
    assert min(kinds.values()) > 50


@SCIKIT_LEARN_WONDERS
def test_the_majority_baseline_is_scikit_learns():
    rng = np.random.default_rng(1)
    for _ in range(200):
        answers, _, labels = random_labels(rng)
        dummy = DummyClassifier(strategy="most_frequent").fit(answers, answers)
        always = dummy.predict(answers).tolist()
        counts = counts_of(answers, ["never looked at"] * len(answers), labels)
        expected = accuracy_score(answers, always)
        assert majority_accuracy(counts) == pytest.approx(expected, **EXACT)
        expected = balanced_accuracy_score(answers, always)
        assert majority_balanced_accuracy(counts) == pytest.approx(expected, **EXACT)


def test_a_prediction_that_is_no_label_is_wrong_and_nobodys():
    outcomes = label_outcomes(["a", "b", "b"], ["A", "b", ""], LABELS)
    assert outcomes.shape == (3, 3, 2)
    assert outcomes.dtype == bool
    counts = outcomes.sum(axis=0)
    assert counts[RIGHT].tolist() == [0, 1]
    assert counts[ANSWERED].tolist() == [1, 2]
    assert counts[PREDICTED].tolist() == [0, 1]


def test_stacked_counts_give_the_scores_of_each():
    rng = np.random.default_rng(2)
    stack = [counts_of(rng.choice(LABELS, 9), rng.choice(LABELS, 9)) for _ in range(4)]
    stack.append(counts_of(["a"], ["b"]))  # b does not occur among the answers
    stacked = np.stack(stack)
    for score in (
        *(accuracy, balanced_accuracy, f1, macro_f1),
        *(majority_accuracy, majority_balanced_accuracy),
    ):
        assert np.array_equal(score(stacked), [score(counts) for counts in stack])


@pytest.mark.parametrize(
    ("answers", "predictions", "labels", "message"),
    [
        ([], [], "ab", "0 answers and 0 predictions, expected as many, and at least one"),
        (["a"], ["a", "b"], "ab", "1 answers and 2 predictions"),
        (["a"], ["a"], "aba", r"labels are \['a', 'b', 'a'\], expected each of them once"),
        (["a", "c"], ["a", "c"], "ab", r"answers hold 'c', expected only \['a', 'b'\]"),
    ],
)
def test_labels_that_cannot_be_scored_are_the_callers_bug(answers, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        label_outcomes(answers, predictions, labels)


@pytest.mark.parametrize(
    "score",
    [accuracy, balanced_accuracy, f1, macro_f1, majority_accuracy, majority_balanced_accuracy],
)
def test_no_answers_have_no_score(score):
    with pytest.raises(ValueError, match="no answers"):
        score(np.zeros((3, 2)))


def test_an_exact_match_forgives_white_space_around_a_text_only():
    answers = ["x\n", "x y", "X", ""]
    assert exact_matches(answers, [" x", "x  y", "x", "\n"]).tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="at least one"):
        exact_matches([], [])


# Few characters, so that they repeat; an accent and a joiner of their own, and past 16 bits.
TEXTS = st.text(st.sampled_from("ab \n\u00e9e\u0301\u200d👩💻")) | st.text()


@given(TEXTS, TEXTS)
@example("", "")
@example("", "👩‍💻")
@example("e\u0301", "\u00e9")
@example("ab" * 40, "ba" * 33)  # past a machine word
def test_edit_similarity_is_rapidfuzzs(a, b):
    expected = Levenshtein.normalized_similarity(a, b)
    assert edit_similarity(a, b) == pytest.approx(expected, **EXACT)
    assert edit_similarity(b, a) == edit_similarity(a, b)


def test_edit_similarity_of_long_texts_is_rapidfuzzs_within_a_second():
    rng = np.random.default_rng(0)
    a = "".join(rng.choice([*"abcdefgh \n"], 10_000))
    keep = rng.random(10_000)
    b = "".join(c + "x" * int(k > 0.9) for c, k in zip(a, keep, strict=True) if k > 0.2)
    start = time.process_time()
    for other in (b, "".join(rng.permutation([*a]))):
        expected = Levenshtein.normalized_similarity(a, other)
        assert edit_similarity(a, other) == pytest.approx(expected, **EXACT)
    assert time.process_time() - start < 2  # 0.1 s; two pairs


def test_edit_similarity_by_hand():
    assert edit_similarity("", "") == 1
    assert edit_similarity("", "ab") == 0
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7, **EXACT)


def test_perplexity_is_per_token():
    assert perplexity(10 * np.log(7), 10) == pytest.approx(7, **EXACT)
    assert perplexity(np.log([[8.0, 9.0]]), np.array([[3, 2]])) == pytest.approx(np.array([[2, 3]]))
    assert perplexity(1e6, 1) == np.inf
    with pytest.raises(ValueError, match="tokens are 0, expected at least 1"):
        perplexity(np.zeros(2), np.array([1, 0]))


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
