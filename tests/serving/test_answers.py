"""What the server answers is what the library answers: alone, batched, cached, streamed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.server import Response

from kmerge_mlx import Segment, load, stream_generate
from kmerge_mlx.prompts.lay_out import lay_out_chat, lay_out_text
from kmerge_mlx.prompts.policy import Layout
from kmerge_mlx.serving.jobs import Job
from tests.cli_runner import CHATML, copy_base
from tests.servers import FIXTURE_EOS, Address, eventually, serving
from tests.tiny import qwen2_config, write_base

TOLERANCE = 1e-3
"""Of a log-probability: batches add float32 numbers in another order."""

TOOLS_TEMPLATE = f"""\
{{#- <tool_call> tool_call.name -#}}
{{%- if tools %}}<tools>{{{{ tools | tojson }}}}</tools>{{% endif -%}}
{CHATML}"""


@pytest.fixture(scope="module")
def chat_base(base_path, tmp_path_factory):
    return copy_base(base_path, tmp_path_factory.mktemp("chat") / "base", CHATML)


@pytest.fixture(scope="module")
def server(chat_base, adapter_path):
    with serving(chat_base, adapter_path, merges="contexts", chat_template=True) as address:
        yield address


@pytest.fixture(scope="module")
def library(chat_base, adapter_path):
    return load(str(chat_base), adapter_path, 4)


def words(rng: random.Random, count: int) -> str:
    """Text of about so many tokens."""
    return " ".join(
        "".join(rng.choices("ABCDEFGHIJ", k=2)) if rng.random() < 0.7 else "the tree"
        for _ in range(count // 2)
    )


def mixed_requests(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests of every kind, each with one right answer."""
    rng = random.Random(7)
    for i in range(count):
        length, extra = round(10 ** rng.uniform(1.0, 3.2)), {}
        body = {"max_tokens": rng.randint(1, 12), "temperature": 0, "stream": i % 2 == 0}
        if i % 3 == 0:
            extra |= {"repetition_penalty": 1.3, "repetition_context_size": 40}
            body |= {"presence_penalty": 0.5, "frequency_penalty": 0.25}
        if i % 5 == 0:
            body["logit_bias"] = {"65": 5, "66": -5}
        if i % 7 == 0:
            body["stop"] = ["e", "the"]
        if i % 11 == 0:
            body |= {"temperature": 0.8, "seed": i, "top_p": 0.9}
            extra["top_k"] = 40
        body["extra_body"] = extra
        if i % 4 < 2:
            shared = "Shared: " + words(random.Random(i % 8), length)
            text = f"{shared}\n\nWhich of {words(rng, 6)}?"
            messages = [{"role": "user", "content": text}]
            yield "chat", body | {"messages": messages, "logprobs": True, "top_logprobs": 3}
        else:
            prompt = f"<merge>{words(rng, length)}</merge> Answer {i}:"
            yield "text", body | {"prompt": prompt, "logprobs": 2}


def ask(server: Address, kind: str, body: dict[str, Any]) -> tuple[str, list[float], str]:
    """Text, log-probabilities and reason of the end, by the openai package."""
    client = server.client()
    create = client.chat.completions.create if kind == "chat" else client.completions.create
    answer = create(**{"model": "default_model"} | body)
    text, logprobs, end = "", [], ""
    for piece in answer if body["stream"] else [answer]:
        (choice,) = piece.choices
        made = choice.logprobs
        if kind == "text":
            text += choice.text
            logprobs += made.token_logprobs if made else []
        else:
            text += (choice.delta if body["stream"] else choice.message).content or ""
            logprobs += [t.logprob for t in made.content] if made else []
        end = choice.finish_reason or end
    return text, logprobs, end


@pytest.mark.slow
def test_mixed_requests_at_once_equal_the_same_one_at_a_time(server, chat_base, adapter_path):
    requests = list(mixed_requests(64))
    alone = [ask(server, *request) for request in requests]
    with serving(chat_base, adapter_path, merges="contexts", chat_template=True) as other:
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda request: ask(other, *request), requests))
        assert other.metric("prompt_cache_lookups_total") == 64
        assert other.metric("cached_tokens_total") > 0
    for expected, got in zip(alone, together, strict=True):
        assert (got[0], got[2]) == (expected[0], expected[2])
        assert len(got[1]) == len(expected[1]) > 0
        assert max(abs(a - b) for a, b in zip(got[1], expected[1], strict=True)) < TOLERANCE


