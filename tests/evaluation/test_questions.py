"""What is asked: rows of every format, labels, trees, reviews and commits."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from kmerge_mlx.data import HUB_TASKS
from kmerge_mlx.errors import DataError, EvaluateError, KMergeError
from kmerge_mlx.evaluation.questions import Questions, load_questions
from kmerge_mlx.evaluation.settings import EvaluateSettings
from tests.cli_runner import CHATML, copy_base
from tests.conftest import UPSTREAM
from tests.data.test_tasks import COMMITS, REVIEWS
from tests.evaluations import labelled, measured, questions_of, silent, write_data, write_folders

BASE = str(UPSTREAM / "base")
TRUTH = ["true", "false", "true", "true", "false", "true"]


def asked(**settings) -> Questions:
    return load_questions(EvaluateSettings.of({"model": BASE} | settings), silent)


def refused(kind: type[KMergeError] = EvaluateError, **settings) -> str:
    with pytest.raises(kind) as caught:
        asked(**settings)
    return str(caught.value)


def texts_of(questions: Questions) -> list[tuple[str | None, str]]:
    return [(question.example.context, question.answer) for question in questions.items]


def trees(**settings) -> Questions:
    return asked(**{"task": "textualized-tree", "num_trees": 30, "stage": "small"} | settings)


def test_the_split_that_is_asked_for_is_read_up_to_the_limit(tmp_path):
    write_data(tmp_path, labelled(["a", "b", "c"]))
    write_data(tmp_path, labelled(["d", "e", "f"]), split="valid")
    assert [q.answer for q in asked(data=str(tmp_path)).items] == ["a", "b", "c"]
    found = asked(data=str(tmp_path), split="valid", limit=2)
    assert [q.answer for q in found.items] == ["d", "e"]
    (tmp_path / "valid.jsonl").unlink()
    assert "holds no valid.jsonl" in refused(DataError, data=str(tmp_path), split="valid")


def test_labels_are_few_answers_that_come_often_or_those_given(tmp_path):
    for answers, settings, labels in (
        (TRUTH, {}, ("true", "false")),
        ([" true", "true\n", "true", "false"], {}, ("true", "false")),
        (["b", "a", "a", "b"], {}, ("a", "b")),
        (["a", "b", "c", "a", "a"], {}, ()),
        (["only"], {}, ()),
        ([str(i) for i in range(21)] * 3, {}, ()),
        (["true"], {"labels": ["false", "true"]}, ("false", "true")),
        (TRUTH, {"positive": "false"}, ("false", "true")),
        (TRUTH, {"labels": ["no", "true", "false"], "positive": "false"}, ("false", "no", "true")),
    ):
        data = str(write_data(tmp_path, labelled(answers)))
        assert asked(data=data, **settings).groups[0].labels == labels


def test_rows_of_squad_are_scored_by_its_rule_unless_labels_are_named(tmp_path):
    row = {"context": "Text.", "question": "Is it?", "answers": ["yes", "it is"]}
    data = str(write_data(tmp_path, [row] * 4))
    found = asked(data=data)
    assert (found.groups[0].squad, found.groups[0].labels) == (True, ())
    assert [question.answers for question in found.items] == [("yes", "it is")] * 4
    named = asked(data=data, labels=["yes", "no"])
    assert (named.groups[0].squad, named.groups[0].labels) == (False, ("yes", "no"))
    assert asked(data=str(write_data(tmp_path, labelled(["a"])))).items[0].answers == ("a",)


def test_an_answer_outside_the_labels_and_a_positive_that_is_not_one_are_refused(tmp_path):
    data = str(write_data(tmp_path, ["", *map(json.dumps, labelled(["true", "maybe", "false"]))]))
    said = "test.jsonl line 3: the answer is 'maybe', expected one of `labels` (true, false)"
    assert said in refused(data=data, labels=["true", "false"])
    assert "3 different answers" in refused(data=data, positive="true")
    data = str(write_data(tmp_path / "truth", labelled(TRUTH)))
    assert "`positive` is yes, expected one of true, false" in refused(data=data, positive="yes")


def test_a_row_that_cannot_be_tokenized_is_named_or_skipped(tmp_path):
    """A conversation needs a chat template, which is known once there is a tokenizer."""
    chat = [{"role": "user", "content": "5?"}, {"role": "assistant", "content": "5"}]
    folders = write_folders(tmp_path, ())
    settings = {"model": str(folders.base), "max_tokens": 1, "data": str(tmp_path / "data")}
    write_data(tmp_path / "data", [*questions_of(3), {"messages": chat}])
    with pytest.raises(EvaluateError, match=r"test.jsonl line 4: messages need a chat template"):
        measured(**settings)
    report = measured(**settings, skip_bad=True)
    assert (report.bad_rows, report.groups) == (1, {"data": 3})
    assert not report.layout["chat_template"]
    write_data(tmp_path / "data", [{"messages": chat}])
    with pytest.raises(EvaluateError, match=r"no question is left: .* line 1: messages need"):
        measured(**settings, skip_bad=True)
    base = copy_base(folders.base, tmp_path / "chatty", CHATML)
    assert measured(**settings | {"model": str(base)}).layout["chat_template"]


def test_every_tree_is_asked_a_true_and_a_false_question_and_for_a_parent():
    questions = trees()
    assert [(group.name, group.labels) for group in questions.groups] == [
        *(("relationship", ("true", "false")), ("find_parent", ()))
    ]
    assert questions.sizes() == {"relationship": 60, "find_parent": 30}
    of_tree: dict[str, Counter] = {}
    for question in questions.items:
        tree, rest = question.example.context.removeprefix("Tree: ").split(", Task: ")
        of_tree.setdefault(tree, Counter())[question.answer] += 1
        child = rest.split("Child: ")[1].split(",")[0]
        if question.group == "find_parent":
            rows = tree.split("\n")
            at = next(i for i, row in enumerate(rows) if row.lstrip("+") == child)
            above = [row for row in rows[:at] if row.count("+") == rows[at].count("+") - 1]
            assert question.answer == above[-1].lstrip("+")
    assert len(of_tree) == 30
    assert all(counts["true"] == counts["false"] == 1 for counts in of_tree.values())


def test_the_options_of_trees_are_used():
    assert trees(stage="medium", find_parent=0).sizes() == {"relationship": 60}
    assert trees(stage="medium", find_parent=2).sizes()["find_parent"] in range(31, 61)
    large = texts_of(trees(stage="large", max_nodes=20))
    assert max(text.count("\n") + 1 for text, _ in large) == 20
    every = Counter(answer for _, answer in texts_of(trees(reference_sampling=True, find_parent=0)))
    assert every["false"] > every["true"]
    assert trees(positive="false").groups[0].labels == ("false", "true")
    assert "expected one of true, false" in refused(task="textualized-tree", positive="AB")
    for other in (trees(data_seed=43), trees(split="valid"), trees(stage="medium")):
        assert not set(texts_of(trees())) & set(texts_of(other))


@pytest.mark.parametrize(("task", "file"), [("amazon-reviews", REVIEWS), ("commitpackft", COMMITS)])
def test_reviews_and_commits_come_from_a_file(monkeypatch, task, file):
    for name, size in {"test": 8, "valid": 5}.items():
        monkeypatch.setattr(HUB_TASKS[task], name, size)
    found = {"task": task, "file": str(file)}
    test, valid = asked(**found), asked(**found, split="valid")
    assert (len(test.items), len(valid.items)) == (8, 5)
    assert not set(texts_of(test)) & set(texts_of(valid))
    assert texts_of(asked(**found, data_seed=1)) != texts_of(test)
    assert texts_of(asked(**found, limit=3)) == texts_of(test)[:3]
    assert bool(test.groups[0].labels) == (task == "amazon-reviews")
