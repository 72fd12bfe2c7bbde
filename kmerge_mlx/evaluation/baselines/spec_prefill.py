"""Speculative prefill: keeps the chunks of text to which the prompt's end attends most.

The attention is that of the model that answers, for the prompt's own last tokens. The original
takes it from a smaller model, for tokens that this one writes ahead, and the tokens that stay keep
their places.

Source: Liu et al. 2025, arXiv 2502.02789 (SpecPrefill).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kmerge_mlx.errors import PromptError
from kmerge_mlx.evaluation.baselines.weighing import Weighing, in_steps

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

LAST = 32
"""Tokens at the prompt's end whose attention counts: enough for a question and a template's end."""


class SpecPrefill(Weighing):
    """Keeps the chunks of 8 tokens to which the prompt's last 32 tokens attend most.

    A token's weight is the largest that any head of any layer gives it, averaged over the last
    tokens. Layers that do not see the whole prompt (sliding windows, linear attention) are left
    out.
    """

    name = "spec-prefill"
    about = "the chunks, T/K tokens in all, to which the prompt's end attends most"
    words = "speculative prefill to 1/{k}"
    chunk = 8

    def weigh(self, model: nn.Module, ids: mx.array) -> mx.array:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(model)
        for _ in in_steps(model, ids[:-LAST], cache):
            pass  # these logits are never evaluated
        with attention_to(ids.size) as layers:
            mx.eval(model(ids[None, -LAST:], cache=cache), layers)
        if not layers:
            raise PromptError(
                "spec-prefill found no layer with attention to the whole prompt: this model has "
                "none, or mlx-lm computes it in a way of its own"
            )
        return mx.stack(layers).max(axis=0).mean(axis=0)


@contextmanager
def attention_to(length: int) -> Iterator[list[mx.array]]:
    """Collects the weights ``(L, length)`` of every layer that attends to ``length`` positions.

    Those of a layer are the largest of its heads, for the L tokens that the model reads. All of
    mlx-lm's models whose KV cache is not quantized call one function of MLX for attention, but for
    a few (Gemma 2, OLMo) that multiply by hand.
    """
    import mlx.core as mx

    found: list[mx.array] = []
    attend = mx.fast.scaled_dot_product_attention

    def watched(queries: mx.array, keys: mx.array, *rest: Any, **options: Any) -> mx.array:
        if keys.shape[2] == length:
            names = ("scale", "mask", "sinks")
            found.append(_weights(queries, keys, *(options.get(name) for name in names)))
        return attend(queries, keys, *rest, **options)

    mx.fast.scaled_dot_product_attention = watched
    try:
        yield found
    finally:
        mx.fast.scaled_dot_product_attention = attend


def _weights(
    queries: mx.array, keys: mx.array, scale: float, mask: Any, sinks: mx.array | None
) -> mx.array:
    """The attention ``(L, T)`` of queries ``(1, H, L, d)`` to keys ``(1, h, T, d)``: most of H."""
    import mlx.core as mx

    _, heads, length, width = queries.shape
    total = keys.shape[2]
    grouped = queries.reshape(keys.shape[1], -1, length, width)
    scores = (scale * grouped) @ keys[0][:, None].swapaxes(-1, -2)
    scores = scores.reshape(heads, length, total).astype(mx.float32)
    if isinstance(mask, str):  # "causal"
        mask = mx.tri(length, total, total - length).astype(mx.bool_)
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    whole = mx.logsumexp(scores, axis=-1, keepdims=True)
    if sinks is not None:
        whole = mx.logaddexp(whole, sinks.astype(mx.float32)[:, None, None])
    return mx.exp(scores - whole).max(axis=0)
