"""The server's limits, each with its status: connections, time, queue, length, keys, slots."""

from __future__ import annotations

import json
import time

import pytest

from tests.servers import PATIENCE, eventually, exchange, head, long_answer, serving

KEY = "sesame-42"


@pytest.fixture(scope="module")
def server(base_path, adapter_path):
    with serving(base_path, adapter_path) as address:
        yield address
        address.assert_alive()


def test_200_idle_connections_do_not_keep_others_out(server):
    idle = [server.connect() for _ in range(200)]
    try:
        server.assert_alive()
    finally:
        for connection in idle:
            connection.close()
    server.assert_alive()


def test_more_connections_than_allowed_are_a_503(base_path, adapter_path):
    with serving(base_path, adapter_path, max_connections=3) as server:
        idle = [server.connect() for _ in range(3)]
        eventually(lambda: server.server.service.metrics.get("connections") == 3)
        status, error = exchange(server, b"")
        assert (status, error["code"]) == (503, "too_many_connections")
        for connection in idle:
            connection.close()
        eventually(lambda: server.server.service.metrics.get("connections") == 0)
        server.assert_alive()


@pytest.mark.parametrize("begin", [b"", b"POST /v1/comp", head(Content_Length=50) + b"{"])
def test_a_client_that_drips_its_request_gets_a_408(base_path, adapter_path, begin, slow):
    start = time.monotonic()
    with slow.connect() as connection:
        connection.sendall(begin)
        got = b""
        while True:  # a byte now and then does not prolong it
            connection.settimeout(0.1)
            try:
                piece = connection.recv(4096)
            except TimeoutError:
                if begin:
                    connection.sendall(b" ")
                assert time.monotonic() - start < PATIENCE
                continue
            except ConnectionError:
                break
            if not piece:
                break
            got += piece
    assert got.split()[1] == b"408"
    assert b'"timeout"' in got
    slow.assert_alive()


@pytest.fixture(scope="module")
def slow(base_path, adapter_path):
    with serving(base_path, adapter_path, read_timeout=0.7) as address:
        yield address


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_a_504_or_the_end_of_its_stream(
    base_path, adapter_path, stream
):
    with serving(base_path, adapter_path, request_timeout=0.4) as server:
        answer = server.complete(**long_answer(stream=stream))
        if stream:
            assert answer.status == 200
            last = json.loads(answer.body.split(b"data: ")[-1])
            assert last["error"]["code"] == "timeout"
        else:
            assert answer.status == 504
            assert answer.error["code"] == "timeout"
        eventually(lambda: server.server.service.metrics.get("requests_in_flight") == 0)
        assert server.complete(prompt="x", max_tokens=1).status == 200


def test_a_full_queue_is_a_429_that_says_when_to_come_back(base_path, adapter_path):
    settings = {"decode_concurrency": 1, "prompt_concurrency": 1, "max_queue": 0}
    with serving(base_path, adapter_path, **settings) as server:
        with server.open_stream(**long_answer()):
            answer = server.complete(prompt="x")
            assert answer.status == 429
            assert answer.error["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) > 0
        eventually(lambda: server.server.service.metrics.get("requests_in_flight") == 0)
        server.assert_alive()


def test_a_prompt_longer_than_the_server_takes_is_a_400(base_path, adapter_path):
    with serving(base_path, adapter_path, max_prompt_tokens=8) as server:
        answer = server.complete(prompt=[5] * 9)
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"
        assert server.complete(prompt=[5] * 8, max_tokens=1).status == 200


def test_a_key_is_asked_for(base_path, adapter_path):
    with serving(base_path, adapter_path, api_key=KEY) as server:
        for headers in (
            *({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}),
            *({"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer caf\u00e9"}),
        ):
            for method, path in (
                *(("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics")),
            ):
                answer = server.request(method, path, None, headers)
                assert answer.status == 401
                assert answer.error["code"] == "invalid_api_key"
                assert KEY not in answer.body.decode()
        assert server.request("GET", "/health").status == 200
        good = {"Authorization": f"Bearer {KEY}"}
        assert server.request("GET", "/v1/models", headers=good).status == 200
        answer = server.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, good)
        assert answer.status == 200


def test_a_web_page_may_not_call_unless_its_origin_is_allowed(server, base_path, adapter_path):
    evil = {"Origin": "https://evil.example"}
    answer = server.request("POST", "/v1/completions", {"prompt": "x"}, evil)
    assert answer.status == 403
    assert answer.error["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers
    with serving(base_path, adapter_path, allowed_origins=("https://good.example",)) as server:
        good = {"Origin": "https://good.example"}
        answer = server.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, good)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert server.request("OPTIONS", "/v1/completions", headers=good).status == 204
        assert server.request("POST", "/v1/completions", {"prompt": "x"}, evil).status == 403


def test_a_generation_thread_that_dies_is_seen(base_path, adapter_path, caplog):
    with serving(base_path, adapter_path) as server:
        generator = server.server.service.generator
        server.assert_alive()
        with server.open_stream(**long_answer()) as stream:

            def broken(*args: object, **options: object) -> None:
                raise RuntimeError("a bug")

            generator.prompt_cache.insert_cache = broken
            assert server.complete(prompt="x", max_tokens=1).status in (200, 503)
            rest = b""
            while piece := stream.recv(65_536):
                rest += piece
        assert b'"unavailable"' in rest
        assert "a bug" in caplog.text
        answer = server.request("GET", "/health")
        assert (answer.status, answer.json) == (503, {"status": "unavailable"})
        answer = server.complete(prompt="x")
        assert (answer.status, answer.error["code"]) == (503, "unavailable")


def test_slots_that_run_out_are_a_503_and_come_back(base_path, adapter_path):
    with serving(base_path, adapter_path, max_blocks=20, prompt_cache_size=10) as server:
        kinds = [list(range(start, start + 60)) for start in (10, 80, 150, 220)]
        with server.open_stream(**long_answer(prompt=kinds[0], merge=True)):
            answer = server.complete(prompt=kinds[1], merge=True, max_tokens=1)
            assert answer.status == 503
            assert answer.error["code"] == "blocks_exhausted"
            assert "retry-after" in answer.headers
        eventually(lambda: server.server.service.metrics.get("requests_in_flight") == 0)

        def answered(ids: list[int]) -> bool:
            return server.complete(prompt=ids, merge=True, max_tokens=1).status == 200

        # Whoever was in is gone, and every cache gives way: nobody is refused for ever.
        for ids in (*kinds, *kinds):
            eventually(lambda ids=ids: answered(ids))
            assert server.metric("block_slots_in_use") <= 20
        answer = server.complete(prompt=list(range(10, 110)), merge=True)
        assert answer.status == 400
        assert "25 distinct blocks, more than the server's 20 slots" in answer.error["message"]
        server.assert_alive()
