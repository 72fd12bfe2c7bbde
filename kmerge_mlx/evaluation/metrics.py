"""The scores of answers: of labels, of texts, and of the likelihood of texts.

Owns the arithmetic, in float64. Does not know models, tasks, or where the answers come from.

Everything is a function of *sums over examples*, so that the same function gives the score (of the
sums) and its bootstrap (of the sums of every resample, stacked; ``intervals.bootstrap_interval``).

Labels are counted in arrays (..., 3, L), L the number of labels: how often each label was ``RIGHT``
(the answer and predicted), was the answer (``ANSWERED``), and was ``PREDICTED``::

    outcomes = label_outcomes(answers, predictions, labels)  # (n, 3, L), one example each
    counts = outcomes.sum(axis=0)
    macro_f1(counts), bootstrap_interval(outcomes, macro_f1)

An empty input has no score: that, and answers that are no labels, are bugs of the caller and a
``ValueError``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RIGHT, ANSWERED, PREDICTED = range(3)
Scores = np.float64 | np.ndarray
"""One score, or an array of them for stacked counts."""


def label_outcomes(
    answers: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> np.ndarray:
    """What each example says of each label.

    A prediction that is no label is a prediction of no label: wrong, and nobody's false positive.
    Nothing is stripped or folded; that is the caller's to decide.

    Args:
        answers: The right labels, n of them.
        predictions: What was predicted, one for each answer.
        labels: L different labels. The order is that of the last axis.

    Returns:
        (n, 3, L) bool: whether the label is ``RIGHT``, ``ANSWERED`` and ``PREDICTED``.

    Raises:
        ValueError: No examples, another number of predictions, a label twice, or an answer that is
            no label.
    """
    _check_pairs(answers, predictions)
    place = {label: i for i, label in enumerate(labels)}
    if len(place) < len(labels):
        raise ValueError(f"labels are {list(labels)}, expected each of them once")
    if foreign := set(answers) - set(place):
        raise ValueError(f"answers hold {min(foreign)!r}, expected only {list(labels)}")
    every = np.arange(len(labels))
    answered = np.array([place[a] for a in answers])[:, None] == every
    predicted = np.array([place.get(p, -1) for p in predictions])[:, None] == every
    return np.stack([answered & predicted, answered, predicted], axis=1)


def accuracy(counts: np.ndarray) -> Scores:
    """The share of the answers that were predicted.

    Args:
        counts: (..., 3, L), at least one answer each.

    Returns:
        (...) float64.
    """
    return counts[..., RIGHT, :].sum(axis=-1) / _total(counts)


def balanced_accuracy(counts: np.ndarray) -> Scores:
    """The mean recall of the labels that occur among the answers.

    Args:
        counts: (..., 3, L), at least one answer each.

    Returns:
        (...) float64.
    """
    _total(counts)
    right, answered = counts[..., RIGHT, :], counts[..., ANSWERED, :]
    recalls = right / np.maximum(answered, 1)  # 0 / 1 where a label does not occur
    return recalls.sum(axis=-1) / (answered > 0).sum(axis=-1)


def f1(counts: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall of every label, taken as the positive one.

    Args:
        counts: (..., 3, L), at least one answer each.

    Returns:
        (..., L) float64; 0 for a label that is neither an answer nor predicted.
    """
    _total(counts)
    seen = counts[..., ANSWERED, :] + counts[..., PREDICTED, :]
    return 2 * counts[..., RIGHT, :] / np.maximum(seen, 1)


def occurring(counts: np.ndarray) -> np.ndarray:
    """Which labels are an answer or predicted: (..., L) bool, of counts (..., 3, L)."""
    return counts[..., ANSWERED, :] + counts[..., PREDICTED, :] > 0


def macro_f1(counts: np.ndarray, resampled_from: np.ndarray | None = None) -> Scores:
    """The mean of ``f1`` over all labels, those included that do not occur.

    Args:
        counts: (..., 3, L), at least one answer each.
        resampled_from: (3, L), what ``counts`` are resamples of: labels that occur there and that a
            resample happens to lack are left out of it, which says nothing of them.

    Returns:
        (...) float64.
    """
    each = f1(counts)
    if resampled_from is None:
        return each.mean(axis=-1)
    return each.sum(axis=-1) / (occurring(counts) | ~occurring(resampled_from)).sum(axis=-1)


