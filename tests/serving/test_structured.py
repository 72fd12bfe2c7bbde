"""Answers in a JSON schema: they fit it, batched and streamed, and no schema harms the server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from langchain_openai import ChatOpenAI
from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerFast

from kmerge_mlx.detokenizer import exact
from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation.structured import Follow, Schemas
from kmerge_mlx.serving.answers import Answer
from kmerge_mlx.serving.requests import ChatCompletion
from tests.cli_runner import CHATML, copy_base
from tests.servers import serving
from tests.serving.test_text import tokenizer_of
from tests.vocabularies import ENDS, MAKERS, base_with, byte_level

ROWS = 710
WORD = {"type": "string", "maxLength": 6}


class City(BaseModel, extra="forbid"):
    name: str = Field(max_length=8)
    country: Literal["Peru", "\u65e5\u672c"]


class Trip(BaseModel, extra="forbid"):
    kind: Literal["by train", "by ship"]
    nights: int = Field(ge=1, le=14)
    cities: list[City] = Field(min_length=1, max_length=2)
    note: str | None = Field(max_length=5)


KINDS = [
    Trip.model_json_schema(),
    {"type": "object", "properties": {"a": WORD}, "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", 1, None, True]}, "maxItems": 3},
    {"enum": ["\U0001f600 \u00e9", 'a "quoted" one', "\\", "\n"]},
    {"type": "string", "pattern": "^[ab]{2,3} \u00e9$"},
    {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": -3, "maximum": 300}]},
    {
        "$defs": {"n": {"type": "object", "properties": {"k": WORD, "n": {"$ref": "#/$defs/n"}}}},
        "$ref": "#/$defs/n",
    },
]


def form(schema: Any, **more: Any) -> dict[str, Any]:
    """OpenAI's field."""
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema} | more}


@pytest.fixture(scope="module", params=list(MAKERS))
def live(request, base_path, adapter_path, tmp_path_factory):
    """A random model; with K = 4, or with a table that has rows without a token."""
    folder, adapter = tmp_path_factory.mktemp("live") / "base", None
    if request.param == "byte level":
        copy_base(base_path, folder, CHATML)
        adapter = adapter_path
    else:
        base_with(folder, MAKERS[request.param](), ROWS, ENDS[request.param])
        (folder / "chat_template.jinja").write_text(CHATML)
    with serving(folder, adapter, chat_template=True, max_queue=200) as address:
        yield address
        address.assert_alive()


@pytest.fixture(scope="module")
def server(base_path, adapter_path, tmp_path_factory):
    base = copy_base(base_path, tmp_path_factory.mktemp("one") / "base", CHATML)
    with serving(base, adapter_path, chat_template=True) as address:
        yield address
        address.assert_alive()


def text_of(answer: Any) -> tuple[str, str]:
    """The text of a chat's answer, streamed or not, and why it ended."""
    assert answer.status == 200, answer.body
    if answer.body.startswith(b"{"):
        choice = answer.json["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    lines = answer.body.decode().split("\n\n")
    sent = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    choices = [choice for piece in sent for choice in json.loads(piece)["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"]


def check(text: str, schema: Any) -> None:
    """It is JSON, as strict readers have it, that fits the schema."""
    text.encode()
    value = json.loads(text, parse_constant=pytest.fail)
    assert Draft202012Validator(schema).is_valid(value), (text, schema)


def test_answers_fit_their_schemas_batched_streamed_merged_and_beside_others(live):
    def ask(number: int) -> Any:
        context = f"<merge>{'AB CD EF the tree ' * (9 + number % 3)}</merge>"
        body = {"temperature": 1, "max_tokens": 400, "stream": number % 2 == 1}
        if schema := [*KINDS, None][number % 8]:
            body["response_format"] = form(schema, strict=True, description="It.")
        return live.chat(context + "Which?", **body)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(32)))
    ended = 0
    for number, answer in enumerate(answers):
        text, finish = text_of(answer)
        if number % 8 < 7 and finish == "stop":  # a recursive schema may have no end in sight
            check(text, KINDS[number % 8])
            ended += 1
    assert ended >= 24


