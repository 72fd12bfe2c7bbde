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

from kmerge_mlx.blocks import Block, split
from kmerge_mlx.data.layout import TokenizedExample

ROW_STEP = 32
"""Rows are padded to a multiple of this, as in mlx-lm."""


@dataclass(frozen=True)
class Batch:
    """One batch, padded to bucketed shapes.

    Args:
        ids: ``(B, T)`` int32: ordinary ids, and V + i for the batch's block i.
        blocks: ``(M, K)`` int32, token ids of the batch's distinct blocks; M may be 0.
        answer_at: ``(A,)`` int32, flat positions ``b * T + t`` that predict an answer token.
        targets: ``(A,)`` int32, the token each of them is to predict.
        weights: ``(A,)`` float32, 1 for an answer token and 0 for padding.
        prompt_tokens: Original tokens of the prompts.
        positions: Prompt positions that they were merged to.
    """

    ids: mx.array
    blocks: mx.array
    answer_at: mx.array
    targets: mx.array
    weights: mx.array
    prompt_tokens: int
    positions: int


def make_batch(
    examples: Sequence[TokenizedExample], merge_factor: int, pad_token_id: int, vocab_size: int
) -> Batch:
    """Lays examples out as one batch.

    Args:
        examples: At least one, each with an answer.
        merge_factor: K; 1 leaves every prompt token its own position.
        pad_token_id: Fills the last block of a segment.
        vocab_size: V, the first virtual id.
    """
    known: dict[Block, int] = {}
    prompts = [_positions(e, merge_factor, pad_token_id, vocab_size, known) for e in examples]
    # The last token of a row is only ever predicted.
    rows = [p + e.answer_ids[:-1] for p, e in zip(prompts, examples, strict=True)]
    length = _multiple(max(map(len, rows)), ROW_STEP)
    ids = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    answer_at = [
        b * length + len(prompt) - 1 + i
        for b, (prompt, example) in enumerate(zip(prompts, examples, strict=True))
        for i in range(len(example.answer_ids))
    ]
    targets = [i for example in examples for i in example.answer_ids]
    blocks = np.zeros((bucket(len(known)), merge_factor), np.int32)
    if known:
        blocks[: len(known)] = list(known)
    size = bucket(len(targets))
    return Batch(
        ids=mx.array(ids),
        blocks=mx.array(blocks),
        answer_at=mx.array(_padded(answer_at, size)),
        targets=mx.array(_padded(targets, size)),
        weights=mx.array(_padded([1] * len(targets), size).astype(np.float32)),
        prompt_tokens=sum(len(segment.ids) for e in examples for segment in e.segments),
        positions=sum(map(len, prompts)),
    )


def bucket(n: int) -> int:
    """The next size up from ``n`` among 0, 8, 12, 16, 24, 32, 48, 64 and so on."""
    size = 8 if n else 0
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _positions(
    example: TokenizedExample, k: int, pad: int, vocab_size: int, known: dict[Block, int]
) -> list[int]:
    ids: list[int] = []
    for segment in example.segments:
        if not segment.merge or k == 1:
            ids.extend(segment.ids)
            continue
        for block in split(segment.ids, k, pad):
            ids.append(vocab_size + known.setdefault(block, len(known)))
    return ids


def _multiple(n: int, step: int) -> int:
    return -(-n // step) * step


def _padded(values: Sequence[int], size: int) -> np.ndarray:
    array = np.zeros(size, np.int32)
    array[: len(values)] = values
    return array
