"""Scores and intervals, against scikit-learn, RapidFuzz, SciPy and published numbers."""

from __future__ import annotations

import collections
import math
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from scipy import stats  # scikit-learn brings it
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from kmerge_mlx.evaluation import report
from kmerge_mlx.evaluation.metrics import (
    balanced_accuracy,
    bootstrap_interval,
    f1,
    label_outcomes,
    macro_f1,
    mean_interval,
    perplexity,
    squad_scores,
    wilson_interval,
)
from kmerge_mlx.evaluation.questions import Group
from kmerge_mlx.evaluation.scoring import Prediction

EXACT = {"rel": 0, "abs": 1e-12}
# About a single label, and a prediction that is not an answer.
SCIKIT_LEARN_WONDERS = pytest.mark.filterwarnings("ignore:A single label", "ignore:y_pred contains")


def scores_of(group: Group, answers: list[str], texts: list[str]) -> dict[str, report.Score]:
    predictions = [Prediction(text, 1.0, 2, 3, 1) for text in texts]
    return report.group_scores(group, [(answer,) for answer in answers], predictions)


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


@SCIKIT_LEARN_WONDERS
def test_scores_of_labels_are_scikit_learns():
    rng = np.random.default_rng(0)
    kinds = {"a label that is not an answer": 0, "a prediction that is not a label": 0, "binary": 0}
    for _ in range(150):
        answers, predictions, labels = random_labels(rng)
        counts = label_outcomes(answers, predictions, labels).sum(axis=0)
        counts = np.stack([counts, 2 * counts])[0]  # the scores take stacks of counts
        balanced = balanced_accuracy_score(answers, predictions)
        assert balanced_accuracy(counts) == pytest.approx(balanced, **EXACT)
        macro = f1_score(answers, predictions, labels=labels, average="macro", zero_division=0)
        assert macro_f1(counts, counts) == pytest.approx(macro, **EXACT)
        positive = int(rng.integers(len(labels)))
        # scikit-learn's binary F1 needs two labels that both occur, and not another word.
        if set(answers) | set(predictions) == set(labels) and len(labels) == 2:
            how = {"pos_label": labels[positive]}
            kinds["binary"] += 1
        else:
            how = {"labels": labels[positive : positive + 1], "average": "macro"}
        positives = f1_score(answers, predictions, **how, zero_division=0)
        assert f1(counts)[positive] == pytest.approx(positives, **EXACT)
        kinds["a label that is not an answer"] += bool(set(labels) - set(answers))
        kinds["a prediction that is not a label"] += bool(set(predictions) - set(labels))
    assert min(kinds.values()) > 8


@SCIKIT_LEARN_WONDERS
def test_the_scores_of_a_group_are_scikit_learns():
    rng = np.random.default_rng(1)
    for _ in range(4):
        answers, predictions, labels = random_labels(rng)
        scores = scores_of(Group("any", tuple(labels)), answers, predictions)
        always = DummyClassifier(strategy="most_frequent").fit(answers, answers).predict(answers)
        positive = {"labels": labels[:1], "average": "macro", "zero_division": 0}
        expected = {
            "accuracy": accuracy_score(answers, predictions),
            "balanced_accuracy": balanced_accuracy_score(answers, predictions),
            "f1": f1_score(answers, predictions, **positive),
            "f1_macro": f1_score(
                answers, predictions, labels=labels, average="macro", zero_division=0
            ),
            "majority_accuracy": accuracy_score(answers, always),
            "majority_balanced_accuracy": balanced_accuracy_score(answers, always),
        }
        found = {name: score.value for name, score in scores.items() if name != "perplexity"}
        assert found == pytest.approx(expected, **EXACT)
        balanced = scores["balanced_accuracy"]
        assert balanced.low <= balanced.value <= balanced.high


def test_edit_similarity_is_one_minus_the_distance_over_the_longer_length():
    rng = np.random.default_rng(3)
    # Few characters, so that they repeat; an accent and a joiner of their own, and past 16 bits.
    pieces = [*"ab \n", "\u00e9", "e\u0301", "\u200d", "👩", "💻"]
    answers, texts = (
        ["".join(rng.choice(pieces, n)) for n in rng.integers(90, size=60)] for _ in "ab"
    )
    answers, texts = [*answers, "", ""], [*texts, "", "👩\u200d💻"]
    pairs = [(a.strip(), b.strip()) for a, b in zip(answers, texts, strict=True)]
    expected = [
        1 - Levenshtein.distance(a, b) / max(len(a), len(b)) if a or b else 1 for a, b in pairs
    ]
    found = scores_of(Group("any"), answers, texts)
    assert found["edit_similarity"].value == pytest.approx(np.mean(expected), **EXACT)
    assert found["exact_match"].value == np.mean([a == b for a, b in pairs])


def normalize_answer(s):
    """As in the evaluation script of SQuAD 2.0, restated, and so are the next two."""
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", s).split())