def test_a_merged_prompt_stays_merged_and_its_cache_is_used_again(server):
    asked = {"prompt": "AB CD EF the tree " * 30, "merge": True, "max_tokens": 300}
    found = [server.complete(**asked, response_format=form(KINDS[0])).json for _ in range(2)]
    first, second = (one["usage"] for one in found)
    assert first["compressed_tokens"] < first["prompt_tokens"] / 3
    assert second["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens"] / 2
    assert found[0]["choices"][0]["text"] == found[1]["choices"][0]["text"]
    Trip.model_validate_json(found[0]["choices"][0]["text"])


def test_alone_with_a_seed_the_answer_fits_too(server):
    body = {"temperature": 1, "max_tokens": 400, "response_format": form(KINDS[0])}
    texts = [text_of(server.chat("Which?", seed=seed, **body))[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    for text in texts:
        check(text, KINDS[0])


def test_json_object_is_any_object(server):
    body = {"temperature": 1, "max_tokens": 40, "logit_bias": {str(ord("}") - 33 + 3): 5}}
    for _ in range(4):
        text, finish = text_of(server.chat("x", response_format={"type": "json_object"}, **body))
        assert text.startswith("{")
        if finish == "stop":
            check(text, {"type": "object"})


def test_a_stop_text_and_a_limit_may_cut_an_answer_short(server):
    asked = {"response_format": form({"enum": ["one, two, three"]})}
    assert text_of(server.chat("x", **asked)) == ('"one, two, three"', "stop")
    assert text_of(server.chat("x", stop=[", th"], **asked)) == ('"one, two', "stop")
    text, finish = text_of(server.chat("x", max_tokens=3, **asked))
    assert '"one, two, three"'.startswith(text)
    assert finish == "length"


def test_text_and_null_are_no_schema(server):
    plain = text_of(server.chat("x", max_tokens=5))
    for same in (None, {"type": "text"}):
        assert text_of(server.chat("x", max_tokens=5, response_format=same)) == plain


def test_openais_parse_and_langchain_give_objects(server):
    messages = [{"role": "user", "content": "Which?"}]
    parsed = server.client().chat.completions.parse(
        model="base", messages=messages, response_format=Trip, max_tokens=400
    )
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    chat = ChatOpenAI(base_url=server.url, api_key="none", model="base", max_tokens=400)
    assert isinstance(chat.with_structured_output(Trip).invoke("Which?"), Trip)


# What is refused

WRONG: dict[str, Any] = {
    "nothing fits an enum": {"enum": []},
    "bounds": {"type": "integer", "minimum": 3, "maximum": 2},
    "pattern and length": {"type": "string", "pattern": "^a$", "minLength": 3},
    "a required property": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "no such type": {"type": "banana"},
    "a wrong keyword": {"type": "object", "properties": 5},
    "not": {"not": {"type": "string"}},
    "unique items": {"type": "array", "uniqueItems": True},
    "a loop": {"$ref": "#"},
    "a file": {"$ref": "file:///etc/passwd"},
    "an address": {"$ref": "http://127.0.0.1:9/x"},
    "not in it": {"$ref": "#/$defs/missing"},
}


def links(count: int) -> dict[str, Any]:
    """Models in models."""
    inner = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    made = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(count)}
    return {"$defs": made | {f"a{count}": inner}, "$ref": "#/$defs/a0"}


def nested(count: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(count):
        schema = {"items": schema}
    return schema


PATTERNS = [{"type": "string", "pattern": f".*a{{{i}}}b.*"} for i in range(40)]
HOSTILE: dict[str, Callable[[], Any]] = {
    "a chain that overflows a stack": lambda: links(1500),
    "a deep one": lambda: nested(150),
    "patterns at once": lambda: {"allOf": PATTERNS},
    "a remainder": lambda: {"type": "integer", "multipleOf": 999_983},
    "properties": lambda: {"properties": {f"p{i}": {} for i in range(200_000)}},
    "choices": lambda: {"enum": [f"v{i}" for i in range(300_000)]},
    "a long text": lambda: {"const": "x" * 4_000_000},
    "brackets": lambda: {"type": "string", "pattern": "(" * 5000 + "x" + ")" * 5000},
}
# Short to compile; what they cost comes with the tokens.
LONG: dict[str, Any] = {
    "a thousand million items": {"type": "array", "items": WORD, "minItems": 10**9},
    "a long least length": {"type": "string", "minLength": 10**9},
    "a pattern": {"type": "string", "pattern": "((((x{1,100}){1,100}){1,100}){1,100}){1,100}"},
    "another": {"type": "string", "pattern": "^(a+)+$"},
    "one that looks back": {"type": "string", "pattern": ".*a.{500}"},
    "optional properties": {"properties": {f"p{i}": WORD for i in range(2000)}},
}


def refusal(answer: Any) -> str:
    assert answer.status == 400, answer.body
    assert answer.error["param"].startswith("response_format")
    assert answer.error["message"].startswith("response_format")
    return answer.error["message"]


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_or_unknown_schema_is_a_400(server, name):
    refusal(server.chat("x", response_format=form(WRONG[name])))


def test_a_pattern_that_cannot_be_read_is_shown(server):
    for pattern in ("a[", "(?=a)b"):
        said = refusal(server.chat("x", response_format=form({"pattern": pattern})))
        assert pattern in said


def test_unique_items_false_changes_nothing(server):
    def asked(schema: Any) -> tuple[str, str]:
        return text_of(server.chat("x", max_tokens=200, response_format=form(schema)))

    for free in ({}, {"uniqueItems": False}):
        one = {"type": "array", "items": {"const": 1, **free}, "minItems": 2, "maxItems": 2, **free}
        text, _ = asked({"$defs": {"a": one}, "allOf": [{"$ref": "#/$defs/a"}]})
        assert json.loads(text) == [1, 1]
    # As the name of a property, or in a value, it is something else.
    named = {"type": "object", "properties": {"uniqueItems": False}, "required": ["uniqueItems"]}
    refusal(server.chat("x", response_format=form(named)))
    assert json.loads(asked({"const": {"uniqueItems": False}})[0]) == {"uniqueItems": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_a_400_while_others_are_answered(server, name, monkeypatch):
    monkeypatch.setattr("kmerge_mlx.generation.structured.TRIAL_SECONDS", 1)
    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(server.chat, "x", response_format=form(HOSTILE[name]()))
        server.assert_alive()
        refusal(hostile.result())


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_schema_that_costs_with_every_token_ends_or_is_a_400(server, name):
    body = {"max_tokens": 60, "temperature": 1, "response_format": form(LONG[name])}
    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(server.chat, "x", **body)
        server.assert_alive()
        answer = hostile.result()
    if answer.status != 200:
        refusal(answer)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"type": "json_schema"}, "response_format"),
        ({"type": "text", "json_schema": {"schema": {}}}, "response_format"),
        ({"type": "json_object", "schema": {}}, "response_format.schema"),
        ({"type": "grammar"}, "response_format.type"),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            "response_format.json_schema.schema",
        ),
        (form({}, strict="yes"), "response_format.json_schema.strict"),
        ([], "response_format"),
    ],
)
def test_a_wrong_field_is_named(server, given, param):
    answer = server.chat("x", response_format=given)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_tools_and_a_schema_are_not_for_one_answer(server):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    body = {"response_format": form({"enum": ["x"]}), "tools": tools}
    assert "tools" in refusal(server.chat("x", **body))
    assert text_of(server.chat("x", tool_choice="none", **body))[0] == '"x"'


