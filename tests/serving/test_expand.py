"""``serve --expand``: the model asks for the exact text of what was merged, and gets it.

The tiny models cannot call tools: a logits processor makes them write what each test scripts, so
that everything else, the KV caches too, is real.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import server as host

from kmerge_mlx.convert.window import convert_window
from kmerge_mlx.errors import ServeError
from kmerge_mlx.prompts.segments import Segment, merged_text
from kmerge_mlx.serving.expand import MOST_ROUNDS, messages_of
from tests.cli_runner import CHATML, copy_base
from tests.conftest import UPSTREAM
from tests.servers import FIXTURE_EOS, Address, eventually, serving

TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for tool_call in message.tool_calls or [] -%}
{%- set tool_call = tool_call.function -%}
<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
{%- raw %}</tool_call>{% endraw -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
FIRST, SECOND = "AA\n+AB\n++AC \u00e9\n" * 6, "The secret is \U0001f600 XYZZY 4711.\n" * 4
QUESTION = f"Read:\n<merge>{FIRST}</merge>and\n<merge>{SECOND}</merge>What is the secret?"
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
OWN = {"type": "function", "function": {"name": "expand", "parameters": {"type": "object"}}}


def call(name: str = "expand", **arguments: Any) -> str:
    said = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{said}</tool_call>"


@dataclass
class Scripted:
    """A server whose model writes what it is given, and the prompts that it read."""

    server: Address
    answers: list[str] = field(default_factory=list)
    pause: float = 0.0  # seconds before each answer
    jobs: list[Any] = field(default_factory=list)

    def processors(self, args: Any) -> list[Any]:
        """mlx-lm's logits processors of a request: the next answer's tokens, one after another."""
        tokenizer = self.server.server.service.tokenizer
        ids = tokenizer.encode(self.answers.pop(0), add_special_tokens=False)
        left = iter([*ids, FIXTURE_EOS])
        time.sleep(self.pause)

        def force(tokens: mx.array, logits: mx.array) -> mx.array:
            wanted = mx.arange(logits.shape[-1]) == next(left, FIXTURE_EOS)
            return mx.where(wanted, 100.0, -100.0) + 0 * logits

        return [force]

    def ask(self, *answers: str, content: str = QUESTION, **more: Any) -> Any:
        """The answer to a request, whose rounds the model answers so."""
        self.answers, self.jobs[:] = list(answers), []
        return self.server.chat(content, **{"max_tokens": 500} | more)

    def prompts(self) -> list[str]:
        """The raw text of the prompts that were read, with a mark where something merges."""
        tokenizer = self.server.server.service.tokenizer
        return [
            "".join("@" if s.merge else tokenizer.decode(s.ids) for s in job.segments)
            for job in self.jobs
        ]


@pytest.fixture(scope="module")
def kmerge(base_path, adapter_path, tmp_path_factory):
    base = copy_base(base_path, tmp_path_factory.mktemp("expand") / "base", TEMPLATE)
    return base, adapter_path


@pytest.fixture(scope="module")
def lclm(tmp_path_factory):
    made = tmp_path_factory.mktemp("expand") / "lclm"
    convert_window(UPSTREAM.parent / "lclm_cs4_w16" / "checkpoint", "it", made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made, made


@pytest.fixture(scope="module", params=["kmerge", "lclm"])
def running(request) -> Iterator[Address]:
    own = {"expand": True, "chat_template": True, "merges": "documents"}
    with serving(*request.getfixturevalue(request.param), **own) as address:
        yield address


def script(server: Address, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    made, generator = Scripted(server), server.server.service.generator
    submit = generator.submit

    def noted(job: Any, args: Any) -> None:
        made.jobs.append(job)
        submit(job, args)

    monkeypatch.setattr(generator, "submit", noted)
    monkeypatch.setattr(host, "_make_logits_processors", made.processors)
    return made


@pytest.fixture
def scripted(running, monkeypatch) -> Scripted:
    return script(running, monkeypatch)


def streamed(answer: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A stream put together again, and its chunks."""
    lines = answer.body.decode().split("data: ")[1:]
    assert lines.pop().strip() == "[DONE]"
    chunks = [json.loads(line.split("\n")[0]) for line in lines]
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    ends = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert ends[:-1] == [None] * len(ends[:-1])
    whole = {
        "content": "".join(d.get("content", "") for d in deltas),
        "calls": [one for d in deltas for one in d.get("tool_calls", [])],
        "finish": ends[-1],
        "usage": chunks[-1].get("usage"),
    }
    return whole, chunks


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_gets_the_exact_text_and_the_client_the_answer_alone(scripted, stream):
    before = scripted.server.metric("expansions_total")
    answers = ("Look: " + call(segment=2), "it is XYZZY")
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = scripted.ask(*answers, **more)
    assert answer.status == 200, answer.body
    assert b"expand(" not in answer.body
    assert b"tool_call" not in answer.body
    if stream:
        whole, chunks = streamed(answer)
        found = (whole["content"], whole["finish"])
        roles = [c["choices"][0]["delta"].get("role") for c in chunks if c["choices"]]
        assert roles == ["assistant", *[None] * (len(roles) - 1)]
        usage = whole["usage"]
    else:
        (choice,), usage = answer.json["choices"], answer.json["usage"]
        assert choice["message"].keys() == {"role", "content"}
        found = (choice["message"]["content"], choice["finish_reason"])
    assert found == ("Look: it is XYZZY", "stop")
    first, second = scripted.jobs
    texts = scripted.prompts()
    assert "Read:\n[segment 1]\n@and\n[segment 2]\n@What is the secret?" in texts[0]
    assert '"expand"' in texts[0]
    # The second prompt is the first, the call and the text, all of it raw.
    start = texts[0].removesuffix("<|im_start|>assistant\n")
    rest = texts[1].removeprefix(start)
    assert rest == (
        f"<|im_start|>assistant\nLook: {call(segment=2)}<|im_end|>\n"
        f"<|im_start|>tool\n{SECOND}<|im_end|>\n<|im_start|>assistant\n"
    )
    if (own := merged_text(scripted.server.server.service.tokenizer)) is not None:
        around = zip(first.segments, first.segments[1:], first.segments[2:], strict=False)
        assert [(a.ids[-1], b.ids[0]) for a, s, b in around if s.merge] == [
            (own.start, own.end)
        ] * 2
    assert [s for s in first.segments if s.merge] == [s for s in second.segments if s.merge]
    assert usage["prompt_tokens"] == sum(second.lengths)
    assert usage["expansions"] == 1
    tokenizer = scripted.server.server.service.tokenizer
    made = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in answers]
    assert usage["completion_tokens"] == sum(made)
    # The KV cache of the first round is gone on with, past the call.
    assert usage["prompt_tokens_details"]["cached_tokens"] >= sum(first.lengths) + made[0] - 5
    assert scripted.server.metric("expansions_total") == before + 1


