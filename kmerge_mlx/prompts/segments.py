"""Turns text into token ids, cut where what merges begins or ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from kmerge_mlx.errors import PromptError, short
from kmerge_mlx.prompts.tags import Span, text_of

_OUTSIDE, _BORDER = -1, -2


@dataclass(frozen=True)
class Segment:
    """A run of token ids that is either merged in blocks or read one by one.

    Args:
        ids: Token ids, each below V.
        merge: Whether the run is merged.
    """

    ids: Sequence[int]
    merge: bool = True

    def positions(self, merge_factor: int) -> int:
        """How many positions the run takes: a merged one takes one for each block."""
        return -(-len(self.ids) // merge_factor) if self.merge else len(self.ids)


def beginning(segments: Iterable[Segment], positions: int, merge_factor: int) -> list[Segment]:
    """What the first positions of a prompt stand for."""
    found: list[Segment] = []
    for segment in segments:
        if positions < (own := segment.positions(merge_factor)):
            tokens = positions * (merge_factor if segment.merge else 1)
            segment = Segment(segment.ids[:tokens], segment.merge)
        positions -= own
        found += [segment] if segment.ids else []
        if positions <= 0:
            break
    return found


@dataclass(frozen=True)
class MergedText:
    """How merging text becomes tokens where the encoder has a tokenizer of its own.

    A tokenizer carries one as ``merged_text``, and then turns only what is raw into tokens. It
    should not know the two that stand around a merged text, so that no text can spell them.

    Args:
        tokenizer: The encoder's.
        start: The token before a merged text.
        end: The token after it.
    """

    tokenizer: Any
    start: int
    end: int

    def segments(
        self, tokenizer: Any, spans: Sequence[Span], outside: bool, special: bool
    ) -> list[Segment]:
        """What :func:`segments_of` gives: each run of merging spans between the two tokens."""
        raw = list(tokenizer.encode("", add_special_tokens=True)) if special else []
        segments: list[Segment] = []
        for merge, run in groupby(spans, lambda s: outside if s.merge is None else s.merge):
            text, source = text_of(run), self.tokenizer if merge else tokenizer
            ids = list(source.encode(text, add_special_tokens=False))
            if merge and ids:
                segments += [Segment([*raw, self.start], False), Segment(ids)]
                raw = [self.end]
            elif not merge and {self.start, self.end} & {*ids}:
                raise PromptError("the text spells a token that only a merged text has around it")
            elif not merge:
                raw += ids
        return [*segments, Segment(raw, False)] if raw else segments


def merged_text(tokenizer: Any) -> MergedText | None:
    """How merging text becomes tokens, unless the tokenizer itself makes them."""
    return getattr(tokenizer, "merged_text", None)


def add(segments: list[Segment], ids: Sequence[int], merge: bool) -> None:
    """Adds token ids to segments that this function made: raw beside raw is one segment."""
    if segments and not (merge or segments[-1].merge):
        segments[-1].ids.extend(ids)
    elif ids:
        segments.append(Segment([*ids], merge))


def wants_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether mlx-lm adds special tokens to a text: unless it begins with one."""
    bos = tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def check_ids(ids: Iterable[int], rows: int, tokenizer: Any = None) -> None:
    """Refuses token ids past an embedding table of so many rows: MLX would read what lies there."""
    bad = next((i for i in ids if not 0 <= i < rows), None)
    if bad is not None:
        token = tokenizer.convert_ids_to_tokens(bad) if tokenizer and rows <= bad < 2**31 else None
        named = "" if token is None else f" ({short(token)})"
        raise PromptError(
            f"token id {bad}{named} is outside the base model's vocabulary of {rows:,}: use the "
            "tokenizer of that model"
        )


def segments_of(
    tokenizer: Any, spans: Sequence[Span], outside: bool, special: bool = False
) -> list[Segment]:
    """The ids of a text, cut where what merges begins or ends; a token across a border stays raw.

    ``outside``: spans without a decision merge. ``special``: special tokens are added.
    """
    if (own := merged_text(tokenizer)) is not None:
        return own.segments(tokenizer, spans, outside, special)
    text = text_of(spans)
    if all(span.merge is None for span in spans):
        return [Segment(list(tokenizer.encode(text, add_special_tokens=special)), outside)]
    merges = [*(span.merge for span in spans), False, outside]  # the last two have no span
    decided = [_OUTSIDE if span.merge is None else n for n, span in enumerate(spans)]
    ends = list(accumulate(len(span.text) for span in spans))
    owner_before, segments = None, []
    low = high = 0  # of the span in which the last token lies
    for token, (start, end) in _tokens(tokenizer, text, special):
        if low <= start < end <= high:
            segments[-1].ids.append(token)
            continue
        first, last = bisect_right(ends, start), bisect_right(ends, end - 1)
        touched = {decided[n] for n in range(first, last + 1)} if start < end else {_OUTSIDE}
        owner = touched.pop() if len(touched) == 1 else _BORDER
        low = high = 0
        if start < end and first == last:
            low, high = ends[first] - len(spans[first].text), ends[first]
        # Raw beside raw is one segment.
        if segments and (owner == owner_before or not (merges[owner] or segments[-1].merge)):
            segments[-1].ids.append(token)
        else:
            segments.append(Segment([token], merges[owner]))
            owner_before = owner
    return segments


def _tokens(tokenizer: Any, text: str, special: bool) -> zip[tuple[int, tuple[int, int]]]:
    """Each token of a text, and which characters it stands for."""
    from transformers import PreTrainedTokenizerBase

    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    # With an encode of its own, the offsets would be those of other tokens.
    own = getattr(type(inner), "encode", None) is not PreTrainedTokenizerBase.encode
    if own or not inner.is_fast:
        raise PromptError(
            "this tokenizer does not report where its tokens lie in the text, so a part of it "
            "cannot be merged beside a raw one",
            "put all of it in one text without tags or `keep`, and let it all merge (`merges` all)",
        )
    found = inner(text, add_special_tokens=special, return_offsets_mapping=True)
    places, end_before = [], 0
    for start, end in found["offset_mapping"]:
        # With trim_offsets, as GPT-NeoX has it, the spaces of a token are left out of its place.
        if end_before < start and text[end_before:start].isspace():
            start = end_before
        places.append((start, end))
        end_before = max(end_before, end)
    return zip(found["input_ids"], places, strict=True)
