"""One form of a message, whoever wrote it, and nothing of it that a template drops in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.errors import DataError, PromptError
from kmerge_mlx.prompts.lay_out import lay_out_chat
from kmerge_mlx.prompts.messages import ROLES, normalised
from kmerge_mlx.serving.answers import ApiError
from kmerge_mlx.serving.requests import read_completion
from tests.cli_runner import CHATML
from tests.prompts.test_lay_out import ids_of, tokenizer_with, user

ARGUMENTS = {"a": 3, "b": "é"}


def calling(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    """A conversation whose model calls a tool, as OpenAI's clients send it and write it down."""
    call = {"id": "c1", "type": "function", "function": {"name": "mul", "arguments": arguments}}
    return [
        user("What is 3 times é?"),
        {"role": "assistant", "content": None, "tool_calls": [call], **more},
        {"role": "tool", "tool_call_id": "c1", "content": "54"},
        {"role": "assistant", "content": "54"},
    ]


def template(arguments: str) -> str:
    """A template that writes the arguments of tool calls in its own way."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}<call>{{ f.name }} "
        + arguments
        + "</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


OBJECT = '{"a": 3, "b": "é"}'


@pytest.mark.parametrize("arguments", [json.dumps(ARGUMENTS), f" {OBJECT}", ARGUMENTS])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ f.arguments | tojson }}", OBJECT),
        ("{% for k, v in f.arguments|items %}{{ k }}={{ v }};{% endfor %}", "a=3;b=é;"),
        ("{{ f.arguments }}", OBJECT),  # not Python's {'a': 3}
        ("{{ '```' + f.arguments + '```' }}", f"```{OBJECT}```"),
    ],
)
def test_rows_and_requests_give_a_template_the_same_arguments(arguments, written, expected):
    tokenizer = tokenizer_with(template(written))
    messages = calling(arguments)
    row = tokenize(tokenizer, RowFormat().read({"messages": messages}))
    asked = json.dumps({"messages": messages[:-1]}).encode()
    request = read_completion(asked, True, {"base": "base", "default_model": "base"}, 700)
    ids = ids_of(lay_out_chat(tokenizer, request.messages))
    assert row.prompt_ids == ids
    assert f"<call>mul {expected}</call>" in tokenizer.decode(ids)
    assert "None" not in tokenizer.decode(ids)


def test_a_call_in_the_last_answer_is_trained_as_an_object():
    tokenizer = tokenizer_with(template("{{ f.arguments | tojson }}"))
    row = tokenize(tokenizer, RowFormat().read({"messages": calling(OBJECT)[:2]}))
    assert f"<call>mul {OBJECT}</call>" in tokenizer.decode(list(row.answer_ids))


def test_what_openai_wrote_before_tool_calls_or_instead_of_a_content_is_read():
    call = {"name": "mul", "arguments": OBJECT}
    asked = calling(None, tool_calls=None, function_call=call)
    found = normalised(asked)
    assert found == normalised(calling(None, tool_calls=[{"type": "function", "function": call}]))
    assert normalised(found) == found
    ids = ids_of(lay_out_chat(tokenizer_with(template("{{ f.arguments | tojson }}")), found))
    assert f"<call>mul {OBJECT}</call>" in tokenizer_with().decode(ids)
    for content in ({}, {"content": None}, {"content": ""}):
        (answer,) = normalised([{"role": "assistant", "refusal": "I will not.", **content}])
        assert answer == {"role": "assistant", "content": "I will not."}
    (answer,) = normalised([{"role": "assistant", "content": "x", "refusal": None}])
    assert answer == {"role": "assistant", "content": "x"}


def test_messages_in_any_form_become_one_and_stay_so():
    messages = [
        {"role": "developer", "content": "Be brief.", "name": None},
        user(["bare text", {"type": "text", "text": "part", "merge": None}]),
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": ""}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g"}}], "content": None},
        {"role": "tool", "content": None},
        {"role": "assistant", "content": "x", "tool_calls": []},
    ]
    found = normalised(messages)
    assert found == [
        {"role": "system", "content": "Be brief."},
        user([{"type": "text", "text": "bare text"}, {"type": "text", "text": "part"}]),
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "g", "arguments": {}}}],
        },
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "x"},
    ]
    assert normalised(found) == found


WRONG = [
    ([], "messages is []"),
    (["x"], "messages[0] is 'x'"),
    ([{"content": "x"}], "messages[0].role is None, expected one of system, user"),
    ([{"role": "human", "content": "x"}], "messages[0].role is 'human'"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role is ['user']"),
    ([{"role": "user"}], "messages[0].content is None"),
    ([user([{"text": 5}])], "messages[0].content[0].text is 5"),
    ([user([{"type": "image_url"}])], "messages[0].content[0] is {'type': 'image_url'}"),
    (calling("[1]"), "messages[1].tool_calls[0].function.arguments is '[1]', expected a JSON obj"),
    (calling("{"), "messages[1].tool_calls[0].function.arguments is '{'"),
    (calling("[" * 100_000), "messages[1].tool_calls[0].function.arguments is '[[["),
    (calling({}, tool_calls=[5]), "messages[1].tool_calls[0] is 5"),
    (calling({}, tool_calls={"a": 1}), "messages[1].tool_calls is {'a': 1}"),
    (calling({}, tool_calls=[{"function": 5}]), "messages[1].tool_calls[0].function is 5"),
    (calling({}, function_call="auto"), "messages[1].function_call is 'auto'"),
    (
        calling({}, function_call={"name": "f", "arguments": "{"}),
        "messages[1].function_call.arguments",
    ),
    (calling({}, content="x", refusal="no"), "messages[1].refusal is 'no', expected text in place"),
    (calling({}, refusal=5), "messages[1].refusal is 5"),
]


@pytest.mark.parametrize(("messages", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_message_is_refused_alike_in_rows_and_requests(messages, said):
    with pytest.raises(DataError) as row:
        RowFormat().read({"messages": messages})
    with pytest.raises(ApiError) as request:
        read_completion(json.dumps({"messages": messages}).encode(), True, {"base": "base"}, 700)
    assert str(row.value) == str(request.value)
    assert str(row.value).startswith(said)
    assert request.value.param == said.split(" ")[0]
    assert set(ROLES) >= {"system", "user", "assistant", "tool"}


PARTS_ONLY = CHATML.replace(
    "{{ message.content }}", "{% for part in message.content %}{{ part.text }}{% endfor %}"
)


def test_a_template_that_takes_parts_alone_is_given_parts():
    messages = [user("A question?"), {"role": "assistant", "content": "An answer."}]
    row = RowFormat().read({"messages": messages})
    plain, parts = (tokenize(tokenizer_with(t), row) for t in (CHATML, PARTS_ONLY))
    assert parts == plain
    prompt = RowFormat().read({"context": "The context", "prompt": "why?", "completion": "x"})
    assert tokenize(tokenizer_with(PARTS_ONLY), prompt) == tokenize(tokenizer_with(CHATML), prompt)


DROPPING = CHATML.replace("-%}\n<|im", "if message.role != 'system' -%}\n<|im", 1)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
REFUSING += CHATML
TOOLS = [{"type": "function", "function": {"name": "mul"}}]


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (DROPPING, {}, "the chat template leaves messages[0] (system) out"),
        (REFUSING, {}, "the chat template refused (no system)"),
        (CHATML, {"tools": TOOLS}, "the chat template leaves tools out"),
    ],
)
def test_what_a_template_would_drop_is_said_and_the_advice_works(given, options, said):
    tokenizer = tokenizer_with(given)
    messages = [{"role": "system", "content": "Be brief."}, user("Why?")]
    with pytest.raises(PromptError) as refused:
        lay_out_chat(tokenizer, messages, options=options)
    assert refused.value.found == said
    assert refused.value.field == ("tools" if options else None)
    answered = [*messages, {"role": "assistant", "content": "So."}]
    row = {"messages": answered} | options
    with pytest.raises(DataError, match="use prompt and completion rows, and leave the chat temp"):
        tokenize(tokenizer, RowFormat().read(row))
    # What both errors say to do.
    assert lay_out_chat(tokenizer, messages[1:] if not options else messages)
    bare = RowFormat().read({"prompt": "Be brief. Why?", "completion": "So."})
    assert tokenize(tokenizer, bare).answer_ids


def test_tools_of_a_row_without_a_template_are_not_dropped():
    row = RowFormat().read({"prompt": "Why?", "completion": "So.", "tools": TOOLS})
    with pytest.raises(DataError, match="tools need a chat template, and none is applied"):
        tokenize(tokenizer_with(), row)
