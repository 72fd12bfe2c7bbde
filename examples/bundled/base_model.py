"""The bundled base model: its shape, how its weights start, and how it reads a tree once for all.

Owns: ``config.json``, the start, the forward pass over :class:`tree_rows.Rows`, and the *codes* of
blocks that its upper layers learn to read first. Does not know optimizers or files.

A code is what one position holds when four tokens' embeddings, each turned by a map of its own, are
added: a whole node, depth and name. The first layer learns to make codes at the tokens that end a
block, and nothing elsewhere, so that a name is looked up whole; left to itself the model looks
names up by their first letter, which the second cannot be seen from, and stays at 94%.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen2
from tree_rows import NODE_TOKENS

SELF_ALIKE = (0, 2)  # heads that start attending to tokens equal to their own
LOOKS_BACK = {0: 3, 1: 1, 3: 2}  # heads of the first layer that start looking so many tokens back
SHARPNESS = 7.0
HIDDEN = -1e9


def model_config(vocab_size: int, eos_token_id: int) -> dict[str, Any]:
    """The model's config.json, for mlx-lm and for transformers."""
    theta = 1e5
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        # mlx-lm reads the first, transformers 5 the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
    }


def build_model(config: dict[str, Any], seed: int) -> qwen2.Model:
    """A model with a *mimetic* start.

    In every other head queries and keys are one random orthonormal projection, so that a token
    attends to its equals before anything is learned; what is read is written back through the
    transpose of the projection that read it. Without this, training stays at chance for 900 to
    2,000 steps (DESIGN section 7). Three heads of the first layer look back instead.
    """
    mx.random.seed(seed)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    size, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = size // heads
    embed = model.model.embed_tokens
    embed.weight = 0.1 * mx.random.normal(embed.weight.shape)
    for layer in model.layers:
        attention = layer.self_attn
        pair = orthonormal(size)
        attention.v_proj.weight, attention.o_proj.weight = 0.7 * pair, 0.7 * pair.T
        for head in SELF_ALIKE:
            rows = slice(head * head_size, (head + 1) * head_size)
            projection = orthonormal(size)[:head_size]
            attention.q_proj.weight[rows] = projection
            attention.k_proj.weight[rows] = projection
        for projected in (attention.q_proj, attention.k_proj, attention.v_proj):
            projected.bias = mx.zeros_like(projected.bias)
    for head, back in LOOKS_BACK.items():
        look_back(model.layers[0].self_attn, head, back, head_size, config["rope_theta"])
    mx.eval(model.parameters())
    return model


def look_back(attention: nn.Module, head: int, back: int, size: int, theta: float) -> None:
    """Makes a head read the token so many places before, whatever it is, and write it elsewhere.

    Query and key are their biases alone at first: after RoPE their product depends on the distance
    alone, and is largest where the query's angles are those of the key, turned back.
    """
    rows = slice(head * size, (head + 1) * size)
    attention.q_proj.bias[rows] = looking(back, size, theta)
    attention.k_proj.bias[rows] = looking(0, size, theta)
    for projected in (attention.q_proj, attention.k_proj):
        projected.weight[rows] = 0.1 * projected.weight[rows]
    attention.o_proj.weight[:, rows] = 0.7 * orthonormal(attention.o_proj.weight.shape[0])[:, :size]


