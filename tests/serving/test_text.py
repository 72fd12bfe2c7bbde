"""An answer's text: all of it but a stop text and markers, streamed or not, however it ends."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response
from mlx_lm.tool_parsers.json_tools import parse_tool_call

from kmerge_mlx.base import read_config, read_tokenizer
from kmerge_mlx.serving.answers import Answer
from kmerge_mlx.serving.requests import ChatCompletion, TextCompletion
from tests.conftest import UPSTREAM
from tests.servers import serving
from tests.vocabularies import PIECES, base_with, byte_level, sentencepiece, tekken

CALL = '<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'


@cache
def tokenizer_of(markers: bool = True) -> Any:
    """The fixture's tokenizer, as one of a model that thinks and calls tools."""
    path = UPSTREAM / "base"
    tokenizer = read_tokenizer(path, read_config(path), "base")
    if markers:
        tokenizer._think_start, tokenizer._think_end = "<think>", "</think>"
        tokenizer._tool_call_start, tokenizer._tool_call_end = "<tool_call>", "</tool_call>"
        tokenizer._tool_parser = parse_tool_call
    return tokenizer


def answered(
    text: str, chat: bool, stream: bool, end: str | None, stop: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer to a model that writes a text, put together again, and the choices it came in.

    ``end``: by the end token (``stop``), by ``max_tokens`` (``length``), or broken off (None).
    """
    tokenizer, kind = tokenizer_of(), ChatCompletion if chat else TextCompletion
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    asked |= {"stop": list(stop), "stream": stream}
    context = GenerationContext(True, True, parse_tool_call, TextStateMachine(), "normal", [])
    answer, choices = Answer(kind.model_validate(asked), context, tokenizer), []
    ids = tokenizer.encode(text)
    ends = [None] * len(ids)
    if end == "stop":
        ids, ends = [*ids, min(tokenizer.eos_token_ids)], [*ends, "stop"]
    elif end == "length" and ids:
        ends[-1] = "length"
    for token, finish in zip(ids, ends, strict=True):
        answer.add(Response("", token, 0.0, finish, ()))
        if stream and (choice := answer.chunk()):
            choices.append(choice)
        if answer.finish_reason is not None:
            break
    else:
        answer.let_go()
        choices += [choice] if stream and (choice := answer.chunk()) else []
    choices = choices if stream else [answer.rest()]
    whole: dict[str, Any] = {"text": "", "reasoning": "", "calls": [], "end": None}
    for choice in choices:
        part = choice.get("delta") or choice.get("message") or choice
        whole["text"] += part.get("content") or part.get("text") or ""
        whole["reasoning"] += part.get("reasoning") or ""
        whole["calls"] += part.get("tool_calls", [])
        whole["end"] = choice["finish_reason"] or whole["end"]
    return whole, choices


def until_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """What is left of a text, letter by letter: the oracle."""
    for end in range(len(text) + 1):
        if done := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, done))], True
    return text, False


WAYS = [(stream, end) for stream in (False, True) for end in ("stop", "length", None)]
LETTERS = st.text("ab\u00e9\U0001f600<", max_size=14)


@settings(deadline=None)
@given(
    text=LETTERS,
    stops=st.lists(st.text("ab\u00e9<", min_size=1, max_size=4), max_size=3).map(tuple),
    chat=st.booleans(),
    way=st.sampled_from(WAYS),
)
def test_only_a_completed_stop_text_is_kept_back(text, stops, chat, way):
    stream, end = way
    found, _ = answered(text, chat, stream, end, stops)
    expected, stopped = until_stop(text, stops)
    assert found["text"] == expected
    if text:
        assert found["end"] == ("stop" if stopped else end)


@pytest.mark.parametrize(("stream", "end"), WAYS)
def test_the_beginning_of_a_marker_is_text(stream, end):
    for text in ("a <tool_", "a <think", "<", "a <tool_call", "a <tool<think"):
        assert answered(text, True, stream, end)[0]["text"] == text
    found, _ = answered("<think>so</thi", True, stream, end)
    assert (found["text"], found["reasoning"]) == ("", "so</thi")


@pytest.mark.parametrize(("stream", "end"), WAYS)
def test_a_tool_call_that_is_none_is_text(stream, end):
    calls = ("{", "5", '["x"]', "null", '{"name": 5, "arguments": {}}', '{"name": "look"}', "{}")
    for said in calls:
        for text in (f"a <tool_call>{said}</tool_call> b", f"a <tool_call>{said}"):
            found, _ = answered(text, True, stream, end)
            assert (found["text"], found["calls"], found["end"]) == (text, [], end)


@pytest.mark.parametrize(("stream", "end"), WAYS)
def test_thinking_and_calls_are_told_apart_from_text(stream, end):
    found, choices = answered(f"<think>so</think>a {CALL}b{CALL[:-4]}", True, stream, end)
    assert (found["text"], found["reasoning"]) == (f"a b{CALL[:-4]}", "so")
    assert [json.loads(call["function"]["arguments"]) for call in found["calls"]] == [{"at": 1}]
    assert found["end"] == ("tool_calls" if end == "stop" else end)
    roles = [(c.get("delta") or c["message"]).get("role") for c in choices]
    assert roles == ["assistant", *[None] * (len(choices) - 1)]


def test_a_completion_has_its_markers_as_text():
    text = f"<think>so</think> a {CALL} <tool"
    for stream, end in WAYS:
        assert answered(text, False, stream, end)[0]["text"] == text


def test_text_is_streamed_as_soon_as_it_cannot_be_a_stop_text():
    _, choices = answered("ab ab ab", False, True, "stop", ("abc",))
    assert len(choices) == 3


# Over HTTP


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A server of a SentencePiece model whose table has rows without a token."""
    base = base_with(tmp_path_factory.mktemp("padded") / "base", sentencepiece(), 384)
    with serving(base, None) as server:
        yield server


def test_an_id_without_a_token_has_no_text(padded):
    for more in ({}, {"logprobs": 2}, {"seed": 1}, {"stream": True}):
        asked = {"prompt": "the", "max_tokens": 3, "logit_bias": {"380": 100}} | more
        answer = padded.complete(**asked)
        assert answer.status == 200
        if "stream" not in more:
            (choice,) = answer.json["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("", "length")
    for seed in range(8):
        asked = {"prompt": "the", "max_tokens": 20, "temperature": 1.5, "seed": seed, "top_k": 0}
        answer = padded.complete(**asked, logprobs=20)
        assert answer.status == 200
        assert len(answer.json["choices"][0]["logprobs"]["top_logprobs"][0]) == 20
    padded.assert_alive()


def test_log_probabilities_name_each_token_with_its_space_and_its_bytes(padded):
    biases = {str(259 + PIECES.index(piece)): 100 for piece in ("\u2581t", "t")}
    asked = {"max_tokens": 3, "temperature": 0, "logit_bias": biases}
    choice = padded.complete(prompt="the", logprobs=2, **asked).json["choices"][0]
    assert {*choice["logprobs"]["tokens"]} <= {" t", "t"}
    assert "".join(choice["logprobs"]["tokens"]).removeprefix(" ") == choice["text"]
    for likeliest in choice["logprobs"]["top_logprobs"]:
        assert likeliest.keys() == {" t", "t"}
    entry = padded.chat("the", logprobs=True, top_logprobs=2, **asked).json["choices"][0]
    for token in entry["logprobs"]["content"]:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert {one["token"] for one in token["top_logprobs"]} == {" t", "t"}


def test_tokens_with_one_text_keep_their_own_log_probability(padded):
    asked = {"prompt": "the", "max_tokens": 1, "logit_bias": {"380": 100, "381": 100, "382": 100}}
    choice = padded.complete(**asked, logprobs=3).json["choices"][0]
    (likeliest,) = choice["logprobs"]["top_logprobs"]
    assert len(likeliest) == 3
    assert choice["logprobs"]["tokens"] == [""]
    assert "" in likeliest


@pytest.mark.parametrize("made", [byte_level, tekken])
def test_the_text_is_that_of_the_tokens(made, tmp_path):
    base = base_with(tmp_path / "base", made(), 720, "<|endoftext|>")
    tokenizer = byte_level()
    biases = {str(tokenizer.encode(text).ids[0]): 30 for text in (" the", " \u00e9")}
    with serving(base, None) as server:
        for seed in range(4):
            asked = {"max_tokens": 12, "temperature": 1, "seed": seed, "logit_bias": biases}
            chosen = server.chat("The", logprobs=True, **asked).json["choices"][0]
            ids = [token["id"] for token in chosen["logprobs"]["content"]]
            # The end token alone is not text.
            ids = ids[:-1] if chosen["finish_reason"] == "stop" else ids
            text = tokenizer.decode(ids, skip_special_tokens=False)
            assert chosen["message"]["content"] == text


def test_the_bundled_models_answer_is_whole_beside_a_stop_text_that_did_not_come():
    with serving("bundled", "bundled") as server:
        prompt = (UPSTREAM.parents[2] / "examples" / "tree.txt").read_text()
        for stop in (["even"], ["e."], ["x"], ["true."]):
            for stream in (False, True):
                answer = server.complete(prompt=prompt, stop=stop, stream=stream)
                lines = answer.body.decode().split("data: ")[1:-1] if stream else [answer.body]
                pieces = [json.loads(line)["choices"][0] for line in lines]
                assert "".join(piece["text"] for piece in pieces) == "true"
