"""Tokens to text, streamed or whole: what ``tokenizer.decode`` gives, for every kind of decoder."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import stream_generate as host_stream_generate
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kmerge_mlx import batch_generate, generate, stream_generate
from kmerge_mlx.base import read_config, read_tokenizer
from kmerge_mlx.detokenizer import exact
from kmerge_mlx.model import load
from tests.cli_runner import copy_base
from tests.conftest import UPSTREAM
from tests.tiny import qwen2_config, write_base
from tests.vocabularies import PIECES, STEPS, byte_level, sentencepiece, tekken

KINDS = {
    "sentencepiece": sentencepiece(),
    "sentencepiece that keeps the first space": sentencepiece(decoders.Sequence(STEPS)),
    "metaspace": sentencepiece(decoders.Metaspace()),
    "wordpiece": sentencepiece(decoders.WordPiece(cleanup=False)),
    "byte level": byte_level(),
    "tekken": tekken(),
}
TOKENIZERS = {
    name: exact(PreTrainedTokenizerFast(tokenizer_object=made)) for name, made in KINDS.items()
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_what_is_streamed_is_what_decode_gives(name, data):
    tokenizer = TOKENIZERS[name]
    size = len(tokenizer)
    common = st.integers(max(0, size - len(PIECES)), size + 5)  # some without a token
    ids = data.draw(st.lists(st.integers(0, size + 5) | common, max_size=40))
    growing, pieces = tokenizer.detokenizer, []
    for token in ids:
        growing.add_token(token)
        pieces.append(growing.last_segment)
    growing.finalize()
    assert "".join([*pieces, growing.last_segment]) == tokenizer.decode(ids) == growing.text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_comes_as_soon_as_nothing_can_change_it(name):
    tokenizer = TOKENIZERS[name]
    growing = tokenizer.detokenizer
    for token in tokenizer.encode("a \u00e9a a", add_special_tokens=False):
        growing.add_token(token)
    assert growing.text == tokenizer.decode(growing.tokens)


def test_a_byte_level_vocabulary_gets_its_decoder():
    text = " the caf\u00e9 \U0001f600\n  is"
    tokenizer = TOKENIZERS["tekken"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_is_spelled_with_its_space_and_its_bytes():
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.get_vocab()
    spell = tokenizer.detokenizer.spell
    assert [spell(ids[piece]) for piece in ("\u2581t", "t", "\u2581", "\u00e9")] == [
        *((" t", b" t"), ("t", b"t"), (" ", b" "), ("\u00e9", b"\xc3\xa9")),
    ]
    assert spell(ids["\ufffd"]) == ("\ufffd", b"\xef\xbf\xbd")
    assert spell(ids["<0xE2>"]) == ("bytes:\\xe2", b"\xe2")
    assert spell(ids["<0x41>"]) == ("A", b"A")
    assert spell(len(ids)) == ("", b"")
    whole = TOKENIZERS["byte level"]
    for text in ("\U0001f600", " the", "\ufffd"):
        found = map(whole.detokenizer.spell, whole.encode(text, add_special_tokens=False))
        assert b"".join(data for _, data in found) == text.encode()


def test_every_way_to_generate_gives_the_text_of_decode(tmp_path):
    """The oracle is transformers' decode of the generated ids; ids past the tokens are likely."""
    base = write_base(tmp_path / "base", qwen2_config(vocab_size=1400))
    model, tokenizer = load(str(base))
    plain = AutoTokenizer.from_pretrained(base)
    space = plain.encode(" the", add_special_tokens=False)[0]
    first = {"logits_processors": [lambda ids, logits: logits.at[..., space].add(first_only(ids))]}

    def first_only(ids: Any) -> float:
        return 1e3 if ids.size == 3 else 0.0

    for prompt in ([7, 8, 9], [5, 6, 7]):
        responses = list(stream_generate(model, tokenizer, prompt, 30, **first))
        ids = [r.token for r in responses if r.finish_reason != "stop"]
        text = "".join(response.text for response in responses)
        assert text == plain.decode(ids)
        assert text.startswith(" ")
        assert generate(model, plain, prompt, max_tokens=30, **first) == text
        together = batch_generate(model, plain, [prompt], max_tokens=30, **first)
        assert together.texts == [text]
        theirs = host_stream_generate(model, tokenizer, prompt, 30, **first)
        assert "".join(response.text for response in theirs) == text


def test_a_loaded_tokenizer_is_repaired(tmp_path):
    base = copy_base(UPSTREAM / "base", tmp_path / "base", model_type="llama")
    content = json.loads((base / "tokenizer.json").read_text())
    content["decoder"] = json.loads(KINDS["sentencepiece"].to_str())["decoder"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(base, read_config(base), "base")
    assert tokenizer.decode(tokenizer.encode("AB the tree")) == "AB the tree"
