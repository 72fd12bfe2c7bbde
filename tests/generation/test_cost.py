"""What reading a prompt costs: bytes of every kind of KV cache, and what the time includes."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import cache as caches

from kmerge_mlx.generation import cost
from kmerge_mlx.generation.cost import kv_bytes, kv_bytes_at, time_reading
from kmerge_mlx.virtual_tokens import CompressedPrompt
from tests.tiny import build, prompts_of, qwen2_config
from tests.tools.test_sizing import BASES, HYBRIDS


def filled(cache, steps: tuple[int, ...]):
    """A cache that has read so many positions at a time, each of 2 heads, 64 wide, float32."""
    for count in steps:
        cache.update_and_fetch(*(mx.ones((1, 2, count, 64)) for _ in range(2)))
    return cache


def chunked():
    cache = filled(caches.ChunkedKVCache(8), (12,))
    cache.maybe_trim_front()
    return filled(cache, (3,))


PLAIN = 2 * 2 * 64 * 4
EIGHT_BITS = 2 * 2 * (64 + 4 + 4)


def test_kv_bytes_of_every_kind_of_cache_are_of_what_it_holds():
    state = caches.ArraysCache(2)
    state[0] = mx.zeros((1, 3, 5))
    for cache, held in (
        (filled(caches.KVCache(), (300, 1)), 301 * PLAIN),
        (filled(caches.ConcatenateKVCache(), (5, 1)), 6 * PLAIN),
        (filled(caches.QuantizedKVCache(64, 8), (300, 1)), 301 * EIGHT_BITS),
        (filled(caches.RotatingKVCache(8), (1,) * 5), 5 * PLAIN),
        (filled(caches.RotatingKVCache(8), (1,) * 20), 8 * PLAIN),
        (chunked(), 11 * PLAIN),
        (caches.CacheList(filled(caches.KVCache(), (5,)), chunked()), 16 * PLAIN),
        (state, 15 * 4),
        (caches.KVCache(), 0),
    ):
        assert kv_bytes([cache, cache]) == 2 * held


@pytest.mark.parametrize("name", BASES)
def test_bytes_by_the_number_of_positions_are_those_of_a_cache_that_read_them(name):
    model = build(qwen2_config(**BASES[name]))
    at = kv_bytes_at(model)
    for length in (3, 60) if name in HYBRIDS else (3, 300):
        ids = prompts_of(1, length, length)[0]
        reading = time_reading(model, lambda ids=ids: CompressedPrompt(ids, ids, []))
        assert (reading.positions, reading.kv_bytes) == (length, at(length))


def test_the_time_runs_from_before_the_ids_are_made_to_each_token(monkeypatch):
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    def compress() -> CompressedPrompt:
        events.append("compress")
        return CompressedPrompt([1, 2, 3], [1, 2, 3], [])

    model = build(qwen2_config())
    monkeypatch.setattr(cost.time, "perf_counter", clock)
    seconds = time_reading(model, compress, 2).seconds
    assert events[:2] == ["clock", "compress"]
    assert len(seconds) == 2
    assert 0 < seconds[0] < seconds[1]