def looking(back: int, size: int, theta: float) -> mx.array:
    """The query ``(size,)`` that looks so many places back, at keys that look nowhere."""
    angles = back * theta ** (-mx.arange(size // 2) / (size // 2))
    return SHARPNESS * mx.concatenate([mx.cos(angles), -mx.sin(angles)])


def orthonormal(size: int) -> mx.array:
    """A random orthonormal matrix ``(size, size)``."""
    return mx.linalg.qr(mx.random.normal((size, size)), stream=mx.cpu)[0]


class Base(nn.Module):
    """The model, and the codes that its upper layers read while its first layer cannot make them.

    Args:
        config: The model's config.json.
        seed: Of the weights.
    """

    def __init__(self, config: dict[str, Any], seed: int):
        super().__init__()
        self.model = build_model(config, seed)
        self.nothing = mx.zeros(config["hidden_size"])  # what the first layer writes elsewhere
        self._maps = [orthonormal(config["hidden_size"]) for _ in range(NODE_TOKENS)]

    def aim(self, ends: Sequence[int], tokens: Sequence[int]) -> None:
        """Lets the tokens that end a block look back, and all others look at themselves.

        So what the first layer does elsewhere depends on the token alone: a letter of an answer
        passes through whatever was read before it, merged or not.

        Args:
            ends: Tokens that end a block.
            tokens: All that trees and questions are written with, fewer than D.
        """
        first, args = self.model.layers[0], self.model.args
        attention, size = first.self_attn, args.hidden_size // args.num_attention_heads
        read = first.input_layernorm(self.model.model.embed_tokens(mx.array(tokens)))
        # The direction in which tokens that end a block lie at 1, and all others at 0.
        towards = np.linalg.lstsq(np.array(read, np.float64), np.isin(tokens, ends), rcond=None)[0]
        towards = mx.array(towards.astype(np.float32))
        for head, back in LOOKS_BACK.items():
            rows = slice(head * size, (head + 1) * size)
            here, there = (looking(d, size, args.rope_theta) for d in (0, back))
            attention.q_proj.bias[rows] = here
            attention.q_proj.weight[rows] = mx.outer(there - here, towards)
            attention.k_proj.weight[rows] = mx.zeros_like(attention.k_proj.weight[rows])

    def embedded(self, tree: mx.array, asked: mx.array) -> mx.array:
        """Token embeddings ``(B, L, D)``, L = T + Q * A: the tree's, then every question's."""
        ids = mx.concatenate([tree, asked.reshape(tree.shape[0], -1)], axis=1)
        return self.model.model.embed_tokens(ids)

    def codes(
        self, tree: mx.array, asked: mx.array, answers: mx.array, places: mx.array
    ) -> mx.array:
        """What the second layer should read ``(B, L, D)``.

        The code of the last four tokens at those that end a block, the embedding itself at those of
        an answer, ``nothing`` elsewhere.

        Args:
            tree: ``(B, T)``.
            asked: ``(B, Q, A)``.
            answers: ``(B, Q, A)``, which of these are an answer's.
            places: ``(B, Q, P)``, which hold something.
        """
        before = NODE_TOKENS - 1
        size, questions, own = asked.shape
        tail = mx.broadcast_to(tree[:, None, -before:], (size, questions, before))
        embed = self.model.model.embed_tokens
        told = self._windows(mx.pad(embed(tree), ((0, 0), (before, 0), (0, 0))))
        raw = embed(mx.concatenate([tail, asked], axis=-1))
        coded = self._windows(raw.reshape(size * questions, own + before, -1))
        coded = mx.where(answers[..., None], raw[:, :, before:], coded.reshape(*asked.shape, -1))
        line_ends = mx.arange(tree.shape[1]) % NODE_TOKENS == before
        held = (mx.arange(own) == places[..., None]).any(axis=-2)
        told = mx.where(line_ends[:, None], told, self.nothing)
        coded = mx.where(held[..., None], coded, self.nothing)
        return mx.concatenate([told, coded.reshape(size, -1, told.shape[-1])], axis=1)

    def _windows(self, embeddings: mx.array) -> mx.array:
        """Codes of every four consecutive ``(N, T + 3, D)``, ``(N, T, D)``."""
        length = embeddings.shape[1] - NODE_TOKENS + 1
        return sum(embeddings[:, i : i + length] @ turn for i, turn in enumerate(self._maps))

    def packed(self, x: mx.array, length: int, places: mx.array) -> mx.array:
        """Of ``(B, L, D)``, of which the tree has T, only what holds something: ``(B, N, D)``."""
        size, questions, each = places.shape
        own = x[:, length:].reshape(size, questions, -1, x.shape[-1])
        own = mx.take_along_axis(own, places[..., None], axis=2)
        told = x[:, NODE_TOKENS - 1 : length : NODE_TOKENS]
        return mx.concatenate([told, own.reshape(size, questions * each, -1)], axis=1)

    def through(
        self, x: mx.array, tree_weights: mx.array, questions: int, layers: list[nn.Module]
    ) -> mx.array:
        """Some layers' output ``(B, L, D)`` over a tree and its questions.

        Args:
            x: Their input ``(B, L, D)``.
            tree_weights: ``(B, T)``, 0 for padding.
            questions: Q.
            layers: Of the model, in turn.
        """
        padding = mx.where(tree_weights > 0, 0.0, HIDDEN)[:, None, None]
        for layer in layers:
            x = x + attend(layer.self_attn, layer.input_layernorm(x), padding, questions)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x

    def logits(self, x: mx.array) -> mx.array:
        """Logits ``(..., V)`` of the last layer's output ``(..., D)``."""
        return self.model.model.embed_tokens.as_linear(self.model.model.norm(x))


def attend(attention: nn.Module, x: mx.array, padding: mx.array, questions: int) -> mx.array:
    """Attention in which each question sees the tree and itself, at the positions it has alone.

    Args:
        attention: A Qwen2 layer's.
        x: ``(B, L, D)``, L = T + Q * A.
        padding: ``(B, 1, 1, T)``, added to the scores of the tree's tokens.
        questions: Q.

    Returns:
        ``(B, L, D)``.
    """
    size, length, width = x.shape
    told, heads = padding.shape[-1], attention.n_heads
    own = (length - told) // questions

    def split(projected: mx.array) -> tuple[mx.array, mx.array]:
        each = projected.reshape(size, length, heads, -1).swapaxes(1, 2)
        return each[:, :, :told], each[:, :, told:].reshape(size, heads * questions, own, -1)

    (tq, aq), (tk, ak), (tv, av) = map(
        split, (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    )
    rope = attention.rope
    tq, tk = attention.scale * rope(tq), rope(tk)
    aq, ak = attention.scale * rope(aq, offset=told), rope(ak, offset=told)

    scores = mx.maximum(tq @ tk.swapaxes(-1, -2) + padding + causal(told), HIDDEN)
    tree = mx.softmax(scores, axis=-1) @ tv

    flat = (size, heads, questions * own, -1)
    across = aq.reshape(flat) @ tk.swapaxes(-1, -2) + padding
    within = (aq @ ak.swapaxes(-1, -2) + causal(own)).reshape(flat)
    shares = mx.softmax(mx.concatenate([across, within], axis=-1), axis=-1)
    inside = shares[..., told:].reshape(size, heads * questions, own, own) @ av
    asked = shares[..., :told] @ tv + inside.reshape(flat)

    both = mx.concatenate([tree, asked], axis=2).swapaxes(1, 2)
    return attention.o_proj(both.reshape(size, length, width))


def causal(length: int) -> mx.array:
    """``(T, T)``, to be added to scores."""
    return mx.where(mx.tri(length, dtype=mx.bool_), 0.0, HIDDEN)
