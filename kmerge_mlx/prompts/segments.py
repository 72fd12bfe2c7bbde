"""Text to token ids, cut where what merges begins or ends.

Owns: special tokens as mlx-lm adds them, and which tokens lie in which run of characters. Does not
know why a run merges, chat templates or blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.errors import PromptError

Run = tuple[int, int, bool]
"""First and last character of a text, past the end, and whether what lies between merges."""


_ADVICE = "put all of it in one FILE, without tags"


@dataclass(frozen=True)
class Segment:
    """A run of token ids that is either merged in blocks or read one by one.

    Args:
        ids: Token ids, each below V.
        merge: Whether the run is merged.
    """

    ids: Sequence[int]
    merge: bool = True


def encode(tokenizer: Any, text: str) -> list[int]:
    """Text to token ids as ``mlx_lm.stream_generate`` does: special tokens unless it has them."""
    return list(tokenizer.encode(text, add_special_tokens=wants_special_tokens(tokenizer, text)))


def wants_special_tokens(tokenizer: Any, text: str) -> bool:
    bos = tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def segments_of(
    tokenizer: Any, text: str, special: bool, runs: Sequence[Run], outside: bool
) -> list[Segment]:
    """A text's ids, cut where what merges begins or ends.

    A token that lies wholly in a run goes with it, one that touches none with the outside. One that
    lies across a border stays raw.
    """
    ids = list(tokenizer.encode(text, add_special_tokens=special))
    if not runs:
        return [Segment(ids, outside)]
    segments: list[tuple[int, bool, list[int]]] = []
    for token, (key, merge) in zip(
        ids, _regions(_offsets(tokenizer, text, special, ids), runs, outside), strict=True
    ):
        if segments and (segments[-1][0] == key or not (segments[-1][1] or merge)):
            segments[-1][2].append(token)  # raw beside raw is one run of tokens
        else:
            segments.append((key, merge, [token]))
    return [Segment(tokens, merge) for _, merge, tokens in segments]


def _regions(
    offsets: Iterable[tuple[int, int]], runs: Sequence[Run], outside: bool
) -> Iterator[tuple[int, bool]]:
    """For each token the number of its region, and whether it merges.

    -1 is the outside, -2 what lies across a border.
    """
    first = 0
    for start, end in offsets:
        while first < len(runs) and runs[first][1] <= start:
            first += 1
        touched = []
        for number in range(first, len(runs)):
            if runs[number][0] >= end:
                break
            touched.append(number)
        if start == end or not touched:
            yield -1, outside
        elif runs[touched[0]][0] <= start and end <= runs[touched[0]][1]:
            yield touched[0], runs[touched[0]][2]
        else:
            yield -2, False


def _offsets(
    tokenizer: Any, text: str, special: bool, ids: Sequence[int]
) -> Sequence[tuple[int, int]]:
    """The characters that each token stands for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode"):
        raise PromptError(
            "this tokenizer does not say where its tokens lie in the text, so a part of it cannot "
            "be merged beside a raw one",
            _ADVICE,
        )
    encoding = backend.encode(text, add_special_tokens=special)
    if encoding.ids != ids:
        raise PromptError(
            "this tokenizer changes its tokens after the fact, so a part of a text cannot be "
            "merged beside a raw one",
            _ADVICE,
        )
    return encoding.offsets
