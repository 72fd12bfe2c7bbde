"""Tokenized examples to the arrays of one training batch.

Owns the row layout, ``[positions of the prompt][answer][eos][right padding]``, and the bucketing of
shapes, so that a compiled step is traced a few times and not once a batch. Does not know models.

Causal attention makes right padding harmless, so there is no mask; merged blocks are virtual ids
past the vocabulary, as in generation, numbered within the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.virtual_tokens import Block, split

ROW_STEPS = ((64, 8), (256, 16), (1 << 62, 32))
"""Rows of up to so many positions are padded to a multiple of so many: 32 as in mlx-lm, and less
for short rows, a third of which would be padding."""


@dataclass(frozen=True)
class Batch:
    """One batch, padded to bucketed shapes.

    Args:
        ids: ``(B, T)`` int32: ordinary ids, and V + i for the batch's block i.
        blocks: ``(M, c + K)`` int32, what the encoder reads of each distinct block; M may be 0.
        answer_at: ``(A,)`` int32, flat positions ``b * T + t`` that predict an answer token.
        targets: ``(A,)`` int32, the token each of them is to predict.
        weights: ``(A,)`` float32, 1 for an answer token and 0 for padding.
        num_blocks: How many of the blocks are real; the others are padding.
        teacher_ids: ``(A, k)`` int32, the teacher's likeliest tokens; empty: it gives all V.
        teacher_logprobs: ``(A, k)`` or ``(A, V)`` float32, or None without a teacher.
        candidates: ``(U,)`` int32, the distinct tokens of the blocks, for reconstruction.
        candidate_weights: ``(U,)`` float32, 0 for padding.
        block_targets: ``(M, K)`` int32, each block's tokens as indices of candidates.
        block_weights: ``(M,)`` float32, 0 for padding.
    """

    ids: mx.array
    blocks: mx.array
    answer_at: mx.array
    targets: mx.array
    weights: mx.array
    num_blocks: int = 0
    teacher_ids: mx.array | None = None
    teacher_logprobs: mx.array | None = None
    candidates: mx.array | None = None
    candidate_weights: mx.array | None = None
    block_targets: mx.array | None = None
    block_weights: mx.array | None = None

    def arrays(self) -> dict[str, mx.array]:
        """The arrays alone, by name: what a compiled function takes."""
        return {name: a for name, a in vars(self).items() if isinstance(a, mx.array)}


def make_batch(
    examples: Sequence[TokenizedExample],
    merge_factor: int,
    pad_token_id: int,
    vocab_size: int,
    context: int = 0,
) -> Batch:
    """Lays examples out as one batch.

    Args:
        examples: At least one, each with an answer.
        merge_factor: K; 1 leaves every prompt token its own position.
        pad_token_id: Fills the last block of a segment, and the context of its first.
        vocab_size: V, the first virtual id.
        context: c, how many tokens before its block the encoder reads.
    """
    known: dict[Block, int] = {}

    def positions(segment: Segment) -> list[int]:
        if not segment.merge or merge_factor == 1:
            return list(segment.ids)
        blocks = split(segment.ids, merge_factor, pad_token_id, context)
        return [vocab_size + known.setdefault(block, len(known)) for block in blocks]

    prompts = [[i for s in example.segments for i in positions(s)] for example in examples]
    # The last token of a row is only ever predicted.
    rows = [p + e.answer_ids[:-1] for p, e in zip(prompts, examples, strict=True)]
    length = max(map(len, rows))
    length = _multiple(length, next(step for most, step in ROW_STEPS if length <= most))
    ids = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    answer_at = [
        b * length + len(prompt) - 1 + i
        for b, (prompt, example) in enumerate(zip(prompts, examples, strict=True))
        for i in range(len(example.answer_ids))
    ]
    targets = [i for example in examples for i in example.answer_ids]
    blocks = np.zeros((bucket(len(known)), context + merge_factor), np.int32)
    if known:
        blocks[: len(known)] = list(known)
    size = bucket(len(targets))
    return Batch(
        ids=mx.array(ids),
        blocks=mx.array(blocks),
        answer_at=mx.array(padded(answer_at, size)),
        targets=mx.array(padded(targets, size)),
        weights=mx.array(padded([1] * len(targets), size).astype(np.float32)),
        num_blocks=len(known),
    )


def bucket(n: int) -> int:
    """The next size up from ``n`` among 0, 8, 12, 16, 24, 32, 48, 64 and so on."""
    size = 8 if n else 0
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _multiple(n: int, step: int) -> int:
    return -(-n // step) * step


def padded(values: Sequence[int], size: int) -> np.ndarray:
    """Values as int32, filled up with zeros: ``(size,)``."""
    array = np.zeros(size, np.int32)
    array[: len(values)] = values
    return array
