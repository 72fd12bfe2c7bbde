"""Scores of answers that are labels, perplexity, and 95% intervals.

Every score is a function of sums over examples, so the same function gives the score (of the sums)
and its bootstrap (of the sums of each resample). Labels are counted in arrays (..., 3, L), L the
number of labels: how often each label was right, was the answer, and was predicted.

Source: Wilson, J. Am. Stat. Assoc. 22 (1927); Brown, Cai and DasGupta, Stat. Sci. 16 (2001) 101
(the Jeffreys interval); Rubin, Ann. Stat. 9 (1981) 130 (the Bayesian bootstrap); Efron and
Tibshirani, "An Introduction to the Bootstrap" (1993), 13.3;
the evaluation script of SQuAD 2.0 (its exact match and F1, Rajpurkar et al., arXiv 1806.03822).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

RIGHT, ANSWERED, PREDICTED = range(3)
LEVEL = 0.95
RESAMPLES = 2_000
DRAWS = 20_000
SEED = 0


Interval = tuple[float, float]  # the ends of where a value lies with 95% confidence


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion, of ``successes`` out of ``n`` (at least 1)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / scale
    # The ends are exact there, and rounding would leave [0, 1].
    low = 0.0 if successes == 0 else float(centre - half)
    return low, 1.0 if successes == n else float(centre + half)


def mean_interval(successes: np.ndarray, totals: np.ndarray) -> Interval:
    """The interval of the mean of independent proportions (L,), such as balanced accuracy.

    Each proportion is drawn from its Jeffreys posterior, Beta(successes + 1/2, failures + 1/2); one
    of nothing is left out. The interval includes the mean itself.
    """
    successes, totals = successes[totals > 0], totals[totals > 0]
    beta = np.random.default_rng(SEED).beta
    draws = beta(successes + 0.5, totals - successes + 0.5, (DRAWS, len(totals))).mean(axis=1)
    mean, (low, high) = (successes / totals).mean(), _middle(draws)
    return float(min(low, mean)), float(max(high, mean))


def bootstrap_interval(
    terms: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]
) -> Interval:
    """The percentile bootstrap interval of a function of sums over examples.

    ``terms`` (n, ...) are what is summed, and ``statistic`` takes sums (R, ...) float64, one row
    for each resample, and returns (R,). It need not lie in the interval itself.
    """
    n, rng = len(terms), np.random.default_rng(SEED)
    flat = terms.reshape(n, -1).astype(np.float64)
    drawn = (rng.integers(n, size=n) for _ in range(RESAMPLES))
    sums = np.stack([np.bincount(which, minlength=n) @ flat for which in drawn])
    return _middle(statistic(sums.reshape(-1, *terms.shape[1:])))


def paired_interval(strata: Sequence[tuple[float, np.ndarray]]) -> Interval:
    """The interval of a weighted sum of mean differences, each of (n,) values from -1 to 1.

    The Bayesian bootstrap: the differences of a stratum get random weights, Dirichlet(1, ..., 1).
    Half a difference of -1 and half a one of 1 are added, as in Jeffreys' prior, so that it is as
    wide as the data allow where all differences are alike. It includes the sum itself.
    """
    rng, draws = np.random.default_rng(SEED), np.zeros(RESAMPLES)
    for weight, differences in strata:
        values = np.append(differences, (-1, 1))
        shape = np.append(np.ones(len(differences)), (0.5, 0.5))
        for i in range(RESAMPLES):
            drawn = rng.standard_gamma(shape)
            draws[i] += weight * (drawn @ values) / drawn.sum()
    whole, (low, high) = sum(w * each.mean() for w, each in strata), _middle(draws)
    return float(min(low, whole)), float(max(high, whole))


def _middle(values: np.ndarray) -> Interval:
    # Values that occurred: interpolating between two infinite ones gives NaN.
    low = np.quantile(values, (1 - LEVEL) / 2, method="lower")
    return float(low), float(np.quantile(values, (1 + LEVEL) / 2, method="higher"))


def label_outcomes(
    answers: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> np.ndarray:
    """Whether each label is right, is the answer, and is predicted: (n, 3, L) bool."""
    answered, predicted = (
        np.array(texts, object)[:, None] == np.array(labels, object)
        for texts in (answers, predictions)
    )
    return np.stack([answered & predicted, answered, predicted], axis=1)


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """The mean recall of the labels among the answers: (...) of counts (..., 3, L)."""
    answered = counts[..., ANSWERED, :]
    recalls = counts[..., RIGHT, :] / np.maximum(answered, 1)
    return recalls.sum(axis=-1) / (answered > 0).sum(axis=-1)


def f1(counts: np.ndarray) -> np.ndarray:
    """The F1 of every label (..., L) of counts (..., 3, L); 0 for a label that does not occur."""
    seen = counts[..., ANSWERED, :] + counts[..., PREDICTED, :]
    return 2 * counts[..., RIGHT, :] / np.maximum(seen, 1)


def macro_f1(counts: np.ndarray, resampled_from: np.ndarray) -> np.ndarray:
    """The mean F1 of all labels, (...) of counts (..., 3, L) resampled from others (3, L).

    A label that occurs in those and not in a resample is left out of it.
    """
    occurs = counts[..., ANSWERED:, :].sum(axis=-2) > 0
    never = resampled_from[ANSWERED:].sum(axis=0) == 0
    return f1(counts).sum(axis=-1) / (occurs | never).sum(axis=-1)


def squad_scores(answers: Sequence[str], text: str) -> tuple[float, float]:
    """SQuAD's exact match and F1 of a text, each that of the right answer that it is nearest to.

    Case, punctuation, articles and white space do not count. A right answer of which nothing is
    left does not count either, unless there is no other.
    """
    found = _words(text)
    wanted = [words for words in map(_words, answers) if words] or [[]]
    return max(float(found == words) for words in wanted), max(_f1(found, w) for w in wanted)


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def perplexity(sums: np.ndarray) -> np.ndarray:
    """Perplexity of sums (..., 2) of nats and tokens, infinite past float64."""
    with np.errstate(over="ignore"):
        return np.exp(sums[..., 0] / sums[..., 1])
