"""Encoder warm-up by reconstruction: a merged embedding must tell the K tokens it stands for.

Owns the decoder that is thrown away afterwards, and its loss. Does not know the language model.

A linear decoder turns a merged embedding into K vectors, each compared with the embeddings of the
batch's own tokens: a softmax over those few instead of the whole vocabulary costs little memory.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.rows import Batch, bucket, padded
from kmerge_mlx.virtual_tokens import MergedEmbedding

DECODER = "decoder"


def add_decoder(merged: MergedEmbedding) -> None:
    """Gives the wrapped embedding a decoder, ``(D,)`` to ``(K * D,)``, as a trainable part."""
    config = merged.encoder.config
    setattr(
        merged, DECODER, nn.Linear(config.hidden_size, config.merge_factor * config.hidden_size)
    )


def remove_decoder(merged: MergedEmbedding) -> None:
    """Takes the decoder away."""
    if DECODER in merged:
        delattr(merged, DECODER)


def with_candidates(batch: Batch, merge_factor: int) -> Batch:
    """A batch with what reconstructing its blocks needs: the tokens to choose from, and which."""
    if not batch.num_blocks:  # padding alone, of a shape that MLX can compute with
        empty = mx.zeros((bucket(1), batch.blocks.shape[1]), batch.blocks.dtype)
        batch = replace(batch, blocks=empty)
    blocks = np.array(batch.blocks)[:, -merge_factor:]
    found, at = np.unique(blocks[: max(batch.num_blocks, 1)], return_inverse=True)
    targets = np.zeros(blocks.shape, np.int32)
    targets[: at.size // merge_factor] = at.reshape(-1, merge_factor)
    size = bucket(len(found))
    real = np.arange(len(blocks)) < batch.num_blocks
    return replace(
        batch,
        candidates=mx.array(padded(found, size)),
        candidate_weights=mx.array((np.arange(size) < len(found)).astype(np.float32)),
        block_targets=mx.array(targets),
        block_weights=mx.array(real.astype(np.float32)),
    )


def reconstruction_loss(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy of a batch's block tokens, told from their merged embeddings.

    Args:
        model: A model whose embedding has a decoder.
        batch: Its blocks, and the tokens that occur in them.

    Returns:
        Loss ``()`` float32 in nats, tokens ``()`` float32: at least 1, to divide by.
    """
    merged = merged_embedding(model)
    k = merged.merge_factor
    vectors = merged.encoder(merged.embedding(batch.blocks))
    decoded = merged.decoder(vectors).reshape(-1, k, vectors.shape[-1])
    table = merged.embedding(batch.candidates).astype(decoded.dtype)  # (U, D)
    scores = (decoded @ table.T).astype(mx.float32)  # (M, K, U)
    scores = scores + mx.where(batch.candidate_weights > 0, 0.0, -mx.inf)
    losses = nn.losses.cross_entropy(scores, batch.block_targets)
    weights = mx.broadcast_to(batch.block_weights[:, None], losses.shape)
    return (losses * weights).sum(), mx.maximum(weights.sum(), 1)
