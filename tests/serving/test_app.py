"""What comes over the wire gets its status, within its limits, and the server answers the next."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from tests.servers import (
    SHORT,
    eventually,
    exchange,
    head,
    long_answer,
    post,
    read_answer,
    receive_until,
    rest_of,
    serving,
)

KEY = "sesame-42"


@pytest.fixture(scope="module")
def server(base_path, adapter_path):
    with serving(base_path, adapter_path) as address:
        yield address


@pytest.fixture
def alive(server):
    yield server
    server.assert_alive()
    eventually(lambda: server.metric("requests_in_flight") == 0)


@pytest.fixture(scope="module")
def impatient(base_path, adapter_path):
    with serving(base_path, adapter_path, read_timeout=0.7) as address:
        yield address


def test_a_connection_is_kept_for_the_next_request(alive):
    with alive.connect() as connection:
        for body in (SHORT, {}, SHORT | {"stream": True}, SHORT):
            connection.sendall(post(body))
            assert read_answer(connection).status == (200 if body else 400)
        connection.sendall(post(SHORT) + post(SHORT))  # the second one waits for its turn
        receive_until(connection, lambda g: g.count(b"HTTP/1.1 200") == 2 and g.endswith(b"}"))
        connection.sendall(post(SHORT, Connection="close"))
        assert rest_of(connection).startswith(b"HTTP/1.1 200")


def test_a_body_in_chunks_is_read(alive):
    raw, begin = json.dumps(SHORT).encode(), head(Transfer_Encoding="chunked")
    chunks = b"5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (raw[:5], len(raw) - 5, raw[5:])
    assert exchange(alive, begin + chunks).status == 200
    assert exchange(alive, begin + b"no number\r\n").status == 400


def test_a_client_that_expects_to_be_asked_for_its_body_is_asked(alive):
    with alive.connect() as connection:
        raw = json.dumps(SHORT).encode()
        connection.sendall(head(Expect="100-continue", Content_Length=len(raw)))
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(raw)
        assert read_answer(connection).status == 200


def test_a_request_that_is_malformed_gets_its_status(alive):
    for raw, status in (
        *((head(), 400), (head(Content_Length=-5), 400), (head(Content_Length="9" * 500), 400)),
        (head(Content_Length="5\r\nContent-Length: 6") + b"12345", 400),
        (head(Content_Length=5, Content_Encoding="gzip") + b"12345", 415),
        *((b"NONSENSE\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400)),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ):
        answer = exchange(alive, raw)
        assert answer.status == status, raw[:99]
        assert answer.error["message"].isprintable()


def test_another_route_is_a_404_and_another_method_a_405(alive):
    for method, path, status in (
        *(("GET", "/v1", 404), ("POST", "/v1/embeddings", 404), ("PATCH", "/nowhere", 404)),
        *(("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)),
        *(("DELETE", "/v1/models/x", 405), ("GET", "/v1/models/x", 404)),
    ):
        answer = alive.request(method, path)
        assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
        assert ("allow" in answer.headers) == (status == 405)
        known = {404: ("not_found", "model_not_found"), 405: ("method_not_allowed",)}
        assert answer.error["code"] in known[status]
        assert path in answer.error["message"] or "model" in answer.error["message"]


def test_slashes_too_many_are_the_same_path(alive):
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for path in ("/v1//chat/completions", "//v1/chat/completions/", "/v1/chat/completions/"):
        assert alive.request("POST", path, chat).status == 200
    for path in ("/v1//models", "/v1/models/", "/health/"):
        assert alive.request("GET", path).status == 200


def test_a_web_page_that_may_not_call_is_told_what_allows_it(alive):
    origin = {"Origin": "http://chat.example", "Access-Control-Request-Method": "POST"}
    answer = alive.request("OPTIONS", "/v1/chat/completions", headers=origin)
    assert (answer.status, "--allowed-origins" in answer.error["message"]) == (405, True)
    assert "origin" not in alive.request("OPTIONS", "/v1/models").error["message"]


def test_a_stream_is_not_held_back_by_proxies(alive):
    headers = alive.complete(stream=True, **SHORT).headers
    assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-cache")


def test_head_is_get_without_a_body(alive):
    for path in ("/health", "/v1/models", "/v1/models/default_model", "/metrics"):
        got, asked = alive.request("GET", path), alive.request("HEAD", path)
        assert (got.status, asked.status, asked.body) == (200, 200, b"")
        assert asked.headers["content-type"] == got.headers["content-type"]


def test_an_unforeseen_error_is_a_500_without_details(alive, monkeypatch, caplog):
    def broken(*arguments: object) -> None:
        raise RuntimeError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr(alive.server.service.preparer, "_lay_out", broken)
        answer = alive.complete(**SHORT)
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert b"secret" not in answer.body
    eventually(lambda: "a secret" in caplog.text)


def test_what_is_wrong_with_messages_is_a_400_in_the_words_of_a_client(alive):
    for content, param, said in (
        ("<merge>x", "messages", "messages[0]: <merge> at line 1"),
        ([{"type": "image_url"}], "messages[0].content[0]", "messages[0].content[0] is"),
        ("", "messages", "the prompt is empty"),
        ("x", "tools", "tools: needs a chat template"),
    ):
        error = alive.chat(content, tools=[{}] if content == "x" else []).error
        assert error["param"] == param
        assert error["message"].startswith(said)
        assert "`" not in error["message"]


def test_a_prompt_past_the_context_or_the_limit_is_a_400(alive, base_path, adapter_path):
    answer = alive.complete(prompt="<raw>" + "A " * 3000 + "</raw>")
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert answer.error["message"].startswith("This model's maximum context length is 2048 tokens")
    usage = alive.complete(prompt=[5] * 2047, merge=False, max_tokens=50).json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2047, 1)
    with serving(base_path, adapter_path, max_prompt_tokens=8) as server:
        answer = server.complete(prompt=[5] * 9)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert "maximum context length is 8 tokens. However," in answer.error["message"]
        assert server.complete(prompt=[5] * 8, max_tokens=1).status == 200


def test_the_log_says_why_a_request_was_refused(alive, caplog):
    caplog.set_level("INFO")
    alive.complete(prompt="x", temperature="hot\n")
    exchange(alive, b"NONSENSE\r\n\r\n")
    for said in ("'POST /v1/completions' got 400: 'temperature is", "got 400: 'the request is mal"):
        assert said in caplog.text.replace('"', "'")
    assert "hot\n" not in caplog.text


def test_the_model_goes_by_its_folders_name_and_as_it_was_given(base_path, tmp_path):
    (tmp_path / "my-model").symlink_to(base_path)
    given = f"{tmp_path}/my-model/"
    with serving(given, None) as server:
        (model,) = server.request("GET", "/v1/models").json["data"]
        assert model["id"] == "my-model"
        for name in ("my-model", given, "default_model"):
            answer = server.complete(**SHORT, model=name)
            assert (answer.status, answer.json["model"]) == (200, "my-model")
        assert server.complete(**SHORT, model="other").status == 404


def test_a_long_text_of_markup_characters_holds_nobody_up(alive):
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(alive.chat, c * 500_000) for c in "\\\n"]
        for _ in range(20):
            assert alive.request("GET", "/health").status == 200
        assert {answer.result().status for answer in slow} == {400}


def test_a_body_that_is_too_large_is_a_413_that_its_sender_sees(alive):
    chunk, size = b"%x\r\n%s\r\n" % (2**20, b"x" * 2**20), 50 * 2**20
    for raw in (
        head(Content_Length=size) + b"x" * size,
        head(Transfer_Encoding="chunked") + chunk * 9,
        head(Expect="100-continue", Content_Length=10**9),
    ):
        answer = exchange(alive, raw)
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    # Nobody knows whether this client sends its body now, so its connection ends.
    assert answer.headers["connection"] == "close"


@pytest.mark.slow
@pytest.mark.parametrize("before", [b"", post(SHORT)], ids=["first", "second"])
@pytest.mark.parametrize("begin", [b"POST /v1/comp", head(Content_Length=5000) + b"{"])
def test_a_client_that_drips_its_request_gets_a_408(impatient, before, begin):
    over = threading.Event()
    with impatient.connect() as connection, ThreadPoolExecutor() as pool:

        def drip() -> None:  # a byte now and then does not prolong it
            while not over.wait(0.1):
                connection.sendall(b" ")

        connection.sendall(before + begin)
        if before:
            assert read_answer(connection).status == 200
        pool.submit(drip)
        answer = read_answer(connection)
        over.set()
    assert (answer.status, answer.error["code"]) == (408, "timeout")
    assert exchange(impatient, b"").status == 408
    impatient.assert_alive()


@pytest.mark.slow
def test_a_client_that_does_not_read_its_answer_is_let_go(impatient):
    (listener,) = impatient.server._http.servers[0].sockets
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", impatient.port))
        connection.sendall(post(long_answer(stream=True, logprobs=11)))
        eventually(lambda: impatient.metric("requests_in_flight") == 1)
        eventually(lambda: impatient.metric("requests_in_flight") == 0)
        eventually(lambda: 'status="499"' in impatient.request("GET", "/metrics").body.decode())


def test_an_answer_that_takes_too_long_is_a_504_or_the_end_of_its_stream(base_path, adapter_path):
    with serving(base_path, adapter_path, request_timeout=0.4) as server:
        for stream in (False, True):
            answer = server.complete(**long_answer(stream=stream))
            assert answer.status == 504 or stream
            error = json.loads(answer.body.split(b"data: ")[-1])["error"]
            assert error["code"] == "timeout"
            eventually(lambda: server.metric("requests_in_flight") == 0)
        assert server.complete(**SHORT).status == 200


def test_a_full_queue_is_a_429_that_says_when_to_come_back(base_path, adapter_path):
    settings = {"decode_concurrency": 1, "prompt_concurrency": 1, "max_queue": 0}
    with serving(base_path, adapter_path, **settings) as server:
        with server.open_stream(**long_answer()):
            answer = server.complete(prompt="x")
            assert (answer.status, answer.error["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) > 0
        eventually(lambda: server.metric("requests_in_flight") == 0)
        server.assert_alive()


def test_a_key_is_asked_for(base_path, adapter_path, tmp_path):
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    wrong = ("", "Bearer wrong", KEY, f"Basic {KEY}", "Bearer caf\u00e9")
    routes = (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"))
    with serving(base_path, adapter_path, api_key=str(file)) as server:
        for route, given in product(routes, wrong):
            answer = server.request(*route, headers={"Authorization": given})
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert KEY not in answer.body.decode()
        assert server.request("GET", "/health").status == 200
        good = {"Authorization": f"Bearer {KEY}"}
        assert server.request("GET", "/v1/models", headers=good).status == 200
        assert server.request("POST", "/v1/completions", SHORT, good).status == 200


def test_a_web_page_may_not_call_unless_its_origin_is_allowed(alive, base_path, adapter_path):
    evil, good = {"Origin": "https://evil.example"}, {"Origin": "https://good.example"}
    answer = alive.request("POST", "/v1/completions", SHORT, evil)
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in answer.headers
    with serving(base_path, adapter_path, allowed_origins=["https://good.example"]) as server:
        answer = server.request("POST", "/v1/completions", SHORT, good)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        ask = {"Access-Control-Request-Method": "POST"}
        assert server.request("OPTIONS", "/v1/completions", headers=good | ask).status == 200
        assert server.request("OPTIONS", "/v1/completions", headers=evil | ask).status == 400
        assert server.request("POST", "/v1/completions", SHORT, evil).status == 403


def test_a_client_that_leaves_ends_its_generation(alive):
    for stream, seed, more in ((1, None, b""), (1, 3, b""), (0, None, b""), (0, None, b"\r\n")):
        before = alive.metric("generated_tokens_total")
        with alive.connect() as connection:
            connection.sendall(post(long_answer(stream=bool(stream), seed=seed)) + more)
            eventually(lambda: alive.metric("requests_in_flight") == 1)
            connection.sendall(more)
        eventually(lambda: alive.metric("requests_in_flight") == 0)
        assert alive.metric("generated_tokens_total") - before < 1990


def test_a_client_that_leaves_while_its_prompt_is_read_alone_ends_that(base_path, adapter_path):
    with serving(base_path, adapter_path, prefill_step_size=1) as server:
        slow = long_answer(prompt=[5, 6] * 900, seed=1)
        server.open_stream(until=b": keepalive", **slow).close()
        eventually(lambda: server.metric("requests_in_flight") == 0)
        server.assert_alive()
        assert server.metric("generated_tokens_total") <= 2
        assert server.metric("prompt_cache_sequences") == 1  # of the answer just now
