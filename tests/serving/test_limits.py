"""What a client makes the server hold or do is bounded before the work, and others are served."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest

from kmerge_mlx.serving.connection import MOST_HEAD_BYTES, MOST_HEADERS
from kmerge_mlx.serving.prepare import MOST_BODIES, MOST_CHARACTERS, MOST_PREPARED
from tests.servers import (
    SHORT,
    eventually,
    exchange,
    head,
    long_answer,
    post,
    read_answer,
    rest_of,
    serving,
)

KEY = "sesame-42"


@pytest.fixture(scope="module")
def server(base_path, adapter_path):
    with serving(base_path, adapter_path, allowed_hosts=["llm.example"]) as address:
        yield address


def get(lines: list[str]) -> bytes:
    return "\r\n".join(["GET /v1/models HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def test_a_head_is_read_only_up_to_its_limits_whoever_sends_it(
    server, base_path, adapter_path, tmp_path
):
    assert exchange(server, get(["a: b"] * (MOST_HEADERS - 1))).status == 200
    assert exchange(server, get(["a: " + "b" * (MOST_HEAD_BYTES - 100)])).status == 200
    file = tmp_path / "key"
    file.write_text(KEY)
    with serving(base_path, adapter_path, api_key=str(file)) as locked:
        assert exchange(locked, get([])).status == 401
        for raw in (
            *(get(["a:"] * MOST_HEADERS), get(["a: " + "b" * MOST_HEAD_BYTES])),
            *(
                get(["a:"] * 2 * MOST_HEADERS)[:-4],
                b"a" * (MOST_HEAD_BYTES + 1),
            ),  # not even complete
            b"GET / HTTP/1.1\n" + b"a:\n" * 8000 + b"\n",
        ):
            answer = exchange(locked, raw)
            assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    with server.connect() as connection:  # the next request's, too
        connection.sendall(post(SHORT) + get(["a:"] * MOST_HEADERS))
        got = rest_of(connection)
        assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"431"]


def test_a_host_that_is_not_ours_is_refused_on_every_route(server):
    routes = ("GET /health", "GET /metrics", "GET /v1/models", "GET /", "OPTIONS /health")
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.x", "["):
        for route in (*routes, "POST /v1/completions"):
            answer = exchange(
                server, f"{route} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode()
            )
            assert (answer.status, answer.error["code"]) == (403, "host_not_allowed"), host
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:80", "10.0.0.7", "llm.example"):
        raw = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        assert exchange(server, raw).status == 200, host
    assert exchange(server, b"GET /v1/models HTTP/1.0\r\n\r\n").status == 200


def test_connections_without_a_request_give_way(base_path, adapter_path):
    with serving(base_path, adapter_path, max_connections=4) as server:
        streams, kept = [], server.connect()
        kept.sendall(post(SHORT))
        assert read_answer(kept).status == 200
        begun = [server.connect() for _ in range(3)]
        begun[1].sendall(b"POST /v1/comp")
        begun[2].sendall(post({"prompt": "x" * 5000})[:-1])
        eventually(lambda: server.server.service.preparer._body_bytes > 4000)
        for waiting in (kept, *begun):  # in this order
            streams.append(server.open_stream(**long_answer()))
            if waiting is kept:
                assert rest_of(waiting) == b""
                continue
            answer = read_answer(waiting)
            assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
            assert "retry-after" in answer.headers
        eventually(lambda: server.server.service.preparer._body_bytes == 0)
        assert exchange(server, b"").status == 503  # the others are answered
        for connection in streams:
            connection.close()


def test_a_client_of_a_full_server_sees_the_503_also_while_it_sends(base_path, adapter_path):
    with (
        serving(base_path, adapter_path, max_connections=1) as server,
        server.open_stream(**long_answer()) as busy,
        server.connect() as refused,
    ):
        raw = head(Content_Length=2**22) + b"x" * 2**22
        refused.sendall(raw[: 2**21])
        time.sleep(1.5)  # it was reset after one second
        refused.sendall(raw[2**21 :])
        answer = read_answer(refused)
        assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
        assert busy.recv(10)


def test_bodies_in_memory_are_bounded_and_let_go(base_path, adapter_path):
    with serving(base_path, adapter_path, max_body_bytes=1000, read_timeout=5) as server:
        preparer = server.server.service.preparer
        begun = [server.connect() for _ in range(MOST_BODIES)]
        for connection in begun:
            connection.sendall(head(Content_Length=1000) + b" " * 990)
        eventually(lambda: preparer._body_bytes == 990 * MOST_BODIES)
        answer = server.complete(**SHORT, user="x" * 100)
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert "retry-after" in answer.headers
        assert server.request("GET", "/health").status == 200
        assert [read_answer(connection).status for connection in begun] == [408] * MOST_BODIES
        eventually(lambda: preparer._body_bytes == 0)  # though the connections are open
        assert server.complete(**SHORT, user="x" * 100).status == 200


def test_few_requests_are_prepared_at_once_within_the_time_limit(base_path, adapter_path):
    inside, most, go_on = [], [], threading.Event()
    with serving(base_path, adapter_path, request_timeout=2) as server:
        preparer = server.server.service.preparer
        lay_out = preparer._lay_out

        def slow(*given: object) -> object:
            inside.append(1)
            most.append(len(inside))
            go_on.wait()
            inside.pop()
            return lay_out(*given)

        preparer._lay_out = slow
        asking = [server.connect() for _ in range(MOST_PREPARED + 3)]
        for connection in asking:
            connection.sendall(post(SHORT))
        eventually(lambda: len(inside) == MOST_PREPARED)
        assert server.request("GET", "/health").status == 200
        assert server.metric("requests_in_flight") == len(asking)
        assert [read_answer(connection).status for connection in asking] == [504] * len(asking)
        assert len(most) == MOST_PREPARED  # nobody waits for the others any more: they never began
        go_on.set()
        eventually(lambda: not inside)
        server.assert_alive()


def test_prompts_are_not_prepared_past_the_time_limit(server):
    preparer = server.server.service.preparer
    raw = json.dumps({"prompt": ["x", "y"]}).encode()
    assert len(preparer._read(raw, False, time.monotonic() + 60)[1]) == 2
    with pytest.raises(TimeoutError):
        preparer._read(raw, False, time.monotonic() - 1)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(base_path, adapter_path):
    def broken(*given: object) -> None:
        raise AssertionError("it was tokenized")

    tool = {"type": "function", "function": {"name": "f", "description": "x" * 2000}}
    for settings, most in (({"max_prompt_tokens": 20}, 20), ({}, 2048 * 4)):
        with serving(base_path, adapter_path, **settings) as server:
            preparer, long = server.server.service.preparer, "x" * (MOST_CHARACTERS * most + 1)
            answer = server.complete(prompt=long[1:])  # this may fit, and is tokenized
            assert f"maximum context length is {MOST_CHARACTERS * most}" not in str(answer.json)
            preparer._lay_out = preparer._lay_out_chat = broken
            answers = [server.complete(prompt=["x", long][1:]), server.chat(long)]
            if settings:
                answers.append(server.chat("x", tools=[tool]))
            for answer in answers:
                assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
                assert (
                    f"maximum context length is {most} tokens. However, the prompt has"
                    in (answer.error["message"])
                )
                assert "characters" in answer.error["message"]
