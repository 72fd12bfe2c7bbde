"""The logits processor of a JSON schema, with three kinds of tokenizer."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kmerge_mlx.detokenizer import exact
from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation.structured import Follow, Schemas
from tests.vocabularies import ENDS, MAKERS

ROWS = 710


def model_of(name: str) -> tuple[Any, int]:
    made, end = MAKERS[name](), ENDS[name]
    return exact(PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end)), ROWS


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_are_allowed_where_a_text_goes_on_with_them(name):
    """The oracle: all texts that fit are known, and a token's bytes are the detokenizer's.

    Where only one text is left, llguidance allows only its usual tokens.
    """
    tokenizer, rows = model_of(name)
    values = ["a", "ab", "a b", "\u00e9\U0001f600", "the a"]
    whole = {json.dumps(value, ensure_ascii=False).encode() for value in values}
    (end,) = tokenizer.eos_token_ids
    spelled = {i: tokenizer.detokenizer.spell(i)[1] for i in set(tokenizer.get_vocab().values())}
    del spelled[end]
    grammar = Schemas(tokenizer).compile({"enum": values})
    failed: list[Exception] = []
    rng = np.random.default_rng(0)
    for _ in range(30):
        follow, ids, text = Follow(grammar, failed.append), [1, 2, 3], b""
        while True:
            logits = follow(mx.array(ids), mx.zeros((1, rows)))
            allowed = np.flatnonzero(np.isfinite(np.array(logits[0]))).tolist()
            left = [one for one in whole if one.startswith(text)]
            after = [text + spelled[i] for i in allowed if i != end]
            assert all(spelled[i] for i in allowed if i != end)
            assert all(any(one.startswith(next) for one in left) for next in after)
            assert all(one == text or any(map(one.startswith, after)) for one in left)
            assert (end in allowed) == (text in whole)
            token = int(rng.choice(allowed))
            if token == end:
                break
            ids, text = [*ids, token], text + spelled[token]
    assert not failed


def test_the_schema_begins_after_the_end_of_thinking():
    tokenizer, rows = model_of("byte level")
    (end,) = tokenizer.eos_token_ids
    marker = tokenizer.encode("</t>", add_special_tokens=False)
    follow = Follow(Schemas(tokenizer).compile({"enum": ["x"]}), pytest.fail, marker)
    ids = [5]
    for token in [*tokenizer.encode("so <</t", add_special_tokens=False), None]:
        allowed = np.isfinite(np.array(follow(mx.array(ids), mx.zeros((1, rows)))[0]))
        assert allowed.sum() == rows - 1
        assert not allowed[end]
        ids += [] if token is None else [token]
    follow(mx.array(ids), mx.zeros((1, rows)))
    logits = follow(mx.array([*ids, marker[-1]]), mx.zeros((1, rows), mx.bfloat16))
    assert logits.dtype == mx.bfloat16
    assert tokenizer.decode([int(mx.argmax(logits))]).startswith('"')


def test_a_table_without_the_tokens_that_must_follow_is_a_fault_and_not_a_crash():
    tokenizer, _ = model_of("byte level")
    failed: list[PromptError] = []
    follow = Follow(Schemas(tokenizer).compile({"enum": ["x"]}), failed.append)
    logits = mx.zeros((1, 1))
    for ids in ([5], [5, 0], [5, 0, 0]):
        assert follow(mx.array(ids), logits) is logits
    assert "no token of the model" in str(failed.pop())
    assert not failed
