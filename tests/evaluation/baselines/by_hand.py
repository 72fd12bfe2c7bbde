"""The weights of tokens by their definition: all of a prompt at once, without a KV cache."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kmerge_mlx.model import merged_embedding


def surprise(model: nn.Module, ids: list[int]) -> np.ndarray:
    """-log p of every token, given those before it."""
    found = nn.log_softmax(model(mx.array([ids]))[0])
    return np.array([np.inf, *(-found[i, token].item() for i, token in enumerate(ids[1:]))])


def attention(model: nn.Module, ids: list[int], last: int = 32) -> np.ndarray:
    """The most that any head of a Qwen2 model attends to each token, for its last tokens: mean."""
    inner = model.model
    table = merged_embedding(model) or inner.embed_tokens
    hidden, most = table(mx.array([ids])), []
    for layer in inner.layers:
        own, x = layer.self_attn, layer.input_layernorm(hidden)
        queries, keys = own.q_proj(x), own.k_proj(x)
        queries, keys = (
            own.rope(_heads(a, n)) for a, n in ((queries, own.n_heads), (keys, own.n_kv_heads))
        )
        shared = own.n_heads // own.n_kv_heads
        for head in range(own.n_heads):
            scores = own.scale * queries[0, head] @ keys[0, head // shared].T
            future = np.triu(np.full(scores.shape, -np.inf), 1)
            most.append(
                np.array(mx.softmax(scores + mx.array(future, mx.float32), axis=-1))[-last:]
            )
        hidden = layer(hidden, mask="causal")
    return np.max(most, axis=0).mean(axis=0)


def _heads(x: mx.array, count: int) -> mx.array:
    return x.reshape(1, x.shape[1], count, -1).transpose(0, 2, 1, 3)


def chunks(weights: np.ndarray, size: int = 8) -> np.ndarray:
    """Every token with the mean weight of its chunk."""
    parts = [weights[i : i + size] for i in range(0, len(weights), size)]
    return np.concatenate([np.full(len(part), part.mean()) for part in parts])


def heaviest(ids: list[int], weights: np.ndarray, count: int) -> list[int]:
    """The tokens of most weight, in their order; of equal ones the first."""
    chosen = sorted(range(len(ids)), key=lambda i: (-weights[i], i))[:count]
    return [ids[i] for i in sorted(chosen)]
