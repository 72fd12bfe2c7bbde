"""What is overridden of mlx-lm: the seam itself, its prompt cache, blocks, and its thread."""

from __future__ import annotations

import time

import pytest
from mlx_lm.server import ResponseGenerator

from kmerge_mlx.errors import ServeError
from kmerge_mlx.serving.generator import MOST_FAILURES, check_seam
from kmerge_mlx.serving.jobs import Job
from tests.servers import Address, eventually, long_answer, receive_until, serving


def test_another_mlx_lm_is_one_clear_error(monkeypatch):
    check_seam()
    monkeypatch.setattr(ResponseGenerator, "_tokenize", lambda self, tokenizer, request: None)
    with pytest.raises(ServeError, match=r"_tokenize takes \(self, tokenizer, request\), expected"):
        check_seam()


def test_slots_that_run_out_are_a_503_and_come_back(base_path, adapter_path):
    with serving(base_path, adapter_path, max_blocks=20, prompt_cache_size=10) as server:
        kinds = [list(range(start, start + 60)) for start in (10, 80, 150, 220)]
        with server.open_stream(**long_answer(prompt=kinds[0], merge=True)):
            answer = server.complete(prompt=kinds[1], merge=True, max_tokens=1)
            assert (answer.status, answer.error["code"]) == (503, "blocks_exhausted")
            assert "retry-after" in answer.headers
        eventually(lambda: server.metric("requests_in_flight") == 0)

        def answered(ids: list[int]) -> bool:
            return server.complete(prompt=ids, merge=True, max_tokens=1).status == 200

        # The client that left holds nothing, and every cache gives way.
        for ids in (*kinds, *kinds):
            eventually(lambda ids=ids: answered(ids))
            assert server.metric("block_slots_in_use") <= 20
        answer = server.complete(prompt=list(range(10, 110)), merge=True)
        assert answer.status == 400
        assert "25 distinct blocks, more than the server's 20 slots" in answer.error["message"]
        server.assert_alive()


def break_caching(server: Address, times: int) -> None:
    """Makes mlx-lm's loop fail so often, as it keeps the cache of a prompt."""
    generator = server.server.service.generator
    real, left = generator.prompt_cache.insert_cache, [None] * times

    def broken(*args: object, **options: object) -> None:
        if left:
            left.pop()
            raise RuntimeError("a bug")
        real(*args, **options)

    generator.prompt_cache.insert_cache = broken


def test_generation_that_fails_ends_its_requests_and_begins_anew(
    base_path, adapter_path, caplog, monkeypatch
):
    put = Job.put

    def late_end(job: Job, reply: object) -> None:
        if reply is None:  # an answer is over for its client before mlx-lm says that it is
            time.sleep(0.1)
        put(job, reply)

    monkeypatch.setattr(Job, "put", late_end)
    with serving(base_path, adapter_path) as server:
        for _ in range(MOST_FAILURES):  # an answer between them begins the count anew
            server.assert_alive()
            with server.open_stream(**long_answer()) as stream:
                break_caching(server, 1)
                assert server.complete(prompt="x", max_tokens=1).status in (200, 503)
                receive_until(stream, lambda got: b'"generation_failed"' in got)
            eventually(lambda: server.metric("requests_in_flight") == 0)
        assert "a bug" in caplog.text
        server.assert_alive()


def test_generation_that_fails_again_and_again_is_given_up(
    base_path, adapter_path, caplog, monkeypatch
):
    with serving(base_path, adapter_path) as server:
        generator = server.server.service.generator

        def broken() -> None:
            eventually(lambda: generator.jobs)
            raise RuntimeError("a bug")

        # From the first failure on: one after an answer would begin the count anew.
        monkeypatch.setattr(generator, "_generate", broken)
        break_caching(server, 1)
        codes = []
        while server.request("GET", "/health").status == 200:
            answer = server.complete(prompt="x", max_tokens=1)
            codes += [answer.error["code"]] if answer.status == 503 else []
            assert len(codes) <= MOST_FAILURES
        assert "a bug" in caplog.text
        assert server.request("GET", "/health").json == {"status": "unavailable"}
        answer = server.complete(prompt="x")
        assert (answer.status, answer.error["code"]) == (503, "unavailable")


def test_a_fault_without_a_request_ends_the_thread(base_path, adapter_path, monkeypatch):
    with serving(base_path, adapter_path) as server:

        def broken(*args: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(server.server.service.generator, "_next_request", broken)
        eventually(lambda: server.request("GET", "/health").status == 503)
