"""What reading a prompt costs: seconds to the first token, and bytes of the KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import CacheList, make_prompt_cache

from kmerge_mlx.virtual_tokens import CompressedPrompt


@dataclass(frozen=True)
class Spread:
    """The same figure from every round that counts: median, lowest, highest, and all in order."""

    median: float
    min: float
    max: float
    trials: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        trials = tuple(values)
        return cls(median(trials), min(trials), max(trials), trials)


@dataclass(frozen=True)
class Reading:
    """One run: a prompt read, and some tokens generated."""

    positions: int  # prefilled
    seconds: list[float]  # from the prompt's ids to each generated token
    kv_bytes: int  # of the cache when the first token is sampled: exactly the prompt


def time_reading(
    model: nn.Module, compress: Callable[[], CompressedPrompt], max_tokens: int = 1, **options: Any
) -> Reading:
    """Reads one prompt and generates greedily.

    Args:
        model: Any of mlx-lm's models, with an adapter or without.
        compress: Makes the ids that the model reads; its time counts.
        max_tokens: How many to generate.
        **options: Those of ``mlx_lm.generate.generate_step``.
    """
    held: list[int] = []

    def greedy(logprobs: mx.array) -> mx.array:
        if not held:  # when the first token is sampled, exactly the prompt is in the cache
            held.append(kv_bytes(cache))
        return mx.argmax(logprobs, axis=-1)

    mx.clear_cache()
    with wired_limit(model, [generation_stream]):
        start = time.perf_counter()
        prompt = compress()
        cache = make_prompt_cache(model)
        how = {"max_tokens": max_tokens, "sampler": greedy, "prompt_cache": cache} | options
        steps = generate_step(mx.array(prompt.ids), model, **how)
        seconds = [time.perf_counter() - start for _ in steps]
        # mlx-lm queues a step more than it gives: it must not run into the next one's time.
        mx.synchronize(generation_stream)
    return Reading(len(prompt.ids), seconds, held[0])


def kv_bytes(cache: Sequence[Any]) -> int:
    """Bytes that mlx-lm's cache holds for the positions read so far, not what it has room for."""
    total = 0
    for entry in cache:
        if isinstance(entry, CacheList):
            total += kv_bytes(entry.caches)
        elif entry.empty() or not hasattr(entry, "keys_and_values"):
            total += entry.nbytes
        else:  # the slices are never evaluated
            total += sum(array.nbytes for _, array in tree_flatten(entry.keys_and_values()))
    return total


def kv_bytes_at(model: nn.Module) -> Callable[[int], int]:
    """Bytes of a model's KV cache by the number of positions read."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[0]]), cache=cache))
    return kv_bytes_from(cache)


def kv_bytes_from(cache: Sequence[Any]) -> Callable[[int], int]:
    """Bytes by the number of positions, as they follow from a cache that has read one of them.

    A sliding window keeps no more than its size, and the state of a linear layer has one size.
    """
    layers = list(_layers(cache))

    def at(positions: int) -> int:
        return sum(size * min(positions, most) if grows else size for size, grows, most in layers)

    return at


def _layers(cache: Sequence[Any]) -> Iterable[tuple[int, bool, float]]:
    """Of each layer's cache: its bytes, whether they grow, and the most positions it keeps."""
    for entry in cache:
        if isinstance(entry, CacheList):
            yield from _layers(entry.caches)
        else:
            most = getattr(entry, "max_size", None) or getattr(entry, "chunk_size", None)
            yield kv_bytes([entry]), hasattr(entry, "keys_and_values"), most or float("inf")
