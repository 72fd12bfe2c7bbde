"""What clients ask for: each field, its limits, and what is not supported."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kmerge_mlx.serving.answers import ApiError
from kmerge_mlx.serving.requests import read_completion

VOCABULARY = 700
EOS = "<|endoftext|>"
PENALTIES = ("repetition", "presence", "frequency")


def read(body: Any, chat: bool = False) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = dict.fromkeys(("base", "default_model", "models/base"), "base")
    return read_completion(raw, chat, names, VOCABULARY)


def refusal(body: Any, chat: bool = False) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body, chat)
    return caught.value


def test_a_body_that_is_not_a_json_object_is_a_400():
    for raw in (
        *(b"{", b"", b"[]", b'"text"', b"[" * 100_000, b'{"prompt": "\xff"}'),
        *(b'{"prompt": "\\ud800"}', b'{"prompt": "x", "temperature": NaN}'),
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ):
        error = refusal(raw)
        assert error.status == 400
        assert error.as_json()["error"]["type"] == "invalid_request_error"


def test_a_byte_order_mark_nulls_and_fields_that_do_not_change_the_answer_are_fine():
    completion = read("\ufeff".encode() + b'{"prompt": "x", "seed": null, "stop": null}')
    assert (completion.prompt, completion.seed, completion.stop) == (["x"], None, [])
    read({"prompt": ["x"], "user": "me", "metadata": {}, "n": 1, "reasoning_effort": "high"})
    read({"prompt": "x", "stream_options": {"include_usage": True}, "seed": -1, "logprobs": 20})
    read({"prompt": [["x", "y"], "z"][1:], "model": "models/base", "adapters": ""})
    neutral = {"min_tokens": 0, "ignore_eos": False, "functions": [], "guided_json": None}
    neutral |= {"add_generation_prompt": True, "continue_final_message": False, "audio": {}}
    neutral |= {"modalities": ["text"], "typical_p": 1.0, "length_penalty": 1.0}
    neutral |= {"repeat_penalty": 1.0, "dry_multiplier": 0.0, "skip_special_tokens": True}
    neutral |= {"json_schema": False, "logits_processors": [], "prompt_logprobs": None}
    read({"messages": [{"role": "user", "content": "x"}]} | neutral, chat=True)


def test_prompts_come_alone_or_in_a_list():
    for prompt, expected in (
        *(("x", ["x"]), (["x"], ["x"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]])),
        *(([[1, 2]], [[1, 2]]), ([[1], "b", [3]], [[1], "b", [3]])),
    ):
        assert read({"prompt": prompt}).prompt == expected


SCHEMA = {"type": "object"}
UNSUPPORTED: dict[str, Any] = {
    "guided_json": SCHEMA,
    "json_schema": SCHEMA,
    "structured_outputs": {"json": SCHEMA},
    "response_format": {"type": "json_object", "schema": SCHEMA},
    "repeat_penalty": 1.1,
    "dry_multiplier": 0.8,
    "skip_special_tokens": False,
    "logits_processors": ["x"],
    "prompt_logprobs": 1,
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": "x",
    "grammar": "x",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "stop_token_ids": [5],
    "min_tokens": 3,
    "ignore_eos": True,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template": "x",
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "typical_p": 0.5,
    "suffix": "x",
    "adapters": "x",
    "adapter": "x",
    "draft_model": "x",
    "n": 2,
    "best_of": 2,
}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_would_change_the_answer_is_refused_by_name(name, chat):
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    error = refusal(asked | {name: UNSUPPORTED[name]}, chat)
    assert (error.status, error.param.split(".")[0]) == (400, name)
    assert name in str(error)


@pytest.mark.parametrize("name", ["guided_json", "json_schema"])
def test_an_empty_schema_is_any_json_and_refused_too(name):
    assert str(refusal({"prompt": "x", name: {}})).startswith(f"{name} is not supported here")


def test_a_response_format_says_its_type():
    for given in ({}, {"type": None}, {"json_schema": {"schema": {}}}):
        error = refusal({"prompt": "x", "response_format": given})
        assert str(error) == "response_format.type is missing"


def test_a_field_that_is_wrong_is_a_400_that_names_it():
    wrong: dict[str, list[Any]] = {
        "prompt": [
            "",
            [],
            [""],
            ["a", []],
            ["a", 5],
            [1, 700],
            ["a", [700]],
            [-1],
            [True],
            5,
            None,
        ],
        "temperature": ["hot", -1, 1e9, True],
        "top_k": [700, -2, 1.5],
        "top_p": [1.1],
        "max_tokens": [0, -2, True, 2**31],
        "max_completion_tokens": [1.5],
        "seed": [-2, 2**64],
        "xtc_threshold": [0.6],
        "repetition_penalty": [1e-30],
        "logit_bias": [{"700": 1}, {"-1": 1}, {"1": 1e9}, {"00000000000701": 1}, []],
        "stop": ["", ["a"] * 17, "x" * 300, [5]],
        "stream_options": [{"include_usage": 1}],
        "logprobs": [21, "x"],
        "top_logprobs": [21, -1],
        "response_format": [{"type": "json_schema"}, {"type": "grammar"}, []],
        "n": [2],
        "echo": [True],
        "stream": ["yes"],
        "merge": ["yes"],
    }
    for field, value in [(name, value) for name in wrong for value in wrong[name]]:
        error = refusal({"prompt": "x"} | {field: value})
        assert (error.status, re.split(r"[.\[]", error.param)[0]) == (400, field)
        assert "\n" not in str(error)


def test_minus_1_is_off_or_no_limit_as_other_servers_have_it():
    completion = read({"prompt": "x", "max_tokens": -1, "top_k": -1})
    assert (completion.max_tokens, completion.top_k) == (2**31 - 1, 0)
    assert read({"prompt": "x", "max_completion_tokens": -1}).max_completion_tokens == 2**31 - 1


def test_messages_that_are_wrong_are_a_400():
    bad_call = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [5]}]
    for messages, param in (
        *((None, "messages"), ([], "messages"), ("x", "messages"), (["x"], "messages[0]")),
        ([{"content": "x"}], "messages[0].role"),
        (bad_call, "messages[1].tool_calls[0]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
    ):
        error = refusal({"messages": messages}, chat=True)
        assert (error.status, error.param) == (400, param)


def test_arguments_of_a_tool_call_are_an_object_for_the_template():
    def calling(arguments: str) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}

    (message,) = read(calling('{"a": 1}'), chat=True).messages
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": {"a": 1}}
    for arguments in ('{"a": "\\ud800"}', '{"a": NaN}', "{", "[" * 100_000):
        assert refusal(calling(arguments), chat=True).param.startswith("messages[0].tool_calls[0]")


def test_a_model_that_is_not_served_is_a_404():
    for model in ("gpt-4", "/etc/passwd", "../base", "Qwen/Qwen2.5-0.5B", ""):
        error = refusal({"prompt": "x", "model": model})
        assert (error.status, error.code) == (404, "model_not_found")
