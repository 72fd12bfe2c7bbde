"""What the bundled base model begins as: its tokenizer, its rows, its first weights."""

from __future__ import annotations

import pytest

from kmerge_mlx.base import default_pad_token_id
from kmerge_mlx.data.tasks import fingerprint
from kmerge_mlx.data.textualized_tree import TreeTask
from tests.bundled_scripts import NAMED, PROMPT, TREE


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