def compute_exact(a_gold, a_pred):
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold, a_pred):
    gold_toks, pred_toks = (normalize_answer(s).split() if s else [] for s in (a_gold, a_pred))
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = num_same / len(pred_toks), num_same / len(gold_toks)
    return 2 * precision * recall / (precision + recall)


def test_a_text_scores_as_in_the_script_of_squad():
    rng = np.random.default_rng(5)
    pieces = [
        "The ",
        "an ",
        "A",
        "a",
        "France",
        "france",
        " ",
        "-",
        ".",
        "\u2019",
        "\u00a0",
        "in ",
        "9 ",
    ]
    seen = set()
    for _ in range(2_000):
        text, *answers = ("".join(rng.choice(pieces, rng.integers(0, 6))) for _ in range(4))
        # An answer of which nothing is left is no gold answer there, unless it is the only one.
        gold = [a for a in answers if normalize_answer(a)] or [""]
        exact, f1 = (max(rule(a, text) for a in gold) for rule in (compute_exact, compute_f1))
        assert squad_scores(answers, text) == pytest.approx((exact, f1), **EXACT)
        seen.add((exact, 0 < f1 < 1))
    assert seen == {(0, False), (0, True), (1, False)}


def test_scores_of_questions_with_several_answers_are_their_means_by_hand():
    answers = [("the 10th century", "10th and 11th"), ("France",), ("Rollo",), ("1066",)]
    texts = ["In the 10th century.", "France", "William", "1066"]
    predictions = [Prediction(text, 1.0, 2, 3, 1) for text in texts]
    scores = report.group_scores(Group("qa", squad=True), answers, predictions)
    assert list(scores) == ["token_f1", "exact_match", "perplexity"]
    assert scores["exact_match"].value == 2 / 4
    assert scores["token_f1"].value == pytest.approx((4 / 5 + 1 + 0 + 1) / 4, **EXACT)
    assert scores["token_f1"].low < scores["token_f1"].value < scores["token_f1"].high
    assert report.cell("token_f1", scores["token_f1"]).startswith("70.00% (")


@pytest.mark.parametrize(
    ("perplexity", "shown"),
    [
        ((13_712.4, 9_999.6, 1_234_567.8), "13,712 (10,000-1,234,568)"),
        ((1.23456, 1.2, 123.456), "1.235 (1.2-123.5)"),
        ((12_345.6, None, None), "12,346"),
        ((math.inf, None, None), "inf"),
        ((math.nan, None, None), "nan"),
    ],
)
def test_a_perplexity_is_written_out(perplexity, shown):
    assert report.cell("perplexity", report.Score(*perplexity)) == shown


def test_perplexity_is_per_token():
    assert perplexity(np.array([10 * np.log(7), 10])) == pytest.approx(7, **EXACT)
    assert perplexity(np.array([[1e6, 1], [0, 1]])).tolist() == [np.inf, 1]
    found = scores_of(Group("any", ("a",)), ["a", "a"], ["a", "b"])["perplexity"]
    assert found.value == pytest.approx(np.exp(0.5))


@settings(deadline=None)
@given(st.integers(1, 100_000), st.floats(0, 1))
def test_wilsons_interval_is_scipys_and_holds_the_proportion(n, share):
    k = round(n * share)
    interval = wilson_interval(k, n)
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= interval[0] <= k / n <= interval[1] <= 1
    assert k > 0 or interval[0] == 0
    assert k < n or interval[1] == 1


@pytest.mark.parametrize(("successes", "n"), [(97, 100), (3, 8), (50, 1000)])
def test_the_interval_of_one_proportion_is_jeffreys_by_scipy_and_holds_the_mean(successes, n):
    expected = stats.beta(successes + 0.5, n - successes + 0.5).interval(0.95)
    for more in ([], [0]):  # a label without answers is left out
        found = mean_interval(np.array([successes, *more]), np.array([n, *more]))
        width = expected[1] - expected[0]
        assert found == pytest.approx(expected, abs=0.03 * width)
    totals = np.array([3, 5, 1])
    assert 0 < mean_interval(totals, totals)[0] < mean_interval(totals, totals)[1] == 1
    assert mean_interval(totals * 0, totals)[0] == 0


def test_the_bootstrap_is_scipys_but_for_the_drawing():
    rng = np.random.default_rng(0)
    nll, tokens = rng.gamma(2, 3, 80), rng.integers(1, 20, 80)
    ours = bootstrap_interval(np.stack([nll, tokens], axis=1), perplexity)
    theirs = stats.bootstrap(
        (nll, tokens),
        lambda n, t, axis: np.exp(n.sum(axis) / t.sum(axis)),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    # The ends of 2,000 resamples scatter by some per cent of the width.
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.1 * width)
    endless = np.array([[1e9, 1.0], [1.0, 1.0]])
    assert bootstrap_interval(endless, perplexity) == (np.exp(1.0), np.inf)