def test_without_the_extra_a_schema_is_a_400_that_says_what_to_install(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    message = refusal(server.chat("x", response_format={"type": "json_object"}))
    assert message.endswith("pip install 'kmerge-mlx[structured]'")


def test_a_server_reads_the_vocabulary_when_it_starts(server):
    """It holds up all threads."""
    assert "_tokenizer" in vars(server.server.service.preparer._schemas)


def test_a_tokenizer_without_an_end_cannot_have_one():
    tokenizer = exact(PreTrainedTokenizerFast(tokenizer_object=byte_level()))
    with pytest.raises(PromptError, match="no token that ends an answer"):
        Schemas(tokenizer).compile({"type": "object"})


def test_a_fault_ends_only_its_own_request(server, monkeypatch):
    allowed = Follow._allowed

    def faulty(self: Follow, new: list[int], size: int) -> np.ndarray:
        if self._after == ["it"]:
            raise RuntimeError("a bug")
        return allowed(self, new, size)

    made = Follow.__init__

    def init(self: Follow, grammar: Any, fail: Any, after: Any = ()) -> None:
        made(self, grammar, fail, after)
        if grammar.matcher.compute_ff_bytes() == b'"bad"':
            self._after = ["it"]

    monkeypatch.setattr(Follow, "_allowed", faulty)
    monkeypatch.setattr(Follow, "__init__", init)
    with ThreadPoolExecutor(8) as pool:
        words = ["good", "bad"] * 4
        asked = [{"response_format": form({"enum": [word]})} for word in words]
        answers = list(pool.map(lambda body: server.chat("x", **body), asked))
    for word, answer in zip(words, answers, strict=True):
        if word == "good":
            assert text_of(answer) == ('"good"', "stop")
        else:
            assert refusal(answer) == "response_format cannot be followed: a bug"


KEYS = st.sampled_from(["a", "b", "\u00e9", "$ref", "type"])
LEAF = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, WORD, {"type": "number"}]),
    st.fixed_dictionaries(
        {"type": st.just("integer")},
        optional={"minimum": st.integers(-99, 9), "maximum": st.integers(-9, 99)},
    ),
    st.fixed_dictionaries({"enum": st.lists(KEYS | st.integers() | st.booleans(), max_size=3)}),
    st.fixed_dictionaries(
        {"type": st.just("string"), "pattern": st.sampled_from(["^a*$", "[0-9]", "(", "\\p{L}"])},
        optional={"minLength": st.integers(0, 3), "maxLength": st.integers(0, 3)},
    ),
)


