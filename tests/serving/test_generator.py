"""What is overridden of mlx-lm: the seam itself, its prompt cache, blocks, and its thread."""

from __future__ import annotations

import pytest
from mlx_lm.server import ResponseGenerator

from kmerge_mlx.errors import ServeError
from kmerge_mlx.serving.generator import check_seam
from tests.servers import eventually, long_answer, receive_until, serving


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


def test_a_generation_thread_that_dies_is_seen(base_path, adapter_path, caplog):
    with serving(base_path, adapter_path) as server:
        generator = server.server.service.generator
        server.assert_alive()
        with server.open_stream(**long_answer()) as stream:

            def broken(*args: object, **options: object) -> None:
                raise RuntimeError("a bug")

            generator.prompt_cache.insert_cache = broken
            assert server.complete(prompt="x", max_tokens=1).status in (200, 503)
            eventually(lambda: server.request("GET", "/health").status == 503)
            receive_until(stream, lambda got: b'"unavailable"' in got)
        assert "a bug" in caplog.text
        assert server.request("GET", "/health").json == {"status": "unavailable"}
        answer = server.complete(prompt="x")
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
