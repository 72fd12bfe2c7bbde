"""How the model reads a prompt, position by position: what ``/v1/layout`` answers."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from kmerge_mlx.prompts.segments import Segment, merged_text


class Layouts:
    """Describes prompts that are laid out.

    Args:
        tokenizer: The model's.
        kv_bytes_at: Bytes of the KV cache by the number of positions.
    """

    def __init__(self, tokenizer: Any, kv_bytes_at: Callable[[int], int]):
        own = merged_text(tokenizer)
        self._kv_bytes_at = kv_bytes_at
        self._bytes_of_raw = self._bytes_of_merged = _speller(tokenizer)
        if own is not None:
            self._bytes_of_merged = _speller(own.tokenizer)

    def describe(self, segments: Sequence[Segment], k: int) -> dict[str, Any]:
        """Counts, and the tokens of each position as texts; all texts end to end are the prompt's.

        ``k`` is the merge factor; at 1 nothing merges.

        A character of several tokens is in the text of the last one, and the others have less, or
        none. What is not a whole character where its segment ends is U+FFFD.
        """
        tokens = sum(len(s.ids) for s in segments)
        positions = sum(s.positions(k) for s in segments)
        merged = sum(len(s.ids) for s in segments if s.merge) if k > 1 else 0
        return {
            "merge_factor": k,
            "prompt_tokens": tokens,
            "compressed_tokens": positions,
            "merged_tokens": merged,
            "raw_tokens": tokens - merged,
            "compression_ratio": tokens / positions,
            "kv_bytes": self._kv_bytes_at(positions),
            "segments": [self._segment(segment, k) for segment in segments],
        }

    def _segment(self, segment: Segment, k: int) -> dict[str, Any]:
        merge = segment.merge and k > 1
        size = k if merge else 1
        # A tokenizer of its own makes what merges, whether or not it is read in merged form.
        bytes_of = self._bytes_of_merged if segment.merge else self._bytes_of_raw
        decoder, last = codecs.getincrementaldecoder("utf-8")("replace"), len(segment.ids) - 1
        texts = [decoder.decode(bytes_of(t), n == last) for n, t in enumerate(segment.ids)]
        blocks = [texts[n : n + size] for n in range(0, len(texts), size)]
        return {"merge": merge, "blocks": blocks}


def _speller(tokenizer: Any) -> Callable[[int], bytes]:
    """The bytes of a token, which are remembered for each."""
    spell = tokenizer.detokenizer.spell
    return cache(lambda token: spell(token)[1])
