"""The losses that training minimises: on answers, against a teacher, and for encoder warm-up.

All are sums and not means: a mean of means would weigh a token by how few its neighbours are, so
batches, accumulation steps and ranks are added up and divided once.

Source: arXiv 2604.15153 section 3.3 (loss on answer tokens and the eos after each answer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.model import merged_embedding, output_head
from kmerge_mlx.multi_encoder import MultiEncoder
from kmerge_mlx.train.rows import Batch
from kmerge_mlx.virtual_tokens import MergedEmbedding

Loss = Callable[[nn.Module, Batch], tuple[mx.array, mx.array]]
"""A model and a batch to a summed loss ``()`` in nats and the number of tokens in it ``()``, both
float32."""

DECODER = "decoder"


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy of each row, and the softmax from which its gradient is made.

    Autograd would take the V exponentials of a row twice, and add up the gradient from three arrays
    of the logits' size. The likeliest token's probability is at least 1/V, so the normaliser is
    exact. Of logits ``(A, V)`` float32 and targets ``(A,)`` it makes losses ``(A,)`` in nats, and
    probabilities ``(A, V)``, which take no gradient.
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


@contextmanager
def _answers_alone(model: nn.Module, at: mx.array) -> Iterator[None]:
    """Cuts hidden states to some positions before the output head: logits take most memory."""
    if (found := output_head(model)) is None:  # tied: the head is a method of the embedding
        merged = merged_embedding(model)
        place, name, head = vars(merged), "as_linear", merged.as_linear
    else:
        (path, _, name), head = found[0].rpartition("."), found[1]
        place = dict(model.named_modules())[path]
    place[name] = lambda x: head(x.reshape(-1, x.shape[-1])[at][None])
    try:
        yield
    finally:
        if found is None:
            del place[name]
        else:
            place[name] = head


def answer_logits(model: nn.Module, batch: Batch, cache: list[Any] | None = None) -> mx.array:
    """Logits at a batch's answer positions: ``(A, V)``, in the model's dtype; blocks merge here.

    ``cache``: mlx-lm's, of what was read before the batch's positions.
    """
    merged = merged_embedding(model)
    with _answers_alone(model, batch.answer_at):
        if merged is None or not batch.blocks.size:
            return model(batch.ids, cache=cache).squeeze(0)
        with merged.reading(merged.encoder(merged.embedding(batch.blocks))):
            return model(batch.ids, cache=cache).squeeze(0)


def answer_loss(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy over a batch's answer tokens, or their divergence from a teacher."""
    logits = answer_logits(model, batch).astype(mx.float32)
    if batch.teacher_ids is None:
        losses, _ = cross_entropy(logits, batch.targets)
    else:
        losses = divergence(logits, batch)
    return (losses * batch.weights).sum(), batch.weights.sum()


def divergence(logits: mx.array, batch: Batch) -> mx.array:
    """KL(teacher || student) at each answer position: ``(A,)`` float32 in nats.

    Of a teacher's top tokens, the probability that is left is one further outcome, "any other
    token", so the sum is never above the whole divergence and is zero only where both agree.
    ``logits`` are the student's, ``(A, V)`` float32.
    """
    student, teacher = nn.log_softmax(logits), batch.teacher_logprobs
    if not batch.teacher_ids.size:
        return (mx.exp(teacher) * (teacher - student)).sum(-1)
    student = mx.take_along_axis(student, batch.teacher_ids, axis=-1)
    shared = (mx.exp(teacher) * (teacher - student)).sum(-1)
    # What the probabilities leave of one. Below 1e-6 it is rounding: its logarithm would drown all.
    rest, left = (mx.maximum(1 - mx.exp(part).sum(-1), 1e-6) for part in (teacher, student))
    return shared + rest * (mx.log(rest) - mx.log(left))


def add_decoder(merged: MergedEmbedding) -> None:
    """Gives the wrapped embedding a trainable decoder, ``(D,)`` to ``(K * D,)``, for warm-up.

    Where it has encoders for several K, each gets one.
    """
    d = merged.encoder.config.hidden_size
    if not isinstance(merged.encoder, MultiEncoder):
        merged[DECODER] = nn.Linear(d, merged.merge_factor * d)
        return
    merged[DECODER] = nn.Module()
    for k in merged.encoder.ks:
        merged[DECODER][f"k{k}"] = nn.Linear(d, k * d)


def reconstruction_loss(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy of a batch's block tokens, read from their merged embeddings.

    A linear decoder turns a merged embedding into K vectors, each compared with the embeddings of
    the batch's own tokens (from ``rows.with_candidates``); at least 1 is counted, to divide by.
    """
    merged, k = merged_embedding(model), batch.block_targets.shape[1]
    vectors = merged.encoder(merged.embedding(batch.blocks))  # (M, D)
    decoder = merged[DECODER].get(f"k{k}", merged[DECODER])
    decoded = decoder(vectors).reshape(-1, k, vectors.shape[-1])
    table = merged.embedding(batch.candidates).astype(decoded.dtype)  # (U, D)
    scores = (decoded @ table.T).astype(mx.float32)  # (M, K, U)
    scores = scores + mx.where(batch.candidate_weights > 0, 0.0, -mx.inf)
    losses = nn.losses.cross_entropy(scores, batch.block_targets)
    weights = mx.broadcast_to(batch.block_weights[:, None], losses.shape)
    return (losses * weights).sum(), mx.maximum(weights.sum(), 1)


def _recomputed(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A layer's call that keeps its inputs alone, and computes the rest again when needed."""

    def recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        key, following = mx.random.split(mx.random.state[0])

        def inner(parameters: Any, key: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            layer.update(parameters)
            mx.random.state[0][:] = mx.stop_gradient(key)
            return call(layer, *args, **kwargs)

        found = mx.checkpoint(inner)(layer.trainable_parameters(), key, *args, **kwargs)
        mx.random.state[0][:] = following
        return found

    return recomputed


def recomputing(loss: Loss) -> Loss:
    """The same loss, with each layer's activations recomputed in the backward pass.

    mlx-lm's ``grad_checkpoint`` would draw another dropout there than on the way forward, and it
    changes a class that other models share: here it is changed back.
    """

    def recomputed(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
        layers = {type(layer): layer for layer in model.layers}
        plain = {kind: kind.__call__ for kind in layers}
        for kind, call in plain.items():
            kind.__call__ = _recomputed(call)
        try:
            return loss(model, batch)
        finally:
            for kind, call in plain.items():
                kind.__call__ = call

    return recomputed