def wider(inner: Any) -> Any:
    """Schemas of schemas."""
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(KEYS, inner, max_size=3)},
        optional={
            "required": st.lists(KEYS, max_size=2, unique=True),
            "additionalProperties": st.booleans() | inner,
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={"minItems": st.integers(0, 2), "maxItems": st.integers(0, 3)},
    )
    several = st.lists(inner, min_size=1, max_size=2)
    return (
        objects | arrays | several.map(lambda s: {"anyOf": s}) | several.map(lambda s: {"allOf": s})
    )


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=settings().max_examples // 10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(schemas=st.lists(st.recursive(LEAF, wider, max_leaves=5), min_size=4, max_size=4))
def test_no_schema_is_more_than_a_400_and_whole_answers_fit(live, schemas):
    def ask(schema: Any) -> Any:
        body = {"max_tokens": 60, "temperature": 1}
        return live.chat("x", response_format=form(schema), **body)

    with ThreadPoolExecutor(4) as pool:
        for schema, answer in zip(schemas, pool.map(ask, schemas), strict=True):
            if answer.status != 200:
                refusal(answer)
                continue
            text, finish = text_of(answer)
            if finish == "stop":
                check(text, schema)


# Thinking, and markers


def test_a_thinking_model_thinks_first(base_path, tmp_path):
    made = byte_level()
    made.add_tokens(["<think>", "</think>"])
    base_with(tmp_path / "base", made, ROWS, "<|endoftext|>")
    (tmp_path / "base" / "chat_template.jinja").write_text(CHATML + "<think>")
    bias = {str(made.token_to_id("</think>")): 100}
    with serving(tmp_path / "base", None, chat_template=True) as server:
        answer = server.chat("x", response_format=form(KINDS[0]), max_tokens=500, logit_bias=bias)
        check(text_of(answer)[0], KINDS[0])
        plain = server.chat("x", max_tokens=4, logit_bias={str(made.token_to_id("</think>")): -100})
        assert plain.json["choices"][0]["message"]["reasoning"]


@pytest.mark.parametrize("stream", [False, True])
def test_markers_in_a_schemas_text_are_text(stream):
    tokenizer = tokenizer_of()
    text = '{"a":"<think>so</think> <tool_call>x</tool_call>"}'
    body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
    completion = ChatCompletion.model_validate(body | {"response_format": form({})})
    for thought in ("", "why</think>"):
        state = "reasoning" if thought else "normal"
        context = GenerationContext(True, True, None, TextStateMachine(), state, [])
        answer = Answer(completion, context, tokenizer)
        found = []
        for token in tokenizer.encode(thought + text):
            answer.add(Response("", token, 0.0, None, ()))
            found += [answer.chunk()] if stream else []
        answer.let_go()
        found += [answer.chunk() if stream else answer.rest()]
        parts = [c.get("delta") or c["message"] for c in found if c]
        assert "".join(part.get("content", "") for part in parts) == text
        assert "".join(part.get("reasoning", "") for part in parts) == thought[:3]
