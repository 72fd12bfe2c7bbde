"""What clients, proxies and browsers may send beside plain requests, and what they get back."""

from __future__ import annotations

import json
import threading

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


def call(arguments: str) -> list[dict[str, object]]:
    """A conversation in which a tool was called with these arguments."""
    function = {"name": "look", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "seen"},
    ]


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": NaN}', "{", "[" * 100_000])
def test_arguments_of_a_tool_call_are_json_or_a_400(alive, arguments):
    answer = alive.request("POST", "/v1/chat/completions", {"messages": call(arguments)})
    assert (answer.status, answer.error["param"]) == (400, "messages[1]")


def test_a_text_of_nothing_but_markup_characters_holds_nobody_up(alive):
    """Each of them once took minutes, in which no other thread ran: this would not end."""
    slow = [
        threading.Thread(target=alive.chat, args=(text,)) for text in ("\\" * 10**6, "\n" * 10**6)
    ]
    for thread in slow:
        thread.start()
    for _ in range(20):
        assert alive.request("GET", "/health").status == 200
    for thread in slow:
        thread.join()


@pytest.mark.parametrize("target", ["http://[::1", "//["])
def test_a_target_that_is_no_url_is_refused_and_counted(alive, target):
    before = alive.metric("requests_total")
    status, _ = exchange(alive, f"GET {target} HTTP/1.1\r\n\r\n".encode())
    assert status in (400, 404)
    eventually(lambda: alive.metric("requests_total") > before + 1)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/default_model", "/metrics"])
def test_head_is_get_without_a_body(alive, path):
    got, asked = alive.request("GET", path), alive.request("HEAD", path)
    assert (got.status, asked.status, asked.body) == (200, 200, b"")
    assert asked.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Transfer-Encoding": "chunked"}, 411),
        ({"Transfer_Encoding": "chunked", "Content_Length": 5}, 411),
        ({"Content_Length": "5\r\nContent-Length: 6"}, 400),
        ({"Content_Length": 5, "Content_Encoding": "gzip"}, 415),
    ],
)
def test_a_body_whose_end_or_form_is_in_doubt_is_refused(alive, headers, status):
    assert exchange(alive, head(**headers) + b"12345")[0] == status


def test_a_request_line_of_control_characters_is_not_repeated(alive):
    status, error = exchange(alive, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
    assert (status, error["message"]) == (400, "the request is malformed")


def test_a_byte_order_mark_before_the_body_is_no_fault(alive):
    raw = "\ufeff".encode() + json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    assert alive.request("POST", "/v1/completions", raw).status == 200


def test_a_client_that_sends_more_and_leaves_ends_its_generation(alive):
    raw = json.dumps(long_answer()).encode()
    connection = alive.connect()
    connection.sendall(head(Content_Length=len(raw)) + raw)
    eventually(lambda: alive.metric("requests_in_flight") == 1)
    connection.sendall(b"\r\n")
    connection.close()
    eventually(lambda: alive.metric("requests_in_flight") == 0)
    assert alive.metric("generated_tokens_total") < 2000


def test_an_answer_without_text_has_a_content_all_the_same(alive):
    answer = alive.chat("x", logit_bias={"0": 100}, max_tokens=5)
    message = answer.json["choices"][0]["message"]
    assert (answer.status, message["content"]) == (200, "")


def test_a_token_that_is_no_whole_character_is_told_by_its_bytes(alive):
    ids = alive.server.service.tokenizer.encode("\U0001f600", add_special_tokens=False)
    found = []
    for token in ids:
        bias = {str(token): 100}
        answer = alive.chat("x", logit_bias=bias, max_tokens=1, logprobs=True, top_logprobs=2)
        (entry,) = answer.json["choices"][0]["logprobs"]["content"]
        assert entry["id"] == token
        found += entry["bytes"]
        assert entry["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
    assert bytes(found).decode() == "\U0001f600"


def test_as_many_likeliest_tokens_are_named_as_were_asked_for(alive):
    partial = alive.server.service.tokenizer.encode("\U0001f600\u0416", add_special_tokens=False)
    bias = {str(token): 100 - i for i, token in enumerate(partial)}
    answer = alive.complete(prompt="x", logit_bias=bias, max_tokens=1, logprobs=5)
    (named,) = answer.json["choices"][0]["logprobs"]["top_logprobs"]
    assert len(named) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<merge>x", "messages[0]: <merge> at line 1"),
        ([{"type": "image_url", "image_url": "x"}], "messages[0]: expected text parts"),
    ],
)
def test_what_is_wrong_with_a_message_names_its_field(alive, content, said):
    error = alive.chat(content).error
    assert error["param"] == "messages"
    assert error["message"].startswith(said)


def test_an_earlier_answer_may_speak_of_tags(alive):
    messages = [
        {"role": "user", "content": "How do I keep a text raw?"},
        {"role": "assistant", "content": "See </merge> and <raw>."},
        {"role": "user", "content": "Thanks."},
    ]
    body = {"messages": messages, "max_tokens": 1}
    assert alive.request("POST", "/v1/chat/completions", body).status == 200
