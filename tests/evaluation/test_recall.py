"""Needles in prompts of a given length: where they lie, what is right, and what cannot be read."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.errors import EvaluateError
from kmerge_mlx.evaluation.questions import Questions, recall_questions
from kmerge_mlx.evaluation.report import group_scores
from kmerge_mlx.evaluation.scoring import Prediction
from kmerge_mlx.evaluation.settings import EvaluateSettings
from tests.cli_runner import CHATML, run
from tests.conftest import UPSTREAM
from tests.data.test_recall import stated
from tests.evaluations import silent, words_of, write_folders

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# The tests' tokenizer knows trees: a sentence takes it some 35 tokens.
LONG = {"text": (500, 1000), "tree": (60, 100, 500)}


class Written:
    """Prompts, and how many were counted to write them."""

    def __init__(self, template: str | None = None, **settings):
        self.tokenizer, self.counted = load_tokenizer(UPSTREAM / "base"), 0
        if template is not None:
            self.tokenizer._tokenizer.chat_template = template
            self.tokenizer.has_chat_template = True
        config = EvaluateSettings.of(
            {"task": "recall", "haystack": "text", "num_needles": 4} | settings
        )
        self.questions: Questions = recall_questions(config, self.count, silent)

    def count(self, example) -> int:
        self.counted += 1
        return len(self.ids(example))

    def ids(self, example) -> list[int]:
        return tokenize(self.tokenizer, example).prompt_ids

    def sizes(self, length: int) -> list[int]:
        places = {group.name: group.place for group in self.questions.groups}
        mine = [q for q in self.questions.items if places[q.group][0] == length]
        return [len(self.ids(question.example)) for question in mine]


@pytest.mark.parametrize("haystack", LONG)
def test_a_prompt_keeps_to_its_length_and_fills_it(haystack):
    written = Written(haystack=haystack, length=LONG[haystack], depth=DEPTHS)
    for length in LONG[haystack]:
        sizes = written.sizes(length)
        assert len(sizes) == 4 * len(DEPTHS)
        assert 0.9 * length <= min(sizes) <= max(sizes) <= length
    # Looking for the right size one sentence after the other would count hundreds.
    assert written.counted < 25 * len(written.questions.items)


def test_a_chat_template_counts():
    for template in (None, CHATML):
        found = Written(template, haystack="text", length=(500,), depth=(0.5,))
        assert 450 <= min(found.sizes(500)) <= max(found.sizes(500)) <= 500
    rendered = found.tokenizer.decode(found.ids(found.questions.items[0].example))
    assert rendered.startswith("<|im_start|>user")


def test_an_exact_string_is_stated_at_its_depth_among_the_same_sentences_and_asked_for():
    questions = Written(haystack="text", length=(1500,), depth=DEPTHS).questions
    places = {group.name: group.place for group in questions.groups}
    texts: dict[str, set[str]] = {}
    for question in questions.items:
        example = question.example
        _, answers = stated(example.context, example.prompt)
        assert answers == [question.answer.strip()]
        assert question.answer == f" {answers[0]}"
        sentences = re.split(r"(?<=[a-z0-9]\.) ", example.context)
        (at,) = [i for i, s in enumerate(sentences) if s.endswith(f" {answers[0]}.")]
        depth = at / (len(sentences) - 1)
        assert depth == pytest.approx(places[question.group][1], abs=0.03)
        assert len(sentences) > 20
        others = " ".join(sentences[:at] + sentences[at + 1 :])
        texts.setdefault(example.prompt, set()).add(others)
    assert len(texts) == 4
    assert all(len(others) == 1 for others in texts.values())


def test_the_node_asked_for_stands_at_its_depth_of_the_same_tree():
    questions = Written(haystack="tree", length=(300,), depth=DEPTHS).questions
    places = {group.name: group.place for group in questions.groups}
    trees: dict[str, int] = {}
    for question in questions.items:
        form = r"Tree: (.*), Task: Find Parent, Child: (\w\w), Answer: "
        tree, child = re.fullmatch(form, question.example.context, re.DOTALL).groups()
        assert question.example.prompt is None
        rows = tree.split("\n")
        at = [row.lstrip("+") for row in rows].index(child)
        assert (at - 1) / (len(rows) - 2) == pytest.approx(places[question.group][1], abs=0.03)
        above = [row for row in rows[:at] if row.count("+") == rows[at].count("+") - 1]
        assert question.answer == above[-1].lstrip("+")
        assert all(b.count("+") <= a.count("+") + 1 for a, b in pairwise(rows))
        trees[tree] = trees.get(tree, 0) + 1
    assert list(trees.values()) == [len(DEPTHS)] * 4


def test_the_same_seed_writes_the_same_and_another_other_prompts():
    one = Written(length=(250,)).questions.items
    assert one == Written(length=(200, 250)).questions.items[-len(one) :]
    assert not set(one) & set(Written(length=(250,), data_seed=1).questions.items)


def test_a_length_without_a_prompt_is_refused():
    for haystack, length, said in (
        ("text", 30, "`length` is 30, and a needle and its question alone have "),
        ("tree", 9, "`length` is 9, and a needle and its question alone have "),
        ("tree", 9000, "`length` is 9,000, and a tree of all 676 names has fewer tokens: use"),
    ):
        with pytest.raises(EvaluateError) as caught:
            Written(haystack=haystack, length=(length,), num_needles=1)
        assert str(caught.value).startswith(said)


def test_a_number_may_stand_among_other_words_and_a_name_may_not():
    def recall(haystack: str, answer: str, *texts: str) -> float:
        (group,) = Written(haystack=haystack, length=(250,), depth=(0.5,)).questions.groups
        answers = [Prediction(text, 1.0, 2, 3, 1) for text in texts]
        return group_scores(group, [(answer,)] * len(texts), answers)["recall"].value

    answers = ("12345", "The number is 12345.", " 1234 5", "123456")
    assert recall("text", " 12345", *answers) == 2 / 4
    assert recall("tree", "AB", "AB", " AB\n", "AB is it", "CD") == 2 / 4


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A model with a context of 256 positions."""
    folder = tmp_path_factory.mktemp("narrow")
    return write_folders(folder, (1, 4), max_position_embeddings=256, num_hidden_layers=1)


