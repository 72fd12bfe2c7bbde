"""mlx-lm's cache of prompt prefixes, made safe for virtual ids and for prompts it knows whole.

Owns: which ids the cached prefixes name. The caches and their order are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from kmerge_mlx.serving.metrics import Metrics


class PromptCache(LRUPromptCache):
    """mlx-lm's prompt cache, which never answers with all of a prompt.

    Args:
        max_size: Most caches.
        max_bytes: Most memory, or None for no limit.
        metrics: What is told about it.
    """

    def __init__(self, max_size: int, max_bytes: int | None, metrics: Metrics):
        super().__init__(max_size, *(() if max_bytes is None else (max_bytes,)))
        self._metrics = metrics

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The longest cached prefix of a prompt, and what is left to read: never nothing.

        mlx-lm's generation thread dies of a prompt of which nothing is left.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if not rest:
            cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
            rest = [*rest, tokens[-1]]
        hit = len(rest) < len(tokens)
        self._metrics.add("prompt_cache_lookups_total", 1, "hit" if hit else "miss")
        return cache, rest

    def insert_cache(self, *args: Any, **options: Any) -> None:
        """Keeps a cache, and counts it."""
        super().insert_cache(*args, **options)
        self.report()

    def clear(self) -> None:
        """Drops every cache."""
        self.trim_to(n_sequences=0)
        self.report()

    def report(self) -> None:
        """Tells how much is kept."""
        self._metrics.set("prompt_cache_sequences", len(self))
        self._metrics.set("prompt_cache_bytes", self.nbytes)

    def cached_ids(self) -> Iterator[Sequence[int]]:
        """The ids of every cached prefix: the blocks they name must stand."""
        for kept in self._lru._lrus.values():
            for _, tokens in kept:
                yield tokens
