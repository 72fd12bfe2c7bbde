"""The loss of a batch: cross-entropy on answer tokens, with logits at answer positions alone.

Owns the training forward pass: the batch's blocks are merged inside it, so gradients reach the
encoder, and hidden states are cut to the answer positions *before* the output head, because logits
for every position at V = 151,936 are what training memory would go to. Does not know optimizers.

Source: arXiv 2604.15153 section 3.3 (loss on answer tokens and the eos after each answer).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.model import merged_embedding, output_head
from kmerge_mlx.train.rows import Batch


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy of each row, and the softmax that its gradient is made of.

    Autograd would take the V exponentials of a row twice, and add up the gradient from three arrays
    of the logits' size. The likeliest token's probability is at least 1/V, so the normaliser that
    comes of it is exact, whatever the target's is.

    Args:
        logits: ``(A, V)`` float32.
        targets: ``(A,)`` int32.

    Returns:
        Losses ``(A,)`` in nats, and probabilities ``(A, V)``, which take no gradient.
    """
    probabilities = mx.softmax(logits, axis=-1)
    normaliser = logits.max(axis=-1) - mx.log(probabilities.max(axis=-1))
    return normaliser - mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0], probabilities


@cross_entropy.vjp
def _cross_entropy_vjp(primals, cotangents, outputs):
    at, weight, probabilities = primals[1][:, None], cotangents[0][:, None], outputs[1]
    at_target = (mx.take_along_axis(probabilities, at, axis=1) - 1) * weight
    gradient = mx.put_along_axis(probabilities * weight, at, at_target, axis=1)
    return gradient, mx.zeros_like(primals[1])


class AnswerHead:
    """Cuts what a model's output head reads to the positions of the batch at hand.

    The head may be a module of its own or the wrapped embedding of a tied model. Its class is
    replaced by one that cuts first, so parameter names stay what they are.

    Args:
        model: An mlx-lm model, with or without an adapter.
    """

    def __init__(self, model: nn.Module):
        self._at: mx.array | None = None
        own = output_head(model)
        head, method = (own[1], "__call__") if own else (merged_embedding(model), "as_linear")
        if head is None:
            raise TypeError("a tied model is trained with its embedding wrapped")
        plain = getattr(type(head), method)

        def cut(module: nn.Module, x: mx.array) -> mx.array:
            if self._at is not None:
                x = x.reshape(-1, x.shape[-1])[self._at][None]
            return plain(module, x)

        head.__class__ = type(type(head).__name__, (type(head),), {method: cut})

    def logits(self, model: nn.Module, batch: Batch) -> mx.array:
        """The logits of a batch at its answer positions.

        Args:
            model: The model this head belongs to.
            batch: What it reads.

        Returns:
            ``(A, V)``, in the model's dtype.
        """
        merged = merged_embedding(model)
        self._at = batch.answer_at
        try:
            if merged is None or not batch.blocks.size:
                return model(batch.ids).squeeze(0)
            with merged.reading(merged.encoder(merged.embedding(batch.blocks))):
                return model(batch.ids).squeeze(0)
        finally:
            self._at = None


def answer_loss(head: AnswerHead, model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy over a batch's answer tokens, and how many there are.

    Sums, not means: a mean of means weighs a token by how few its neighbours are, so batches,
    accumulation steps and ranks are added up and divided once.

    Args:
        head: The model's answer head.
        model: The model.
        batch: What it reads.

    Returns:
        Loss ``()`` float32 in nats, tokens ``()`` float32.
    """
    logits = head.logits(model, batch).astype(mx.float32)
    losses, _ = cross_entropy(logits, batch.targets)
    return (losses * batch.weights).sum(), batch.weights.sum()
