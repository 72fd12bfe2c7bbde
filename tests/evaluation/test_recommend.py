"""Which K is recommended, on answers whose right recommendation is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kmerge_mlx.cli.evaluate import _recommendation
from kmerge_mlx.data.examples import Example
from kmerge_mlx.errors import EvaluateError
from kmerge_mlx.evaluation.baselines import Mean, Merged, Uncompressed
from kmerge_mlx.evaluation.metrics import paired_interval
from kmerge_mlx.evaluation.questions import Group, Question, Questions
from kmerge_mlx.evaluation.recommend import check, recommend
from kmerge_mlx.evaluation.report import group_scores, read_report
from kmerge_mlx.evaluation.scoring import Prediction
from tests.cli_runner import assert_one_error, run
from tests.evaluations import questions_of, write_data

TEXTS, LABELS = Group("data"), Group("data", labels=("yes", "no"))


def questions_about(answers: list[str], *groups: Group) -> Questions:
    share = len(answers) // len(groups)
    names = [group.name for group in groups for _ in range(share)]
    items = [Question(Example(answer=a), name) for a, name in zip(answers, names, strict=True)]
    return Questions(items, groups)


def said(answers: list[str], wrong: set[int], nll: float = 1.0) -> list[Prediction]:
    """Answers that are right but at some places."""
    return [Prediction("?" if i in wrong else a, nll, 2, 8, 4) for i, a in enumerate(answers)]


def recommended(
    count: int, wrong: dict[int, set[int]], budget: float = 2.0, group: Group = TEXTS, score=None
):
    """Of so many questions, which of them each K answers wrongly."""
    answers = ["yes" if i % 4 == 0 else "no" for i in range(count)]
    methods = {(Uncompressed if k == 1 else Merged)(k): said(answers, w) for k, w in wrong.items()}
    return recommend(questions_about(answers, group), methods, score, budget)


def test_the_largest_k_within_the_budget_is_recommended():
    wrong = {1: {*range(60)}, 2: {*range(58)}, 4: {*range(65)}, 8: {*range(100)}}
    found = recommended(1000, wrong)
    assert (found.k, found.score, found.budget) == (4, "exact_match", 2.0)
    assert [(one.k, one.within) for one in found.compared] == [(2, True), (4, True), (8, False)]
    two, four, eight = found.compared
    assert (four.value, four.reference) == pytest.approx((0.935, 0.94))
    assert [one.difference for one in found.compared] == pytest.approx([0.2, -0.5, -4.0])
    for one in found.compared:
        assert one.low < one.difference < one.high
    assert eight.high < -2 < four.low < two.low


def test_a_k_that_answers_other_questions_wrongly_is_not_as_good_as_one_that_answers_the_same():
    """Both get 90%: what differs is the difference in each question."""
    same, other = {*range(50)}, {*range(50, 100)}
    found = recommended(500, {1: same, 2: other, 4: same})
    assert [one.difference for one in found.compared] == [0.0, 0.0]
    assert [one.within for one in found.compared] == [False, True]
    assert found.k == 4


@pytest.mark.parametrize(("count", "k"), [(20, 1), (400, 2)])
def test_few_questions_answered_alike_prove_nothing(count, k):
    assert recommended(count, {1: set(), 2: set()}).k == k


def test_a_larger_budget_allows_more():
    wrong = {1: set(), 2: {*range(30)}}
    assert [recommended(1000, wrong, budget).k for budget in (0, 2, 6)] == [1, 1, 2]


def test_labels_weigh_alike_whatever_their_share():
    """All that K = 2 gets wrong are the rare label's: 2.5% of the answers, a twentieth of them."""
    rare = {i for i in range(0, 1600, 4) if i % 40 == 0}
    balanced = recommended(1600, {1: set(), 2: rare}, budget=4, group=LABELS)
    assert (balanced.score, balanced.k) == ("balanced_accuracy", 1)
    (one,) = balanced.compared
    assert one.difference == pytest.approx(-100 * 40 / 400 / 2)
    answers = ["yes" if i % 4 == 0 else "no" for i in range(1600)]
    table = group_scores(LABELS, [(a,) for a in answers], said(answers, rare))
    assert one.value == pytest.approx(table["balanced_accuracy"].value)
    plain = recommended(1600, {1: set(), 2: rare}, budget=4, group=LABELS, score="accuracy")
    assert (plain.score, plain.k) == ("accuracy", 2)
    assert plain.compared[0].difference == pytest.approx(-2.5)


