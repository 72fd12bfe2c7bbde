"""Whatever comes over the wire gets its status, and the server answers the next one."""

from __future__ import annotations

import json

import pytest

from tests.servers import eventually, exchange, head, long_answer, serving


@pytest.fixture(scope="module")
def server(base_path, adapter_path):
    with serving(base_path, adapter_path) as address:
        yield address
        address.assert_alive()


@pytest.fixture
def alive(server):
    """The server, which must be alive after the test."""
    yield server
    server.assert_alive()


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"",
        b"[]",
        b'"text"',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(alive, raw):
    answer = alive.request("POST", "/v1/completions", raw)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 700]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "<merge>x"}, None),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": 1e999}, None),
        ({"prompt": "x", "top_k": 700}, "top_k"),
        ({"prompt": "x", "top_p": 1.1}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": "x", "xtc_threshold": 0.6}, "xtc_threshold"),
        ({"prompt": "x", "repetition_penalty": 1e-30}, "repetition_penalty"),
        ({"prompt": "x", "logit_bias": {"700": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"1": 1e9}}, "logit_bias"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "n": 2}, "n"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "logprobs": 99}, "logprobs"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "adapters": "/etc"}, "adapters"),
        ({"prompt": "x", "draft_model": "some/model"}, "draft_model"),
    ],
)
def test_a_field_that_cannot_be_is_a_400_that_names_it(alive, body, param):
    raw = json.dumps(body).replace("Infinity", "1e999").encode()
    answer = alive.request("POST", "/v1/completions", raw)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param or param is None


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "x",
        ["x"],
        [{"content": "x"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
        [{"role": "user", "content": "x", "merge": "yes"}],
        [{"role": "user", "content": "</raw>"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    ],
)
def test_messages_that_are_none_are_a_400(alive, messages):
    answer = alive.request("POST", "/v1/chat/completions", {"messages": messages})
    assert answer.status == 400, answer.body
    assert answer.error["message"]


@pytest.mark.parametrize("model", ["gpt-4", "/etc/passwd", "../base", "Qwen/Qwen2.5-0.5B", ""])
def test_a_model_that_is_not_served_is_a_404_and_nothing_is_loaded(alive, model):
    answer = alive.complete(prompt="x", model=model)
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert alive.request("GET", f"/v1/models/{model or 'x'}").status == 404


@pytest.mark.parametrize("field", ["adapters", "adapter", "draft_model"])
def test_no_path_of_a_client_is_ever_opened(alive, tmp_path, field):
    assert alive.complete(prompt="x", **{field: str(tmp_path)}).status == 400


def test_a_prompt_past_the_context_is_a_400(alive):
    answer = alive.complete(prompt="<raw>" + "A " * 3000 + "</raw>")
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    assert "the model's context is 2,048" in answer.error["message"]


def test_an_answer_never_runs_past_the_context(alive):
    ids = [5] * 2047
    usage = alive.complete(prompt=ids, merge=False, max_tokens=50, stop=None).json["usage"]
    assert usage["prompt_tokens"] == 2047
    assert usage["completion_tokens"] == 1


def test_the_same_prompt_again_is_answered_the_same(alive):
    first, *others = (
        alive.complete(prompt="The same again and again", max_tokens=4, logprobs=1).json
        for _ in range(3)
    )
    for other in others:
        assert other["choices"][0]["text"] == first["choices"][0]["text"]
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_prompt_that_is_cached_to_its_last_token_is_answered(alive):
    known = alive.complete(prompt=[41, 42, 43], merge=False, max_tokens=5)
    assert known.status == 200
    cached = [
        ids for ids in alive.server.service.generator.prompt_cache.cached_ids() if ids[0] == 41
    ]
    answer = alive.complete(prompt=list(cached[0]), merge=False, max_tokens=2).json
    assert answer["usage"]["prompt_tokens"] == len(cached[0])
    assert 0 < answer["usage"]["prompt_tokens_details"]["cached_tokens"] < len(cached[0])


def test_a_prompt_that_is_a_part_of_an_answered_one_is_answered(alive):
    whole = list(range(10, 60))
    for length in (50, 49, 50, 12, 1, 1):
        answer = alive.complete(prompt=whole[:length], merge=False, max_tokens=2)
        assert answer.status == 200


def test_a_body_of_50_mb_is_a_413_that_its_sender_sees(alive):
    answer = alive.request("POST", "/v1/completions", b"x" * (50 * 2**20))
    assert answer.status == 413
    assert answer.error["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (head(), 411),
        (head(Transfer_Encoding="chunked") + b"0\r\n\r\n", 411),
        (head(Content_Length=-5), 400),
        (head(Content_Length="five"), 400),
        (head(Content_Length="9" * 500), 400),
        (b"NONSENSE\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_a_request_that_is_malformed_gets_its_status(alive, raw, status):
    got, error = exchange(alive, raw)
    assert got == status
    assert error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("PUT", "/v1/completions", 405),
        ("DELETE", "/v1/models/x", 405),
        ("PATCH", "/nowhere", 404),
    ],
)
def test_a_route_that_is_not_there_is_a_404_and_a_wrong_method_a_405(alive, method, path, status):
    answer = alive.request(method, path, {} if method != "GET" else None)
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"
    assert ("allow" in answer.headers) == (status == 405)


def test_a_client_that_sends_half_a_body_and_leaves_is_forgotten(alive):
    with alive.connect() as connection:
        connection.sendall(head(Content_Length=100) + b"{")
    eventually(lambda: alive.metric("connections") == 1)


@pytest.mark.parametrize("seed", [None, 3], ids=["batched", "alone"])
def test_a_client_that_leaves_in_mid_stream_ends_its_generation(alive, seed):
    alive.open_stream(**long_answer(seed=seed)).close()
    eventually(lambda: alive.metric("requests_in_flight") == 0)
    assert alive.metric("generated_tokens_total") < 2000


def test_a_client_that_leaves_while_its_prompt_is_read_alone_ends_that(base_path, adapter_path):
    with serving(base_path, adapter_path, prefill_step_size=1) as server:
        slow = long_answer(prompt=[5, 6] * 900, seed=1)
        server.open_stream(until=b": keepalive", **slow).close()
        eventually(lambda: server.metric("requests_in_flight") == 0)
        server.assert_alive()
        assert server.metric("generated_tokens_total") <= 2
        assert server.metric("prompt_cache_sequences") == 1  # of the answer just now


def test_a_client_that_leaves_without_streaming_ends_its_generation(alive):
    before = alive.metric("generated_tokens_total")
    raw = json.dumps(long_answer()).encode()
    with alive.connect() as connection:
        connection.sendall(head(Content_Length=len(raw)) + raw)
        eventually(lambda: alive.metric("requests_in_flight") == 1)
    eventually(lambda: alive.metric("requests_in_flight") == 0)
    assert alive.metric("generated_tokens_total") - before < 1990