def test_a_chat_is_laid_out_and_answered_as_the_library_does(server, library):
    content = "Tree: " + "AB CD " * 40 + "\n\nWhat is it?"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    segments = lay_out_chat(library[1], messages, Layout("contexts"))
    expected = list(stream_generate(*library, segments, 8))
    body = {"messages": messages, "max_tokens": 8, "logprobs": True}
    answer = server.request("POST", "/v1/chat/completions", body).json
    choice, usage = answer["choices"][0], answer["usage"]
    assert (choice["message"]["content"] or "") == "".join(r.text for r in expected)
    assert usage["prompt_tokens"] == expected[-1].prompt_tokens
    assert usage["compressed_tokens"] == expected[-1].compressed_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    got = [token["logprob"] for token in choice["logprobs"]["content"]]
    wanted = [response.logprobs[response.token].item() for response in expected]
    assert got == pytest.approx(wanted, abs=TOLERANCE)


def test_a_completion_is_laid_out_and_answered_as_the_library_does(server, library):
    for prompt, merge in (("<merge>AB CD EF</merge> IJ", None), ("AB CD", True), ("AB CD", False)):
        segments = lay_out_text(library[1], prompt)
        if merge is not None:
            segments = [Segment([i for s in segments for i in s.ids], merge)]
        expected = list(stream_generate(*library, segments, 6))
        answer = server.complete(prompt=prompt, merge=merge, max_tokens=6).json
        assert answer["choices"][0]["text"] == "".join(r.text for r in expected)
        assert answer["usage"]["compressed_tokens"] == expected[-1].compressed_tokens


def test_what_is_raw_is_answered_as_plain_mlx_lm_does(server, library):
    ids = [(7 * i) % 650 + 1 for i in range(90)]
    steps = generate_step(mx.array(ids), library[0], max_tokens=6)
    expected = [logprobs[token].item() for token, logprobs in steps]
    answer = server.complete(prompt=ids, merge=False, max_tokens=6, logprobs=1).json
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["compressed_tokens"] == 90
    got = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert got == pytest.approx(expected[: len(got)], abs=TOLERANCE)


def test_penalties_see_original_ids(server, library):
    ids = [(11 * i) % 650 + 1 for i in range(40)]
    kinds = (("repetition", 3.0), ("presence", 20), ("frequency", 20))
    for seed, (kind, size) in product((None, 1), kinds):  # in a batch, and alone
        body = {f"{kind}_penalty": size, f"{kind}_context_size": 60}
        known = {"prompt": ids, "merge": True, "max_tokens": 8, "seed": seed}
        answer = server.complete(**known, **body, logit_bias={str(i): 15 for i in ids}).json
        processors = make_logits_processors(dict.fromkeys(ids, 15.0), **body)
        responses = stream_generate(*library, ids, 8, logits_processors=processors)
        assert answer["choices"][0]["text"] == "".join(r.text for r in responses)


def test_a_shared_document_is_read_once(server, chat_base, adapter_path):
    document = words(random.Random(3), 600)

    def about(question: str, asked: Address) -> tuple[int, int, list[float]]:
        answer = asked.chat(f"{document}\n\n{question}", max_tokens=5, logprobs=True).json
        logprobs = [t["logprob"] for t in answer["choices"][0]["logprobs"]["content"]]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached, answer["usage"]["prompt_tokens"] - cached, logprobs

    assert about("What is AB?", server)[0] < 30
    _, read, logprobs = about("Where is the tree?", server)
    assert read < 40
    with serving(chat_base, adapter_path, merges="contexts", chat_template=True) as fresh:
        cached, _, wanted = about("Where is the tree?", fresh)
    assert cached < 30
    assert logprobs == pytest.approx(wanted, abs=TOLERANCE)