def test_of_several_groups_the_mean_counts():
    answers = ["yes", "no"] * 400
    groups = (Group("a", labels=("yes", "no")), Group("b"))
    methods = {Uncompressed(1): said(answers, set()), Merged(2): said(answers, {*range(400, 420)})}
    found = recommend(questions_about(answers, *groups), methods, None, 2.0)
    assert found.score == "balanced_accuracy and exact_match"
    assert found.compared[0].difference == pytest.approx((0 - 5) / 2)


@pytest.mark.parametrize(("more", "k"), [(1.01, 2), (1.05, 1), (0.9, 2)])
def test_of_perplexity_the_budget_is_percent_that_it_grows(more, k):
    rng = np.random.default_rng(0)
    answers = ["yes"] * 300
    plain = rng.uniform(1, 3, 300)
    merged = plain + 2 * np.log(more)  # nats over 2 tokens
    methods = {
        kind: [Prediction("", float(n), 2, 8, 4) for n in each]
        for kind, each in ((Uncompressed(1), plain), (Merged(2), merged))
    }
    found = recommend(questions_about(answers, TEXTS), methods, "perplexity", 2.0)
    (one,) = found.compared
    assert found.k == k
    assert one.reference == pytest.approx(np.exp(plain.sum() / 600))
    assert (one.difference, one.low, one.high) == pytest.approx([100 * (more - 1)] * 3)


def test_the_perplexity_of_a_few_questions_proves_nothing():
    """A percentile bootstrap of one question has no width."""
    for count, k in ((1, 1), (19, 1), (20, 2)):
        found = recommended(count, {1: set(), 2: set()}, score="perplexity")
        assert (found.k, found.compared[0].within) == (k, k == 2)
        assert found.compared[0].difference == 0
        assert (found.to_json()["compared"][0]["low"] is None) == (k == 1)


def test_a_model_that_overflows_is_not_recommended():
    answers = ["yes"] * 300
    methods = {Uncompressed(1): said(answers, set()), Merged(2): said(answers, set(), np.inf)}
    found = recommend(questions_about(answers, TEXTS), methods, "perplexity", 2.0)
    assert found.k == 1
    assert not found.compared[0].within
    assert found.to_json()["compared"][0]["difference"] is None


def test_without_answers_at_k_1_nothing_is_recommended():
    found = recommend(
        questions_about(["a"] * 9, TEXTS), {Merged(2): said(["a"] * 9, set())}, None, 2
    )
    assert (found.k, found.compared) == (None, ())


def test_where_k_1_answers_nothing_right_nothing_is_recommended():
    found = recommended(500, {1: {*range(500)}, 2: {*range(500)}, 4: {*range(500)}})
    assert (found.k, len(found.compared)) == (None, 2)


def test_the_mean_of_embeddings_is_not_a_k():
    """It merges too, and is a baseline."""
    answers = ["yes"] * 500
    methods = {Uncompressed(1): said(answers, set()), Mean(2): said(answers, set())}
    assert recommend(questions_about(answers, TEXTS), methods, None, 2).k == 1