def majority_accuracy(counts: np.ndarray) -> Scores:
    """The accuracy of always giving the most frequent answer.

    Args:
        counts: (..., 3, L), at least one answer each.

    Returns:
        (...) float64.
    """
    return counts[..., ANSWERED, :].max(axis=-1) / _total(counts)


def majority_balanced_accuracy(counts: np.ndarray) -> Scores:
    """The balanced accuracy of always giving the same answer: one recall is 1, the others are 0.

    Args:
        counts: (..., 3, L), at least one answer each.

    Returns:
        (...) float64.
    """
    _total(counts)
    return 1 / (counts[..., ANSWERED, :] > 0).sum(axis=-1)


def exact_matches(answers: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """Which predictions are the answer, but for white space around both.

    Args:
        answers: n texts.
        predictions: One for each answer.

    Returns:
        (n,) bool. Its mean is the share of exact matches.

    Raises:
        ValueError: No examples, or another number of predictions.
    """
    _check_pairs(answers, predictions)
    pairs = zip(answers, predictions, strict=True)
    return np.array([answer.strip() == prediction.strip() for answer, prediction in pairs])


def edit_similarity(a: str, b: str) -> float:
    """How much of the longer text need not be edited to make it the other.

    1 - Levenshtein distance / length of the longer text, over Unicode code points: an accent that
    is a character of its own counts as one. Two texts of 10,000 characters take about 0.1 s.

    Returns:
        1 for equal texts (two empty ones are equal) to 0.
    """
    longest = max(len(a), len(b))
    return 1 - _levenshtein(a, b) / longest if longest else 1.0


def perplexity(nll: float | np.ndarray, tokens: int | np.ndarray) -> Scores:
    """The exponential of the mean negative log-likelihood of a token.

    Args:
        nll: Summed negative log-likelihoods, in nats, of any shape.
        tokens: How many tokens each is a sum over.

    Returns:
        float64 of their shape; infinite where it is too large for that.

    Raises:
        ValueError: No tokens.
    """
    if np.min(tokens) <= 0:
        raise ValueError(f"tokens are {np.min(tokens)}, expected at least 1")
    with np.errstate(over="ignore"):
        return np.exp(np.asarray(nll, np.float64) / tokens)


def _levenshtein(a: str, b: str) -> int:
    """The fewest characters to insert, delete or replace to make one text the other.

    Bit-parallel: a column of the distance matrix is kept as its steps from row to row, +1 in the
    bits of ``up`` and -1 in those of ``down``, one bit a character of the longer text. A column
    takes a dozen operations on whole numbers of that many bits.

    Source: Myers, "A fast bit-vector algorithm for approximate string matching", J. ACM 46 (1999),
    in the form of Hyyrö, "A bit-vector algorithm for computing Levenshtein and Damerau edit
    distances", Nordic J. Computing 10 (2003). The last bit is not followed: the sum of a column's
    steps is its last distance.
    """
    rows, columns = (a, b) if len(a) > len(b) else (b, a)  # fewer and longer numbers are quicker
    mask = (1 << len(rows)) - 1
    places: dict[str, int] = {}
    for i, character in enumerate(rows):
        places[character] = places.get(character, 0) | 1 << i
    up, down = mask, 0
    for character in columns:
        equal = places.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up = (down | ~(diagonal | up)) << 1 | 1  # | 1: the top row rises by 1 a column
        right_down = (diagonal & up) << 1
        up = (right_down | ~(diagonal | right_up)) & mask
        down = right_up & diagonal & mask
    return len(columns) + up.bit_count() - down.bit_count()


def _check_pairs(answers: Sequence[str], predictions: Sequence[str]) -> None:
    if not len(answers) == len(predictions) > 0:
        found = f"{len(answers)} answers and {len(predictions)} predictions"
        raise ValueError(f"there are {found}, expected as many, and at least one")


def _total(counts: np.ndarray) -> Scores:
    total = counts[..., ANSWERED, :].sum(axis=-1)
    if np.min(total) <= 0:
        raise ValueError("there are no answers, expected at least one")
    return total