def test_a_request_with_a_seed_is_expanded_too(scripted):
    answer = scripted.ask(call(segment=1), "done", seed=3).json
    assert answer["choices"][0]["message"]["content"] == "done"
    assert FIRST in scripted.prompts()[1]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > sum(
        scripted.jobs[0].lengths[:-10]
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [({"segment": 3}, "3"), ({"segment": 0}, "0"), ({}, "None"), ({"segment": [1]}, "[1]")],
)
def test_an_unknown_segment_is_told_to_the_model(scripted, arguments, what):
    answer = scripted.ask(call(**arguments), call(segment="1"), "so").json
    assert answer["choices"][0]["message"]["content"] == "so"
    assert answer["usage"]["expansions"] == 2
    _, second, third = scripted.prompts()
    assert f"There is no segment {what}: give a number from 1 to 2." in second
    assert third.endswith(f"<|im_start|>tool\n{FIRST}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("stream", [False, True])
def test_after_the_last_round_the_model_is_asked_without_the_tool(scripted, stream):
    calls = [call(segment=1)] * (MOST_ROUNDS + 1)
    answer = scripted.ask(*calls, "never read", stream=stream)
    texts = scripted.prompts()
    assert len(texts) == MOST_ROUNDS + 1
    assert ["<tools>" in text for text in texts] == [True] * MOST_ROUNDS + [False]
    assert "[segment 2]\n@" in texts[-1]
    if stream:
        whole, _ = streamed(answer)
        assert (whole["content"], whole["calls"], whole["finish"]) == ("", [], "stop")
    else:
        (choice,) = answer.json["choices"]
        assert choice["message"] == {"role": "assistant", "content": ""}
        assert choice["finish_reason"] == "stop"
        assert answer.json["usage"]["expansions"] == MOST_ROUNDS


def test_several_segments_are_given_at_once_and_cut_where_they_are_too_long(scripted, monkeypatch):
    scripted.ask(call(segment=2) + "\n" + call(segment=1) + " so it is", "it")
    (text,) = scripted.prompts()[1:]
    assert f"<|im_start|>tool\n{SECOND}<|im_end|>\n<|im_start|>tool\n{FIRST}<|im_end|>" in text
    assert "so it is" not in text  # it was written without the text
    monkeypatch.setattr("kmerge_mlx.serving.prepare.MOST_TOKENS", 12)
    answer = scripted.ask(call(segment=2) + call(segment=1) + "x", "it").json
    assert answer["choices"][0]["message"]["content"] == "it"
    count = len([s for s in scripted.jobs[0].segments if s.merge][1].ids)
    cut, nothing = scripted.prompts()[1].split("<|im_start|>tool\n")[1:]
    given, note = cut.removesuffix("<|im_end|>\n").split("\n[cut: ")
    assert SECOND.startswith(given)
    assert len(given) >= 10
    assert note == f"these are 12 of the segment's {count} tokens]"
    assert nothing.startswith("\n[cut: these are 0 of ")


@pytest.mark.parametrize("stream", [False, True])
def test_tools_of_the_client_stand_beside_it(scripted, stream):
    def ask(*answers: str) -> tuple[str, list[Any], str]:
        answer = scripted.ask(*answers, tools=[LOOK], stream=stream)
        if stream:
            whole, _ = streamed(answer)
            return whole["content"], whole["calls"], whole["finish"]
        (choice,) = answer.json["choices"]
        message = choice["message"]
        return message["content"] or "", message.get("tool_calls", []), choice["finish_reason"]

    for said in (call("look", at=1), call(segment=1) + call("look", at=1)):
        content, calls, finish = ask(said)
        assert (content, finish) == ("", "tool_calls")
        (one,) = calls
        assert one["function"] == {"name": "look", "arguments": '{"at": 1}'}
        assert one.get("index", 0) == 0
        assert len(scripted.jobs) == 1
    content, calls, finish = ask(call(segment=1), "a" + call("look", at=2))
    assert (content, len(calls), finish) == ("a", 1, "tool_calls")
    content, calls, finish = ask(call(segment=1), "so")
    assert (content, calls, finish) == ("so", [], "stop")
    assert '"look"' in scripted.prompts()[0]


def test_a_tool_of_the_same_name_is_refused(scripted):
    for tool in (OWN, OWN["function"]):
        answer = scripted.ask(tools=[LOOK, tool])
        assert (answer.status, answer.error["param"]) == (400, "tools")
        assert "the server's own" in answer.error["message"]


def test_where_nothing_merges_or_tools_are_off_the_prompt_is_as_without(scripted):
    def prompt() -> str:
        (text,) = scripted.prompts()
        assert "<tools>" not in text
        assert "[segment" not in text
        return text

    scripted.ask("so", content=QUESTION.replace("merge>", "raw>"))
    assert FIRST in prompt()
    answer = scripted.ask("so", tool_choice="none", tools=[LOOK]).json
    assert "@and\n@" in prompt()
    assert answer["usage"]["expansions"] == 0
    scripted.ask("so", merge=False)  # nothing merges; and with true, an expansion would merge again
    assert FIRST in prompt()
    scripted.ask("so", merge=True)
    assert "@" in prompt()
    scripted.answers, scripted.jobs[:] = [call(segment=1)], []
    answer = scripted.server.complete(prompt=QUESTION, max_tokens=500).json
    assert "@and\n@" in prompt()
    assert answer["choices"][0]["text"] == call(segment=1)


def test_answers_share_one_limit_of_tokens(scripted):
    tokenizer = scripted.server.server.service.tokenizer
    said = call(segment=1)
    count = len(tokenizer.encode(said, add_special_tokens=False)) + 1  # with its end
    answer = scripted.ask(said, "a b c d e f", max_tokens=count + 3).json
    assert answer["usage"]["completion_tokens"] == count + 3
    assert answer["choices"][0]["finish_reason"] == "length"
    for stream in (False, True):
        answer = scripted.ask(said, "never", max_tokens=count, stream=stream)
        if stream:
            whole, _ = streamed(answer)
            found = (whole["content"], whole["finish"])
        else:
            (choice,) = answer.json["choices"]
            found = (choice["message"]["content"], choice["finish_reason"])
            assert answer.json["usage"]["expansions"] == 0
        assert found == ("", "length")
        assert len(scripted.jobs) == 1


def test_log_probabilities_are_of_what_the_client_sees(scripted):
    for stream in (False, True):
        asked = {"logprobs": True, "top_logprobs": 1, "stream": stream}
        answer = scripted.ask("Look " + call(segment=1), "so", **asked)
        if stream:
            choices = [c["choices"][0] for c in streamed(answer)[1]]
        else:
            choices = answer.json["choices"]
        tokens = [t["token"] for c in choices for t in c["logprobs"]["content"]]
        text = "".join(tokens).removesuffix("<|endoftext|>")
        assert text.startswith("Look ")
        assert text.endswith("so")
        assert len(text) <= len("Look so") + 1  # perhaps with the marker's first letter


def test_the_prompt_of_each_round_has_to_fit(kmerge, monkeypatch):
    own = {"expand": True, "chat_template": True, "merges": "documents"}
    long = f"<merge>{SECOND * 6}</merge>What is the secret?"
    with serving(*kmerge, **own) as server:
        count = script(server, monkeypatch).ask("so", content=long).json["usage"]["prompt_tokens"]
    with serving(*kmerge, max_prompt_tokens=count + 20, **own) as server:
        asked = script(server, monkeypatch)
        answer = asked.ask("a" + call(segment=1), content=long)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        answer = asked.ask("a" + call(segment=1), content=long, stream=True)
        assert b'"content": "a"' in answer.body
        assert b'"context_length_exceeded"' in answer.body
        eventually(lambda: server.metric("requests_in_flight") == 0)
    # A text takes at most half of what is left.
    with serving(*kmerge, max_prompt_tokens=count + 400, **own) as server:
        asked = script(server, monkeypatch)
        answer = asked.ask(call(segment=1), "so", content=long)
        assert answer.status == 200, answer.body
        assert "\n[cut: these are 200 of the segment's" in asked.prompts()[1]


def test_all_rounds_share_the_time_of_one_request(kmerge, monkeypatch):
    own = {"expand": True, "chat_template": True, "merges": "documents", "request_timeout": 2}
    with serving(*kmerge, **own) as server:
        asked = script(server, monkeypatch)
        asked.pause = 1.2
        answer = asked.ask(*[call(segment=1)] * 2, "so")
        assert (answer.status, answer.error["code"]) == (504, "timeout")
        eventually(lambda: server.metric("requests_in_flight") == 0)


def test_it_is_off_by_default(kmerge, monkeypatch):
    with serving(*kmerge, chat_template=True, merges="documents") as server:
        asked = script(server, monkeypatch)
        answer = asked.ask(call(segment=1), "never", tools=[OWN]).json
        (text,) = asked.prompts()
        assert "[segment" not in text
        assert "compressed segment" not in text
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert "expansions" not in answer["usage"]


def test_a_prompt_that_merges_whole_has_one_segment(kmerge, monkeypatch):
    own = {"expand": True, "chat_template": True, "merges": "all"}
    with serving(*kmerge, **own) as server:
        asked = script(server, monkeypatch)
        answer = asked.ask(call(segment=1), "so", content="Tell me.\n" + FIRST)
        assert answer.status == 200, answer.body
        first, second = asked.prompts()
        assert first == "[segment 1]\n@"
        assert f"Tell me.\n{FIRST}" in second


def test_what_is_kept_inside_of_a_text_is_part_of_its_segment(kmerge, monkeypatch):
    own = {"expand": True, "chat_template": True, "merges": "documents", "keep": ["numbers"]}
    with serving(*kmerge, **own) as address:
        scripted = script(address, monkeypatch)
        content = QUESTION.replace("The secret", "99 secret", 1)
        answer = scripted.ask(call(segment=2), call(segment=3), "so", content=content).json
    first, second, third = scripted.prompts()
    assert "[segment 3]" not in first
    assert "Read:\n[segment 1]\n@and\n[segment 2]\n99@4711" in first
    assert first.count("4711") == 4
    text = SECOND.replace("The secret", "99 secret", 1)
    assert f"<|im_start|>tool\n{text}<|im_end|>\n" in second
    assert "There is no segment 3: give a number from 1 to 2." in third
    usage = answer["usage"]
    read = sum(scripted.jobs[1].lengths)
    assert usage["prompt_tokens_details"]["cached_tokens"] >= read - 5


def test_a_base_that_cannot_call_tools_is_refused(base_path, adapter_path, kmerge, tmp_path):
    silent = copy_base(base_path, tmp_path / "silent", CHATML)
    deaf = copy_base(base_path, tmp_path / "deaf", "{#- <tool_call> tool_call.name -#}" + CHATML)
    own = {"expand": True, "chat_template": True}
    cases = (
        ((silent, adapter_path), own, "does not know how this base calls tools"),
        ((deaf, adapter_path), own, "the chat template leaves tools out"),
        (kmerge, own | {"chat_template": False}, "needs a chat template"),
        ((kmerge[0], None), own, "nothing is merged"),
    )
    for source, settings, what in cases:
        with pytest.raises(ServeError, match=f"`expand`: .*{what}") as found:
            serving(*source, **settings).__enter__()
        assert "\n" not in str(found.value)


def test_a_text_that_looks_like_a_number_does_not_count(scripted):
    content = QUESTION.replace("Read:", "[segment 1]\n[segment 2]\nRead:")
    scripted.ask(call(segment=1), "so", content=content)
    assert f"<|im_start|>tool\n{FIRST}<|im_end|>" in scripted.prompts()[1]


def test_a_number_is_read_however_a_model_writes_it(running):
    tokenizer = running.server.service.tokenizer

    def read(arguments: str) -> tuple[Any, bool]:
        made = {"id": "call_0", "function": {"name": "expand", "arguments": arguments}}
        said, result = messages_of(tokenizer, [Segment([3])] * 2, {}, [made], 9)
        shown = said["tool_calls"][0]["function"]["arguments"]["segment"]
        return shown, result["content"].startswith("There is no")

    for written in ("2", "2.0", '"2"', '" 2 "', '"2.0"', '"\\n2\\n"'):
        assert read(f'{{"segment": {written}}}') == (2, False)
    for written in ("2.5", "true", '"2 3"', '"two"', "-2", "2e30", "[2]"):
        assert read(f'{{"segment": {written}}}')[1]


def test_an_id_that_a_template_may_refuse_is_not_shown_to_it(running):
    def shown(known: str) -> str:
        made = {"id": known, "function": {"name": "expand", "arguments": "[]"}}
        said, result = messages_of(running.server.service.tokenizer, (), {}, [made], 9)
        assert result["tool_call_id"] == said["tool_calls"][0]["id"]
        return result["tool_call_id"]

    assert shown("aB3dE6gH9") == "aB3dE6gH9"  # Mistral's models write their own
    for other in ("3fae8e53-8f4c-4b5f-8d43-d4c1aee8a4d1", "call_0", "\ud800", ""):
        assert shown(other) == "expand000"
