"""Answers to a table: every score of every method, with its interval.

Owns which scores a group of questions has. Does not know models, or how a table is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kmerge_mlx.evaluation import metrics
from kmerge_mlx.evaluation.baselines import Method
from kmerge_mlx.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    mean_proportion_interval,
    wilson_interval,
)
from kmerge_mlx.evaluation.questions import Group, Questions
from kmerge_mlx.evaluation.scoring import Prediction


@dataclass(frozen=True)
class Score:
    """A score and where it lies, at 95% confidence.

    Args:
        value: Of the questions that were asked; NaN where a likelihood is none.
        interval: Of questions like them; None for a score that has none.
    """

    value: float
    interval: Interval | None = None

    def to_json(self) -> dict[str, float | None]:
        """The value, and its interval where there is one; JSON has no infinity: that is null."""
        ends = {} if self.interval is None else vars(self.interval)
        named = {"value": self.value, **ends}
        return {name: value if np.isfinite(value) else None for name, value in named.items()}


@dataclass(frozen=True)
class Result:
    """What one method made of one group of questions.

    Args:
        prompt_tokens: Of the group's prompts together.
        positions: In how many they were read.
        scores: By name.
    """

    prompt_tokens: int
    positions: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Row:
    """What one method made of all questions.

    Args:
        method: The method.
        results: By group; empty where ``refused`` says why.
        refused: Why the method cannot read these prompts, or None.
    """

    method: Method
    results: Mapping[str, Result] = field(default_factory=dict)
    refused: str | None = None

    def compression_ratio(self, groups: Iterable[str] | None = None) -> float:
        """Original tokens over positions, of some groups or of all; of no refused method."""
        results = [self.results[name] for name in groups or self.results]
        return sum(r.prompt_tokens for r in results) / sum(r.positions for r in results)

    def to_json(self) -> dict[str, Any]:
        """Everything, by name."""
        entry = {"method": self.method.name, "k": self.method.k, "label": self.method.label}
        if self.refused is not None:
            return entry | {"refused": self.refused}
        return entry | {
            "prompt_tokens": sum(result.prompt_tokens for result in self.results.values()),
            "positions": sum(result.positions for result in self.results.values()),
            "compression_ratio": self.compression_ratio(),
            "scores": {
                group: {name: score.to_json() for name, score in result.scores.items()}
                for group, result in self.results.items()
            },
        }


def row_of(method: Method, questions: Questions, predictions: Sequence[Prediction]) -> Row:
    """Scores a method.

    Args:
        method: The method.
        questions: What it was asked.
        predictions: What it answered, one for each question.
    """
    answers: dict[str, list[str]] = {group.name: [] for group in questions.groups}
    answered: dict[str, list[Prediction]] = {group.name: [] for group in questions.groups}
    for question, prediction in zip(questions.items, predictions, strict=True):
        answers[question.group].append(question.answer)
        answered[question.group].append(prediction)
    results = {
        group.name: Result(
            sum(prediction.prompt_tokens for prediction in answered[group.name]),
            sum(prediction.positions for prediction in answered[group.name]),
            group_scores(group, answers[group.name], answered[group.name]),
        )
        for group in questions.groups
    }
    return Row(method, results)


def group_scores(
    group: Group, answers: Sequence[str], predictions: Sequence[Prediction]
) -> dict[str, Score]:
    """The scores of a group: of labels where its answers are classes, else of texts.

    Args:
        group: The group.
        answers: The right answers, at least one.
        predictions: One for each.

    Returns:
        Scores by name. The accuracy, or exact match, or recall, comes first.
    """
    texts, wanted = [p.text.strip() for p in predictions], [a.strip() for a in answers]
    n = len(texts)
    if group.labels:
        scores = _label_scores(group.labels, wanted, texts)
    elif group.place is not None:
        found = sum(map(group.is_right, texts, wanted))
        scores = {"recall": Score(found / n, wilson_interval(found, n))}
    else:
        matches = int(metrics.exact_matches(wanted, texts).sum())
        pairs = zip(texts, wanted, strict=True)
        similar = np.array([metrics.edit_similarity(*pair) for pair in pairs])
        terms = np.stack([similar, np.ones(n)], axis=1)
        scores = {
            "exact_match": Score(matches / n, wilson_interval(matches, n)),
            "edit_similarity": Score(float(similar.mean()), bootstrap_interval(terms, _mean)),
        }
    terms = np.array([(p.nll, p.answer_tokens) for p in predictions], np.float64)
    # A model that overflows finds an answer impossible, or knows no likelihood at all.
    interval = bootstrap_interval(terms, _perplexity) if np.isfinite(terms).all() else None
    return scores | {"perplexity": Score(float(_perplexity(terms.sum(axis=0))), interval)}


def _label_scores(
    labels: Sequence[str], answers: Sequence[str], texts: Sequence[str]
) -> dict[str, Score]:
    outcomes = metrics.label_outcomes(answers, texts, labels)
    counts = outcomes.sum(axis=0)
    right, answered = counts[metrics.RIGHT], counts[metrics.ANSWERED]

    def positive_f1(sums: np.ndarray) -> Any:
        return metrics.f1(sums)[..., 0]

    def resampled(statistic: Any) -> Score:
        return Score(float(statistic(counts)), bootstrap_interval(outcomes, statistic))

    n = len(answers)
    return {
        "accuracy": Score(float(metrics.accuracy(counts)), wilson_interval(int(right.sum()), n)),
        "balanced_accuracy": Score(
            float(metrics.balanced_accuracy(counts)), mean_proportion_interval(right, answered)
        ),
        "f1": resampled(positive_f1),
        "f1_macro": resampled(partial(metrics.macro_f1, resampled_from=counts)),
        "majority_accuracy": Score(float(metrics.majority_accuracy(counts))),
        "majority_balanced_accuracy": Score(float(metrics.majority_balanced_accuracy(counts))),
    }


def _mean(sums: np.ndarray) -> Any:
    return sums[..., 0] / sums[..., 1]


def _perplexity(sums: np.ndarray) -> Any:
    return metrics.perplexity(sums[..., 0], sums[..., 1])
