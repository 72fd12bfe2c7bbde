"""Readings of rows, computed by the words that define each method."""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kmerge_mlx import load
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.model import merged_embedding
from tests.evaluation.baselines.by_hand import attention, chunks, heaviest, surprise
from tests.evaluations import Folders
from tests.tiny import PAD


@cache
def loaded(folders: Folders, k: int) -> nn.Module:
    return load(str(folders.base), folders.adapters, k)[0]


def naive_nll(model: nn.Module, ids: list[int], answer: list[int], embeddings=None) -> float:
    """All logits of one unpadded row."""
    row, options = mx.array([ids + answer[:-1]]), {}
    if embeddings is not None:
        options["input_embeddings"] = embeddings[None]
    logits = model(row, **options)[0, len(ids) - 1 :]
    return nn.losses.cross_entropy(logits, mx.array(answer)).sum().item()


def plain_means(model: nn.Module, row: TokenizedExample, k: int) -> mx.array:
    """What is read where a block is the mean of its embeddings: prompt and answer."""
    table, parts = merged_embedding(model).embedding, []
    for segment in row.segments:
        ids = list(segment.ids)
        if segment.merge:
            ids += [PAD] * (-len(ids) % k)
            parts.append(table(mx.array(ids).reshape(-1, k)).mean(axis=1))
        else:
            parts.append(table(mx.array(ids)))
    return mx.concatenate([*parts, table(mx.array(row.answer_ids[:-1]))])


def by_hand(folders: Folders, row: TokenizedExample, method: str, k: int) -> tuple[float, int]:
    """A row's likelihood and positions, computed by the words that define the method."""
    if method == "base":
        ids = row.prompt_ids
        return naive_nll(load(str(folders.base))[0], ids, row.answer_ids), len(ids)
    model = loaded(folders, k if method in ("merged", "mean") else 1)
    if method == "merged":
        ids = merged_embedding(model).compress(row.segments).ids
        return naive_nll(model, ids, row.answer_ids), len(ids)
    if method == "mean":
        embeddings = plain_means(model, row, k)
        ids = [0] * (embeddings.shape[0] - len(row.answer_ids) + 1)
        return naive_nll(model, ids, row.answer_ids, embeddings), len(ids)
    weights = np.zeros(len(row.prompt_ids))
    if method == "selective-context":
        weights = surprise(model, row.prompt_ids)
    elif method == "spec-prefill":
        weights = attention(model, row.prompt_ids)
    ids, start = [], 0
    for segment in row.segments:
        part, room = list(segment.ids), math.ceil(len(segment.ids) / k)
        own, start = weights[start : start + len(part)], start + len(part)
        if segment.merge and method == "truncate":
            part = part[len(part) - room :]
        elif segment.merge and method == "stride":
            part = [part[min(i * k + k - 1, len(part) - 1)] for i in range(room)]
        elif segment.merge and method == "selective-context":
            part = heaviest(part, own, room)
        elif segment.merge and method == "spec-prefill":
            part = heaviest(part, chunks(own), room)
        ids += part
    return naive_nll(model, ids, row.answer_ids), len(ids)
