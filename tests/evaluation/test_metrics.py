"""Scores, against scikit-learn and RapidFuzz."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

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