def test_blocks_that_were_used_again_answer_nothing_wrong(base_path, adapter_path):
    rng = random.Random(1)
    prompts = [[rng.randrange(1, 640) for _ in range(40)] for _ in range(12)]

    def logprobs(server: Address, prompt: list[int]) -> list[float]:
        answer = server.complete(prompt=prompt, merge=True, max_tokens=3, logprobs=0).json
        return answer["choices"][0]["logprobs"]["token_logprobs"]

    turns = [rng.randrange(12) for _ in range(40)]
    with serving(base_path, adapter_path, max_blocks=25, prompt_cache_size=4) as small:
        got = [logprobs(small, prompts[turn]) for turn in turns]
        assert small.metric("block_slots_in_use") <= 25
    with serving(base_path, adapter_path, prompt_cache_size=1) as large:
        known = [logprobs(large, prompt) for prompt in prompts]
    for turn, found in zip(turns, got, strict=True):
        assert found == pytest.approx(known[turn], abs=TOLERANCE)


def test_a_base_without_an_adapter_is_served_unmerged(base_path):
    with serving(base_path, None) as server:
        usage = server.complete(prompt="AB CD EF GH " * 30, max_tokens=2).json["usage"]
        assert usage["compressed_tokens"] == usage["prompt_tokens"]
        server.assert_alive()


def test_a_quantized_kv_cache_serves_one_at_a_time(tmp_path):
    base = write_base(tmp_path / "base", qwen2_config())
    settings = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    with serving(base, None, **settings) as server:
        with ThreadPoolExecutor(3) as pool:
            answers = list(
                pool.map(lambda i: server.complete(prompt=f"A{i}", max_tokens=8), range(3))
            )
        assert [answer.status for answer in answers] == [200] * 3


def test_a_stop_text_ends_an_answer_whatever_its_tokens(server):
    body = {"prompt": [7, 8, 9], "max_tokens": 30, "logit_bias": {"0": -100}, "stream": False}
    body |= {"extra_body": {"merge": False}}
    whole, _, _ = ask(server, "text", body)
    for length, stream in product((1, 2, 3), (False, True)):
        stop = whole[len(whole) // 2 :][:length]
        text, _, end = ask(server, "text", body | {"stop": stop, "stream": stream})
        assert (text, end) == (whole[: whole.index(stop)], "stop")


def test_a_list_of_prompts_is_answered_in_one_request(server):
    prompts = ["AB CD", "the tree is", [7, 8, 9]]
    body = {"max_tokens": 6, "temperature": 0, "logit_bias": {"0": -100}}
    alone = [server.complete(prompt=prompt, **body).json for prompt in prompts]
    together = server.complete(prompt=prompts, **body).json
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    texts = [answer["choices"][0]["text"] for answer in alone]
    assert [choice["text"] for choice in together["choices"]] == texts
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "compressed_tokens"):
        assert together["usage"][name] == sum(answer["usage"][name] for answer in alone)
    streamed = ["", "", ""]
    create = server.client().completions.create
    for chunk in create(model="default_model", prompt=prompts, stream=True, **body):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    eventually(lambda: server.metric("requests_in_flight") == 0)
    error = server.complete(prompt=["x"] * 97).error
    assert error["param"] == "prompt"
    assert "97 prompts, the server takes 96" in error["message"]


def test_the_role_comes_with_the_first_chunk_alone(server):
    body = {"messages": [{"role": "user", "content": "AB"}], "logit_bias": {"0": -100}}
    stream = server.client().chat.completions.create(
        model="default_model", max_tokens=6, stream=True, **body
    )
    roles = [choice.delta.role for chunk in stream for choice in chunk.choices]
    assert len(roles) > 2
    assert roles == ["assistant", *[None] * (len(roles) - 1)]


def test_a_top_p_of_0_leaves_the_likeliest_token_alone(server):
    body = {"prompt": "AB", "max_tokens": 20, "temperature": 5}
    greedy = server.complete(**body | {"temperature": 0}).json["choices"][0]["text"]
    assert server.complete(**body, top_p=0).json["choices"][0]["text"] == greedy


def test_a_seed_of_minus_1_is_random(server):
    body = {"prompt": "AB", "max_tokens": 20, "temperature": 5, "seed": -1}
    assert len({server.complete(**body).json["choices"][0]["text"] for _ in range(4)}) > 1


