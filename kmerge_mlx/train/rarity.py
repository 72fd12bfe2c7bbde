"""Fits how rare each token is, from its embedding: what an encoder that starts with it has to know.

A token's self-information, -log of its share of the training text, is close to linear in a
pretrained embedding (R2 0.95 on SmolLM2), so D + 1 numbers hold it for all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.dataset import Stage

MOST_ROWS = 10_000  # of the training data that are counted
AT_ONCE = 1 << 14  # rows of the table
UNSEEN = 20_000  # tokens of text that the share of an unseen one is worth
FIRST_RANK = 300  # tokens are numbered by rank, after the bytes: Zipf's law begins there
RIDGE = 0.01  # of the embeddings' variance


def fit_rarity(model: nn.Module, stage: Stage, encoders: Sequence[MergeEncoder]) -> None:
    """Sets the center and the gate of a model's merge encoders, from its table and its data."""
    merged = merged_embedding(model)
    counts = np.zeros(merged.vocab_size)
    for i in range(min(len(stage.train), MOST_ROWS)):
        np.add.at(counts, np.array(stage.train[i].prompt_ids), 1)
    prior = 1 / (np.arange(merged.vocab_size) + FIRST_RANK)
    shares = counts + UNSEEN * prior / prior.sum()
    nats, weights = -np.log(shares / shares.sum()), counts + 1

    def parts() -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, merged.vocab_size, AT_ONCE):
            ids = mx.arange(start, min(start + AT_ONCE, merged.vocab_size))
            rows = np.array(merged.embedding(ids).astype(mx.float32), np.float64)
            yield slice(start, start + AT_ONCE), rows

    center = sum(rows.sum(axis=0) for _, rows in parts()) / merged.vocab_size
    size = len(center) + 1
    products, targets, variance = np.zeros((size, size)), np.zeros(size), 0.0
    for at, rows in parts():
        apart = rows - center
        variance += (apart**2).sum() / (merged.vocab_size * len(center))
        apart = np.hstack([apart, np.ones((len(rows), 1))])
        weighed = apart * weights[at, None]
        products += weighed.T @ apart
        targets += weighed.T @ nats[at]
    ridge = RIDGE * weights.sum() * variance * np.eye(size)
    *gate, bias = np.linalg.solve(products + ridge, targets)
    # The encoder reads embeddings as they are, so the center's part goes into the bias.
    found = {"center": center, "gate_weight": gate, "gate_bias": [bias - center @ gate]}
    for encoder in encoders:
        encoder.update({n: mx.array(np.array(v, np.float32)) for n, v in found.items()})
        mx.eval(encoder.parameters())
