"""Puts tokenized examples in an order, and lays out the rows of a batch as arrays.

A row is ``[positions of the prompt][answer][eos][right padding]``. Causal attention makes the
padding harmless, so there is no mask. Blocks are virtual ids past the vocabulary, as in generation,
numbered within the batch. Shapes are bucketed: 1,000 batches of real text have 10 to 85 of them,
and a compiled step is traced once for each.

Unlike mlx-lm, batches are made by length within a window only, so they differ between epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.encoder import Block, split
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train.dataset import num_positions

WINDOW = 16  # batches that are sorted by length together
ROW_STEPS = ((64, 8), (256, 16), (512, 32), (1 << 62, 64))
"""Rows of up to so many positions are padded to a multiple of so many: some 10% is padding."""


MOST_POSITIONS = 1024
"""Positions (rows times their length) that a step reads at once: what it keeps grows with them."""

# What is read without a step, and held, at once: 16 GB are enough for half a billion parameters.
MOST_READ = 1 << 13  # positions
MOST_LOGITS = 1 << 26  # 256 MiB, of which a softmax takes several


@dataclass(frozen=True)
class Place:
    """How far a run has read."""

    epoch: int = 0
    batch: int = 0  # of the epoch, read so far


@dataclass(frozen=True)
class Rows:
    """The examples of one batch, their indices in the data, and the place after them."""

    indices: list[int]
    examples: list[TokenizedExample]
    place: Place


def shuffled(
    data: Sequence[TokenizedExample],
    batch_size: int,
    merge_factor: int,
    seed: Sequence[int],
    place: Place,
) -> Iterator[Rows]:
    """Batches without end, from a place on; their order follows from the seed and the place alone.

    The examples that an epoch leaves over, too few for a batch, are others in every epoch.
    """
    per_epoch = len(data) // batch_size
    epoch, batch = place.epoch, place.batch
    while True:
        # RandomState's sequences are frozen; numpy may change those of its newer generators.
        order = np.random.RandomState([*seed, epoch]).permutation(len(data))
        while batch < per_epoch:
            first = batch - batch % WINDOW
            last = min(first + WINDOW, per_epoch)
            window = order[first * batch_size : last * batch_size].tolist()
            examples = [data[i] for i in window]
            batches = by_length(examples, batch_size, merge_factor)
            mixed = np.random.RandomState([*seed, epoch, first]).permutation(len(batches))
            for b in mixed[batch - first :]:
                batch += 1
                indices, read = [window[j] for j in batches[b]], [examples[j] for j in batches[b]]
                yield Rows(indices, read, Place(epoch, batch))
        epoch, batch = epoch + 1, 0


def by_length(
    examples: Sequence[TokenizedExample], batch_size: int, merge_factor: int
) -> list[list[int]]:
    """Indices of examples in batches of similar length; the last batch may be smaller."""
    lengths = [num_positions(example, merge_factor) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_parts(
    indices: Sequence[int], examples: Sequence[TokenizedExample], merge_factor: int
) -> Iterator[tuple[Sequence[int], Sequence[TokenizedExample]]]:
    """A batch in parts of up to ``MOST_POSITIONS``, of which each has at least one row.

    Losses are sums over tokens, so the parts' losses and gradients add up to the batch's.
    """
    longest = padded_length(max((num_positions(e, merge_factor) for e in examples), default=1) - 1)
    fit = max(1, MOST_POSITIONS // longest)
    size = 1 << (fit.bit_length() - 1)  # a power of two: few shapes
    for start in range(0, len(examples), size):
        yield indices[start : start + size], examples[start : start + size]


def in_passes(
    rows: Sequence[TokenizedExample], vocab_size: int
) -> Iterator[Sequence[TokenizedExample]]:
    """Runs of rows that are read at once, within a bounded memory and without a step."""
    start = 0
    for end in range(1, len(rows) + 1):
        grown = rows[start : end + 1]
        positions = len(grown) * max(row.num_tokens for row in grown)
        logits = vocab_size * sum(len(row.answer_ids) for row in grown)
        if end == len(rows) or positions > MOST_READ or logits > MOST_LOGITS:
            yield rows[start:end]
            start = end


def padded_length(length: int) -> int:
    """The positions to which rows of up to so many are padded."""
    step = next(step for most, step in ROW_STEPS if length <= most)
    return -(-max(length, 1) // step) * step


@dataclass(frozen=True)
class Batch:
    """One batch, padded to bucketed shapes: int32, weights and log-probabilities float32."""

    ids: mx.array  # (B, T): ordinary ids, and V + i for the batch's block i
    blocks: mx.array  # (M, c + K): what the encoder reads of each distinct block; M may be 0
    answer_at: mx.array  # (A,): flat positions b * T + t that predict an answer token
    targets: mx.array  # (A,): the token that each of them predicts
    weights: mx.array  # (A,): 1 for an answer token and 0 for padding
    num_blocks: int = 0  # real ones; the others are padding
    teacher_ids: mx.array | None = None  # (A, k): its likeliest tokens; empty: it gives all V
    teacher_logprobs: mx.array | None = None  # (A, k) or (A, V)
    candidates: mx.array | None = None  # (U,): the blocks' distinct tokens, for reconstruction
    candidate_weights: mx.array | None = None  # (U,): 0 for padding
    block_targets: mx.array | None = None  # (M, K): each block's tokens as indices of candidates
    block_weights: mx.array | None = None  # (M,): 0 for padding

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
    """Lays examples, each with an answer, out as one batch.

    The pad token fills the last block of a segment, and the context (the c tokens before a block
    that the encoder reads) of its first.
    """
    known: dict[Block, int] = {}

    def positions(segment: Segment) -> list[int]:
        if not segment.merge or merge_factor == 1:
            return list(segment.ids)
        blocks = split(segment.ids, merge_factor, pad_token_id, context)
        return [vocab_size + known.setdefault(block, len(known)) for block in blocks]

    prompts = [[i for s in example.segments for i in positions(s)] for example in examples]
    # The last token of a row is only ever predicted.
    rows = [[*p, *e.answer_ids[:-1]] for p, e in zip(prompts, examples, strict=True)]
    length = padded_length(max(map(len, rows)))
    ids = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    answer_at = [
        b * length + len(prompts[b]) - 1 + i
        for b, example in enumerate(examples)
        for i in range(len(example.answer_ids))
    ]
    targets = [i for example in examples for i in example.answer_ids]
    blocks = np.zeros((power_of_two(len(known)), context + merge_factor), np.int32)
    if known:
        blocks[: len(known)] = list(known)
    size = bucket(len(targets))
    return Batch(
        ids=mx.array(ids),
        blocks=mx.array(blocks),
        answer_at=_padded(answer_at, size),
        targets=_padded(targets, size),
        weights=_mask(len(targets), size),
        num_blocks=len(known),
    )


def with_candidates(batch: Batch, merge_factor: int) -> Batch:
    """A batch with what reconstructing its blocks needs: the tokens to choose from, and which."""
    if not batch.num_blocks:  # padding alone, of a shape that MLX can compute with
        empty = mx.zeros((power_of_two(1), batch.blocks.shape[1]), batch.blocks.dtype)
        batch = replace(batch, blocks=empty)
    blocks = np.array(batch.blocks)[:, -merge_factor:]
    found, at = np.unique(blocks[: max(batch.num_blocks, 1)], return_inverse=True)
    targets = np.zeros(blocks.shape, np.int32)
    targets[: at.size // merge_factor] = at.reshape(-1, merge_factor)
    return replace(
        batch,
        candidates=_padded(found.tolist(), bucket(len(found))),
        candidate_weights=_mask(len(found), bucket(len(found))),
        block_targets=mx.array(targets),
        block_weights=_mask(batch.num_blocks, len(blocks)),
    )


def power_of_two(n: int) -> int:
    """The next size up from ``n`` among 0, 8, 16, 32 and so on."""
    return max(8, 1 << (n - 1).bit_length()) if n else 0


def bucket(n: int) -> int:
    """The next size up from ``n`` among 0, 8, 12, 16, 24, 32, 48, 64 and so on."""
    size = 8 if n else 0
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _padded(values: Sequence[int], size: int) -> mx.array:
    return mx.array(np.pad(np.array(values, np.int32), (0, size - len(values))))


def _mask(real: int, size: int) -> mx.array:
    return mx.array((np.arange(size) < real).astype(np.float32))