def test_a_stream_ends_with_usage_for_who_asks(server):
    stream = server.client().completions.create(
        model=server.client().models.list().data[0].id,
        prompt="<merge>AB CD EF GH</merge> x",
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    *_, last = stream
    assert last.choices == []
    assert last.usage.completion_tokens in (1, 2, 3)
    assert last.usage.model_extra["compressed_tokens"] < last.usage.prompt_tokens


def test_the_likeliest_tokens_come_in_order_with_the_one_that_was_taken(server):
    answer = server.chat("AB CD", max_tokens=3, logprobs=True, top_logprobs=4).json
    for token in answer["choices"][0]["logprobs"]["content"]:
        likeliest = [t["logprob"] for t in token["top_logprobs"]]
        assert likeliest == sorted(likeliest, reverse=True)
        assert len(likeliest) == 4
        assert token["token"] == token["top_logprobs"][0]["token"]  # greedy


def test_a_token_that_is_a_part_of_a_character_is_written_as_its_bytes(server):
    ids = server.server.service.tokenizer.encode("\U0001f600", add_special_tokens=False)
    found = []
    for token in ids:
        answer = server.chat("x", logit_bias={str(token): 100}, max_tokens=1, logprobs=True)
        (entry,) = answer.json["choices"][0]["logprobs"]["content"]
        assert entry["id"] == token
        found += entry["bytes"]
        assert entry["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
    assert bytes(found).decode() == "\U0001f600"


def test_tools_are_shown_to_the_template_and_calls_are_parsed(
    base_path, adapter_path, tmp_path, monkeypatch
):
    base = copy_base(base_path, tmp_path / "tools", TOOLS_TEMPLATE)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    said = '<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
    with serving(base, adapter_path, chat_template=True) as server:

        async def scripted(job: Job) -> Any:
            reply = await real(job)
            return next(script) if isinstance(reply, Response) else reply

        def read(**more: Any) -> int:
            return server.chat("hi", max_tokens=1, **more).json["usage"]["prompt_tokens"]

        assert read(tools=[tool]) > read() == read(tools=[tool], tool_choice="none")
        tokens = server.server.service.tokenizer.encode(said)
        pieces = [Response("", token, 0.0, None, ()) for token in tokens]
        real, script = Job.next, iter([*pieces, Response("", FIXTURE_EOS, 0.0, "stop", ())])
        monkeypatch.setattr(Job, "next", scripted)
        choice = server.chat("hi", tools=[tool], logit_bias={"0": -100}).json["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "look", "arguments": '{"at": 1}'}


def test_metrics_count_what_happened(base_path, adapter_path):
    with serving(base_path, adapter_path) as server:
        usage = server.complete(prompt=[5] * 40, merge=True, max_tokens=3).json["usage"]
        server.complete(prompt="")
        eventually(lambda: server.metric("requests_total") >= 2)
        assert server.metric("prompt_tokens_total") == 40
        assert server.metric("compressed_tokens_total") == 10
        assert server.metric("generated_tokens_total") == usage["completion_tokens"]
        assert server.metric("block_slots_in_use") == 1
        assert server.metric("time_to_first_token_seconds_count") == 1
        assert server.metric("ready") == 1
        text = server.request("GET", "/metrics").body.decode()
        assert 'requests_total{endpoint="/v1/completions",status="400"} 1' in text
        assert 'request_duration_seconds_bucket{le="+Inf"} 1' in text
        names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(names) == len(set(names)) > 10


def test_usage_says_how_much_merged_and_the_log_once_why_not(chat_base, adapter_path, caplog):
    document = "AB CD EF GH IJ KL MN OP QR ST " * 20
    with serving(chat_base, adapter_path, merges="documents", chat_template=True) as server:

        def usage(content):
            return server.chat(content, max_tokens=1).json["usage"]

        with caplog.at_level("INFO"):
            merged, *raw = (usage(text) for text in (f"{document}\nWhat?", document, document))
        assert merged["merged_tokens"] > 10 * merged["raw_tokens"]
        for counts in (merged, *raw):
            assert counts["merged_tokens"] + counts["raw_tokens"] == counts["prompt_tokens"]
        assert {counts["merged_tokens"] for counts in raw} == {0}
    said = [r.getMessage() for r in caplog.records if "does not merge" in r.getMessage()]
    assert said == [
        "messages[0] (user) does not merge: no line ends between a document and a question "
        "(docs/prompts.md; logged once)"
    ]
