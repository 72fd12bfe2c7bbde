"""What the bundled base model begins as: its tokenizer, its rows, its first weights."""

from __future__ import annotations

import numpy as np
import pytest

from kmerge_mlx.base import default_pad_token_id
from kmerge_mlx.data.tasks import fingerprint
from kmerge_mlx.data.textualized_tree import FIND_PARENT, TreeTask
from tests.bundled_scripts import ASKED, END, NAMED, PROMPT, TREE


@pytest.mark.parametrize("text", [PROMPT, " leading", "trailing ", "\n\n+++\n", "a\x00b 木 🌳\r\n"])
def test_any_text_round_trips_whole_and_streamed(scripts, loaded_tokenizer, text):
    ids = loaded_tokenizer.encode(text, add_special_tokens=False)
    streamed = loaded_tokenizer.detokenizer
    for token in ids:
        streamed.add_token(token)
    streamed.finalize()
    assert loaded_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert scripts["tokenizer"].build().encode(text).ids == ids
    assert streamed.text == text


def test_a_node_takes_four_tokens_and_every_phrase_one(loaded_tokenizer):
    tokens = [loaded_tokenizer.decode([i]) for i in loaded_tokenizer.encode(PROMPT)]
    assert tokens == [
        *("Tree: ", "A", "B", "\n", "+", "C", "D", "\n", "++", "E", "F", "\n", "+", "G", "H"),
        *(", Task: Parent/Child Relationship", ", Parent: ", "A", "B", ", Child", ": ", "G", "H"),
        ", Answer: ",
    ]
    tokens = [loaded_tokenizer.decode([i]) for i in loaded_tokenizer.encode(TREE + NAMED)]
    assert tokens[15:] == [", Task: Find Parent, Child", ": ", "G", "H", ", Answer: "]
    assert loaded_tokenizer.encode(" ") == [default_pad_token_id(loaded_tokenizer)]
    assert loaded_tokenizer.eos_token_ids == {loaded_tokenizer.eos_token_id}


def test_a_row_weighs_text_and_answers_and_pads_the_tree_on_the_left(row_of, loaded_tokenizer):
    rows, decode = row_of((ASKED, "true"), (NAMED, "AB"), nodes=6), loaded_tokenizer.decode
    told, asked = rows.tree_weights[0], rows.asked_weights[0]
    assert rows.tree.shape == (1, 23)
    assert decode(rows.tree[0][told > 0]) == TREE
    assert (told[:8] == 0).all()
    assert set(rows.tree[0][:8]) == {loaded_tokenizer.eos_token_id}
    for row, question, answer in zip((0, 1), (ASKED, NAMED), ("true", "AB"), strict=True):
        assert decode(rows.asked[0, row][asked[row] == np.float32(0.1)]) == question
        assert decode(rows.asked[0, row][asked[row] == 1]) == answer + END
        assert decode(rows.asked[0, row][rows.answers[0, row]]) == answer + END


def test_no_training_tree_is_held_out(scripts, make, loaded_tokenizer, monkeypatch):
    tree_rows = scripts["rows"]

    def trees(held_out: set[int]) -> list[str]:
        rows = tree_rows.training_rows(make, 6, 0, 8, 42, held_out)
        real = zip(rows.tree, rows.tree_weights > 0, strict=True)
        return [loaded_tokenizer.decode(ids[kept])[6:] for ids, kept in real]

    plain = trees(set())
    left = trees({fingerprint(plain[0]), fingerprint(plain[3])})
    assert {i for i in range(8) if plain[i] != left[i]} == {0, 3}

    monkeypatch.setattr(tree_rows, "HELD_OUT", 2)
    asked = TreeTask(tree_rows.shapes(7)[1]).draw("valid", 1)[0]
    assert fingerprint(asked.text) in tree_rows.held_out_trees()


def test_validation_asks_held_out_trees_in_the_papers_format(scripts, make, loaded_tokenizer):
    shapes = scripts["rows"].shapes(10)
    rows = scripts["rows"].validation_rows(make, shapes, 6, 42)
    tasks = [TreeTask(shape, seed=42, questions_per_tree=2, find_parent=1) for shape in shapes]
    for index in range(6):
        _, questions = tasks[index % 2].draw("valid", index // 2)
        told = rows.tree[index][rows.tree_weights[index] > 0]
        for column, question in enumerate(questions):
            asked = rows.asked[index, column][rows.asked_weights[index, column] > 0]
            text = loaded_tokenizer.decode([*told, *asked], skip_special_tokens=True)
            assert text == question.prompt + question.answer
    assert set(rows.kinds.flat) == {"true", "false", FIND_PARENT}


def test_scores_count_whole_answers_and_balance_true_and_false(scripts, make, loaded_tokenizer):
    rows = scripts["rows"].validation_rows(make, scripts["rows"].shapes(10), 6, 42)
    scores = scripts["rows"].scores
    right = np.take_along_axis(rows.asked, rows.places + 1, -1)
    assert scores(rows, right) == {"balanced_accuracy": 1, "find_parent": 1}
    false = loaded_tokenizer.encode("false")[0]
    always_false = np.where(right == loaded_tokenizer.eos_token_id, right, false)
    assert scores(rows, always_false) == {"balanced_accuracy": 0.5, "find_parent": 0}
