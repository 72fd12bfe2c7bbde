"""Recommends a K: the largest whose answers are as good as those at K = 1, within a budget.

The same questions are asked at every K, so that what is compared is the difference in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge_mlx.errors import EvaluateError
from kmerge_mlx.evaluation import metrics
from kmerge_mlx.evaluation.baselines import Merged, Method, Uncompressed
from kmerge_mlx.evaluation.metrics import bootstrap_interval, paired_interval
from kmerge_mlx.evaluation.questions import Group, Questions
from kmerge_mlx.evaluation.report import row_scores
from kmerge_mlx.evaluation.scoring import Prediction
from kmerge_mlx.evaluation.settings import BALANCED, PERPLEXITY

Answers = Mapping[Method, Sequence[Prediction]]
_FIRST = ("token_f1", "recall", "exact_match")  # of the scores that a group may have, what counts

_LEAST = 20  # questions that a percentile bootstrap takes for an interval: one would give no width


@dataclass(frozen=True)
class Compared:
    """One K beside K = 1: shares from 0 to 1, or perplexities, and their difference."""

    k: int
    value: float
    reference: float  # at K = 1
    difference: float  # in points (hundredths), of perplexities in percent; below 0 is less
    low: float  # the ends of its 95% interval
    high: float
    within: bool  # whether all of the interval is within the budget


@dataclass(frozen=True)
class Recommendation:
    """The largest K within the budget, and what it was compared by."""

    k: int | None  # None: K = 1 could not read the prompts, or answered nothing right
    score: str | None
    budget: float  # points of a share, percent of a perplexity
    compared: tuple[Compared, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, by name; JSON has no infinity, so that is null."""
        compared = [
            {n: v if math.isfinite(v) else None for n, v in vars(one).items()}
            for one in self.compared
        ]
        return vars(self) | {"compared": compared}


def check(questions: Questions, methods: Sequence[Method], score: str | None) -> None:
    """Refuses, before anything is asked, what could not be compared; raises EvaluateError."""
    found = [str(method.k) for method in methods if method.name == Merged.name]
    ks, given = ", ".join(found), ",".join(found)
    if not ks:
        raise EvaluateError("`recommend` compares with K = 1, and there is no other: give `k`")
    if Uncompressed.name not in (method.name for method in methods):
        raise EvaluateError(f"`recommend` compares with K = 1, found K = {ks}: give `k` 1,{given}")
    for group in questions.groups:
        _counted(group, score)


def recommend(
    questions: Questions, answers: Answers, score: str | None, budget: float
) -> Recommendation:
    """Compares the merged answers with the uncompressed ones.

    Args:
        questions: What was asked.
        answers: Of each method that could read them, in the order of the questions.
        score: What counts; None: the first score of a table. Of several groups it is the mean, and
            perplexity that of all their tokens.
        budget: Points that may be lost; of perplexity, percent that it may grow.
    """
    named = {(method.name, method.k): mine for method, mine in answers.items()}
    reference = named.get((Uncompressed.name, 1))
    if reference is None:
        return Recommendation(None, score, budget)
    names = [_counted(group, score) for group in questions.groups]
    compare = _perplexities if score == PERPLEXITY else _shares
    compared = [
        Compared(k, *compare(questions, names, mine, reference, budget))
        for (name, k), mine in sorted(named.items())
        if name == Merged.name
    ]
    best = max([1, *(one.k for one in compared if one.within)])
    if compared and not compared[0].reference:  # nothing can be lost
        best = None
    return Recommendation(best, " and ".join(dict.fromkeys(names)), budget, tuple(compared))


def _counted(group: Group, score: str | None) -> str:
    """The score of a group that counts."""
    empty = row_scores(group, [("",)], [Prediction("", 0.0, 1, 1, 1)])
    known = [BALANCED, *empty] if group.labels else [*empty]
    if score is None:
        return next(name for name in (BALANCED, *_FIRST) if name in known)
    if score not in (*known, PERPLEXITY):
        raise EvaluateError(
            f"`recommend_by` is {score}, and {group.name} is scored by "
            f"{', '.join((*known, PERPLEXITY))}"
        )
    return score


def _shares(
    questions: Questions,
    names: Sequence[str],
    mine: Sequence[Prediction],
    reference: Sequence[Prediction],
    budget: float,
) -> tuple[float, float, float, float, float, bool]:
    strata: list[tuple[float, np.ndarray]] = []
    values = np.zeros(2)
    for group, name in zip(questions.groups, names, strict=True):
        parts = [*_parts(questions, group, name, (mine, reference))]
        weight = 1 / len(parts) / len(names)
        values += sum(weight * part.mean(axis=1) for part in parts)
        strata += [(weight, part[0] - part[1]) for part in parts]
    low, high = (100 * end for end in paired_interval(strata))
    value, before = map(float, values)
    return value, before, 100 * (value - before), low, high, low >= -budget


def _parts(
    questions: Questions, group: Group, name: str, both: Sequence[Sequence[Prediction]]
) -> Iterator[np.ndarray]:
    """The scores of a group's questions (2, n), in one part, or one for each label."""
    places = [i for i, question in enumerate(questions.items) if question.group == group.name]
    asked = [questions.items[i].answers for i in places]
    column = "accuracy" if name == BALANCED else name
    found = [row_scores(group, asked, [each[i] for i in places])[column] for each in both]
    wanted = np.array([answer.strip() if name == BALANCED else "" for answer, *_ in asked], object)
    for label in dict.fromkeys(wanted):
        yield np.stack(found)[:, wanted == label]


def _perplexities(
    questions: Questions,
    names: Sequence[str],
    mine: Sequence[Prediction],
    reference: Sequence[Prediction],
    budget: float,
) -> tuple[float, float, float, float, float, bool]:
    pairs = zip(mine, reference, strict=True)
    terms = np.array([(a.nll, b.nll, a.answer_tokens) for a, b in pairs], np.float64)

    def more(sums: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return 100 * np.expm1((sums[..., 0] - sums[..., 1]) / sums[..., 2])

    value, before = (float(metrics.perplexity(terms[:, [i, 2]].sum(axis=0))) for i in (0, 1))
    if not np.isfinite(terms).all():  # a model that overflows
        return value, before, np.inf, np.inf, np.inf, False
    low, high = bootstrap_interval(terms, more) if len(terms) >= _LEAST else (-np.inf, np.inf)
    return value, before, float(more(terms.sum(axis=0))), low, high, high <= budget
