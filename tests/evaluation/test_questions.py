"""What is asked: rows of every format, labels, trees, reviews and commits."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from kmerge_mlx.data import HUB_TASKS
from kmerge_mlx.errors import DataError, EvaluateError, KMergeError
from kmerge_mlx.evaluation.questions import Group, Questions, load_questions
from kmerge_mlx.evaluation.report import group_scores
from kmerge_mlx.evaluation.scoring import Prediction
from kmerge_mlx.evaluation.settings import EvaluateConfig
from tests.cli_runner import CHATML, copy_base
from tests.conftest import UPSTREAM
from tests.data.test_reviews_and_commits import COMMITS, REVIEWS
from tests.evaluations import (
    labelled,
    measured,
    questions_of,
    silent,
    write_data,
    write_folders,
)

BASE = str(UPSTREAM / "base")
TRUTH = ["true", "false", "true", "true", "false", "true"]


def asked(**settings) -> Questions:
    return load_questions(EvaluateConfig(model=BASE, **settings), silent)


def refused(kind: type[KMergeError] = EvaluateError, **settings) -> str:
    with pytest.raises(kind) as caught:
        asked(**settings)
    return str(caught.value)


def labels_of(answers: list[str], tmp_path: Path, **settings) -> tuple[str, ...]:
    data = write_data(tmp_path / "data", labelled(answers))
    return asked(data=str(data), **settings).groups[0].labels


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


def test_rows_of_every_format_are_asked(tmp_path):
    rows = [
        {"prompt": "Two?", "completion": "2"},
        {"context": "Read.", "prompt": "Three?", "completion": "3"},
        {"text": "Four? 4", "split": 6},
        {"messages": [{"role": "user", "content": "5?"}, {"role": "assistant", "content": "5"}]},
    ]
    found = asked(data=str(write_data(tmp_path, rows))).items
    assert [question.answer for question in found] == ["2", "3", "4", "5"]
    assert [(q.example.context, q.example.prompt) for q in found[:3]] == [
        ("Two?", None),
        ("Read.", "Three?"),
        ("Four? ", None),
    ]


def test_an_answer_in_parts_is_their_text_and_a_call_has_none(tmp_path):
    user = {"role": "user", "content": "?"}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    rows = [
        {"messages": [user, {"role": "assistant", "content": parts}]},
        {"messages": [user, call]},
    ]
    assert [q.answer for q in asked(data=str(write_data(tmp_path, rows))).items] == ["ab", ""]


def test_few_answers_that_come_often_are_labels_the_most_frequent_first(tmp_path):
    assert labels_of(TRUTH, tmp_path) == ("true", "false")
    assert labels_of([" true", "true\n", "true", "false"], tmp_path) == ("true", "false")
    assert labels_of(["b", "a", "a", "b"], tmp_path) == ("a", "b")
    assert labels_of(["always"] * 5, tmp_path) == ("always",)
    assert labels_of([str(i) for i in range(20)] * 2, tmp_path) != ()


def test_answers_that_are_many_or_come_once_are_texts(tmp_path):
    assert labels_of(["a", "b", "c", "a", "a"], tmp_path) == ()
    assert labels_of([str(i) for i in range(21)] * 3, tmp_path) == ()
    assert labels_of(["only"], tmp_path) == ()


def test_labels_may_be_given_and_so_may_the_positive_one(tmp_path):
    assert labels_of(["true"], tmp_path, labels=("false", "true")) == ("false", "true")
    assert labels_of(TRUTH, tmp_path, positive="false") == ("false", "true")
    given = {"labels": ("no", "true", "false"), "positive": "false"}
    assert labels_of(TRUTH, tmp_path, **given) == ("false", "no", "true")


def test_an_answer_outside_the_labels_is_named_with_its_line(tmp_path):
    data = write_data(tmp_path, ["", *map(json.dumps, labelled(["true", "maybe", "false"]))])
    assert refused(data=str(data), labels=("true", "false")) == (
        f"{data / 'test.jsonl'} line 3: the answer is 'maybe', expected one of --labels "
        "(true, false)"
    )


def test_a_positive_label_that_is_none_is_refused(tmp_path):
    data = str(write_data(tmp_path, labelled(TRUTH)))
    assert refused(data=data, positive="yes") == "--positive is yes, expected one of true, false"
    many = str(write_data(tmp_path / "many", labelled(["a", "b", "c"])))
    assert "3 different answers to 3 questions are no labels" in refused(data=many, positive="a")


def test_one_label_alone_is_scored():
    group = Group("any", ("yes",))
    answers = [Prediction(text, 1.0, 2, 3, 1) for text in ("yes", " yes\n", "no")]
    scores = group_scores(group, ["yes"] * 3, answers)
    assert scores["accuracy"].value == scores["balanced_accuracy"].value == pytest.approx(2 / 3)
    assert scores["majority_accuracy"].value == scores["majority_balanced_accuracy"].value == 1
    assert scores["f1"].value == scores["f1_macro"].value == pytest.approx(0.8)


def test_f1_is_of_the_first_label():
    texts, answers = ["a", "b", "a", "x"], ["a", "a", "a", "b"]
    predictions = [Prediction(text, 1.0, 2, 3, 1) for text in texts]
    found = [
        group_scores(Group("any", labels), answers, predictions)["f1"].value
        for labels in (("a", "b"), ("b", "a"))
    ]
    assert found == pytest.approx([2 * 2 / (3 + 2), 0])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"}', "found 'prompt', expected prompt and completion"),
        ('{"prompt": "a", "completion": ""}', "completion is empty, expected an answer"),
        ("{", "not JSON"),
    ],
)
def test_a_row_without_an_answer_is_bad_and_may_be_skipped(tmp_path, line, said):
    rows = [json.dumps(row) for row in labelled(["a", "b"])]
    data = str(write_data(tmp_path, [rows[0], line, rows[1]]))
    assert f"test.jsonl line 2: {said}" in refused(DataError, data=data)
    questions = asked(data=data, skip_bad=True)
    assert ([q.answer for q in questions.items], questions.bad) == (["a", "b"], 1)


def test_no_rows_and_no_data_are_refused(tmp_path):
    assert "holds no example" in refused(DataError, data=str(write_data(tmp_path, [])))
    bad = write_data(tmp_path / "bad", ["{"])
    assert "every line is bad" in refused(DataError, data=str(bad), skip_bad=True)
    assert "is a file: give the folder" in refused(DataError, data=str(tmp_path / "test.jsonl"))


def test_a_row_that_cannot_be_tokenized_is_named_or_skipped(tmp_path):
    """A conversation needs a chat template, which is known once there is a tokenizer."""
    chat = [{"role": "user", "content": "5?"}, {"role": "assistant", "content": "5"}]
    rows = [*questions_of(3), {"messages": chat}]
    folders = write_folders(tmp_path, ())
    settings = {"model": str(folders.base), "max_tokens": 1}
    settings["data"] = str(write_data(tmp_path / "data", rows))
    with pytest.raises(EvaluateError, match=r"test.jsonl line 4: messages need a chat template"):
        measured(**settings)
    report = measured(**settings, skip_bad=True)
    assert (report.questions.bad, report.questions.sizes()) == (1, {"data": 3})
    assert not report.layout.chat_template
    write_data(tmp_path / "data", rows[3:])
    with pytest.raises(EvaluateError, match=r"no question is left: .* line 1: messages need"):
        measured(**settings, skip_bad=True)
    base = copy_base(folders.base, tmp_path / "chatty", CHATML)
    report = measured(**settings | {"model": str(base)})
    assert report.layout.chat_template
    assert report.rows[0].results["data"].prompt_tokens > 10


def test_every_tree_is_asked_a_true_and_a_false_question_and_for_a_parent():
    questions = trees(find_parent=1)
    assert [group.name for group in questions.groups] == ["relationship", "find_parent"]
    assert [group.labels for group in questions.groups] == [("true", "false"), ()]
    assert questions.sizes() == {"relationship": 60, "find_parent": 30}
    answers = Counter(q.answer for q in questions.items if q.group == "relationship")
    assert answers == {"true": 30, "false": 30}
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


@pytest.mark.parametrize(("find_parent", "more"), [(0, 0), (2, 60)])
def test_questions_for_a_parent_are_as_many_as_asked_for(find_parent, more):
    questions = trees(stage="medium", find_parent=find_parent)
    assert questions.sizes().get("find_parent", 0) in range(more // 2, more + 1)
    assert len(questions.groups) == 1 + bool(find_parent)


def test_trees_may_be_cut_to_some_nodes():
    def largest(**settings) -> int:
        return max(text.count("\n") + 1 for text, _ in texts_of(trees(stage="large", **settings)))

    assert largest(max_nodes=20) == 20 < largest()


def test_the_same_seed_asks_the_same_and_another_asks_about_other_trees():
    one, two = trees(), trees()
    assert texts_of(one) == texts_of(two)
    for other in (trees(data_seed=43), trees(split="valid"), trees(stage="medium")):
        assert not set(texts_of(one)) & set(texts_of(other))


def test_reference_sampling_asks_every_pair():
    questions = trees(reference_sampling=True, find_parent=0, stage="medium")
    counts = Counter(question.answer for question in questions.items)
    assert counts["false"] > 4 * counts["true"]


def test_a_trees_positive_label_may_be_chosen():
    assert trees(positive="false").groups[0].labels == ("false", "true")
    said = refused(task="textualized-tree", positive="AB")
    assert said == "--positive is AB, expected one of true, false"


@pytest.mark.parametrize(
    ("task", "file", "begins"),
    [
        ("amazon-reviews", REVIEWS, "Review: "),
        ("commitpackft", COMMITS, "Update the old python code"),
    ],
)
def test_reviews_and_commits_come_from_a_file(tmp_path, monkeypatch, task, file, begins):
    monkeypatch.setattr(HUB_TASKS[task], "test", 8)
    monkeypatch.setattr(HUB_TASKS[task], "valid", 5)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    test = asked(task=task, file=str(file))
    valid = asked(task=task, file=str(packed), split="valid")
    assert (len(test.items), len(valid.items)) == (8, 5)
    assert all(q.example.context.startswith(begins) and q.answer for q in test.items)
    assert not set(texts_of(test)) & set(texts_of(valid))
    assert texts_of(asked(task=task, file=str(packed))) == texts_of(test)
    assert texts_of(asked(task=task, file=str(file), data_seed=1)) != texts_of(test)
    assert texts_of(asked(task=task, file=str(file), limit=3)) == texts_of(test)[:3]
    assert bool(test.groups[0].labels) == (task == "amazon-reviews")


def test_a_bad_review_is_named_or_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(HUB_TASKS["amazon-reviews"], "test", 8)
    monkeypatch.setattr(HUB_TASKS["amazon-reviews"], "valid", 5)
    rows = REVIEWS.read_text().splitlines()
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join([*rows[:3], '{"rating": 5}', *rows[3:]]))
    task = {"task": "amazon-reviews", "file": str(path)}
    assert (
        refused(DataError, **task) == f"{path} line 4: text is None, expected the text of a review"
    )
    questions = asked(**task, skip_bad=True)
    assert (len(questions.items), questions.bad) == (8, 1)
    said = refused(**task, skip_bad=True, labels=("positive",))
    assert said.startswith("question ")
    assert "the answer is 'negative', expected one of --labels (positive)" in said


def test_a_file_too_small_for_the_papers_splits_says_what_to_do():
    said = refused(DataError, task="amazon-reviews", file=str(REVIEWS))
    assert said == (
        f"{REVIEWS} is too small for the paper's splits (found 37 distinct prompts, expected more "
        "than `test` 50000 and `valid` 1000): `kmerge-mlx data amazon-reviews --file "
        f"{REVIEWS} --test N --valid N` draws others, for `data`"
    )
    assert "there is no such file" in refused(DataError, task="commitpackft", file="no.jsonl")
