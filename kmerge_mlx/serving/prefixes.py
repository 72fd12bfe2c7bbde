"""The server's cache of prefixes: mlx-lm's in memory, and a folder behind it.

Source: ``mlx_lm.models.cache.LRUPromptCache``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from kmerge_mlx.prompts.segments import Segment, beginning
from kmerge_mlx.serving.cache_folder import CacheFolder, Held


def stand_for(
    ids: Sequence[int],
    in_work: Iterable[tuple[Held, list[int]]],
    vocab_size: int,
) -> Held | None:
    """What the ids of a prompt in work stand for, or those of one and its answer.

    Args:
        ids: As the model reads them.
        in_work: Each prompt in work, whose blocks are bound, and its ids.
        vocab_size: V; a virtual id is no part of an answer.

    Returns:
        Its beginning, or None if no prompt in work begins so.
    """
    found = [each for each in in_work if each[1][: len(ids)] == ids[: len(each[1])]]
    if not found:
        return None
    (segments, k), prompt = max(found, key=lambda each: len(each[1]))
    answer = list(ids[len(prompt) :])
    if any(i >= vocab_size for i in answer):
        return None
    start = beginning(segments, len(ids), k)
    return Held([*start, Segment(answer, False)] if answer else start, k)


class PromptCache(LRUPromptCache):
    """mlx-lm's cache of prefixes; it reports each ``hit`` and ``miss``, and knows its ids.

    Args:
        max_size: Most entries.
        max_bytes: Most bytes of them.
        looked_up: Called with the result of each look-up.
        folder: Where entries are kept too.
        held: What the ids of a prompt in work stand for, or of one with its answer.
    """

    def __init__(
        self,
        max_size: int,
        max_bytes: int | None,
        looked_up: Callable[[str], None],
        folder: CacheFolder | None,
        held: Callable[[Sequence[int]], Held | None],
    ):
        super().__init__(max_size, *(() if max_bytes is None else (max_bytes,)))
        self._looked_up, self._folder, self._held = looked_up, folder, held

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The longest cached prefix of a prompt, and the rest."""
        cache, rest = self._nearest(model, tokens)
        if self._folder is not None:
            held = self._held(tokens)
            found = self._folder.read(held, len(tokens) - len(rest), self)
            if found is not None:
                loaded, positions = found
                super().insert_cache(model, tokens[:positions], loaded, cache_type="user")
                del cache
                cache, rest = self._nearest(model, tokens)
            self._folder.encode(held, len(tokens) - len(rest))
        self._looked_up("hit" if len(rest) < len(tokens) else "miss")
        return cache, rest

    def _nearest(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """As mlx-lm finds it, which dies of an empty rest."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if not rest:
            cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
            rest = [*rest, tokens[-1]]
        return cache, rest

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keeps the KV caches of a prefix, in the folder too."""
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        if self._folder is not None and (held := self._held(tokens)) is not None:
            with suppress(KeyError):  # it was too large to be kept
                self._folder.keep(held, self._trie.get(model, tokens))

    def cached_ids(self) -> Iterable[Sequence[int]]:
        """The ids of every cached prefix: their blocks stay bound."""
        return [ids for kept in self._lru._lrus.values() for _, ids in kept]