def test_what_is_longer_than_the_context_is_left_out_with_a_note(tmp_path, narrow):
    picture = tmp_path / "recall.svg"
    recall = ("--task", "recall", "--length", 150, "--length", 600, "--num-needles", 1, "-m", 2)
    result = run(
        *("evaluate", *narrow.flags(), *recall, "--depth", 0.5, "--depth", 0, "--k", 4),
        *("--baseline", "all", "--plot", picture, "--timed", 2),
    )
    assert result.code == 0, result.err
    note = r"note: base without adapter is left out: the prompt has \d+ positions, and the "
    assert re.search(note + "model's context is 256: shorten it", result.err)
    assert "note: speculative prefill to 1/4 is left out: the prompt has" in result.err
    ratios: list[set[float]] = []
    for table, length in zip(result.out.split("\n\n"), (150, 600), strict=True):
        title, *lines = table.splitlines()
        assert title == f"recall at {length} tokens: 1 question at each depth"
        heads, *rows = (re.split(r" {2,}", line.strip()) for line in lines)
        assert heads == ["ratio", "KV cache", "TTFT", "depth 0%", "depth 50%"]
        assert [row[0] for row in rows] == [
            *("K=4", "mean of 4", "last 1/4 of the tokens", "one token in 4")
        ]
        ratios.append({float(row[1].removesuffix("x")) for row in rows})
        assert all(re.fullmatch(r"[\d.]+% \([\d.]+-[\d.]+\)", cell) for r in rows for cell in r[4:])
    # The raw question weighs less in a longer prompt.
    (short,), (long,) = ratios
    assert 1 < short < long < 4
    assert words_of(picture) >= {"150 tokens", "600 tokens", "recall", "K=4", "0%", "50%"}
    picture.unlink()
    alone = run("evaluate", "--model", narrow.base, *recall, "--plot", picture)
    assert (alone.code, alone.out, picture.exists()) == (1, "", False)
    assert "is left out: " in alone.err
    assert "error: no method can read these prompts" in alone.err