def test_the_interval_of_pairs_holds_its_level():
    """Drawn pairs of known shares: 95% of the intervals hold the true difference."""
    rng, holds = np.random.default_rng(1), 0
    better, worse, n, times = 0.05, 0.12, 150, 300
    for _ in range(times):
        drawn = rng.random(n)
        differences = np.where(drawn < better, 1.0, np.where(drawn < better + worse, -1.0, 0.0))
        low, high = paired_interval([(1.0, differences)])
        holds += low <= better - worse <= high
    assert stats.binomtest(holds, times, 0.95).pvalue > 0.001


def test_the_interval_of_equal_pairs_is_that_of_an_event_that_never_came():
    """About 3 / n on both sides, by the rule of three; a bootstrap's would be a point."""
    low, high = paired_interval([(1.0, np.zeros(300))])
    assert 100 * high == pytest.approx(-100 * low, abs=0.25)
    assert 0.3 < 100 * high < 1.3


@pytest.mark.parametrize(
    ("methods", "score", "said"),
    [
        ([Merged(2), Merged(4)], None, "compares with K = 1, found K = 2, 4: give `k` 1,2,4"),
        ([Uncompressed(1)], None, "there is no other: give `k`"),
        ([Uncompressed(1), Mean(2)], None, "there is no other: give `k`"),
        ([Uncompressed(1), Merged(2)], "recall", "data is scored by exact_match, edit_similarity"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_asked(methods, score, said):
    with pytest.raises(EvaluateError, match=said):
        check(questions_about(["a"], TEXTS), methods, score)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("a") / "data", questions_of(20))


def test_the_command_says_it_on_one_line_and_in_json(folders, data, tmp_path):
    asked = ("evaluate", *folders.flags(), "--data", data, "--timed", 0, "-m", 2)
    asked += ("--predictions", tmp_path / "answers.jsonl")
    plain = run(*asked)
    assert plain.code == 0, plain.err
    found = run(*asked, "--recommend", "--recommend-by", "perplexity", "--budget", 1e6)
    assert found.code == 0, found.err
    assert found.out.startswith(plain.out)
    line = found.out.removeprefix(plain.out).strip()
    assert "\n" not in line
    assert line.startswith("perplexity; K = 2: ")
    assert line.endswith(": within 1e+06%; recommended: K = 4")
    text = run(*asked, "--recommend", "--json").out
    answer = json.loads(text)["recommended"]
    # A random model answers nothing right.
    assert (answer["k"], answer["score"], answer["budget"]) == (None, "exact_match", 2.0)
    assert [one["k"] for one in answer["compared"]] == [2, 4]
    (tmp_path / "evaluate.json").write_text(text)
    assert read_report(tmp_path / "evaluate.json").rows
    without = json.loads(run(*asked, "--json").out)
    assert "recommended" not in without
    assert not {"recommend", "budget", "recommend_by"} & without["settings"].keys()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--budget", 2), 2, "--budget and --recommend-by are of --recommend"),
        (("--recommend-by", "recall"), 2, "--budget and --recommend-by are of --recommend"),
        (("--recommend", "--budget", -1), 2, "--budget"),
        (("--recommend", "--k", 2), 1, "--recommend compares with K = 1, found K = 2: give --k 1"),
        (("--recommend", "--k", "2,4"), 1, "found K = 2, 4: give --k 1,2,4"),
        (("--k", "2,x"), 2, "--k is 'x', expected a whole number"),
        (("--recommend", "--recommend-by", "recall"), 1, "--recommend-by is recall, and "),
    ],
)
def test_a_mistake_is_one_line(folders, data, args, code, said):
    result = run("evaluate", *folders.flags(), "--data", data, *args)
    assert_one_error(result, code, said)


@pytest.mark.parametrize(
    ("questions", "wrong", "said"),
    [(1000, 0, "within 2 points"), (60, 0, "too few questions to tell"), (1000, 90, "beyond 2 p")],
)
def test_the_verdict_tells_what_is_worse_from_what_is_not_known(questions, wrong, said):
    found = recommended(questions, {1: set(), 2: {*range(wrong)}})
    assert f"): {said}" in _recommendation(found)
