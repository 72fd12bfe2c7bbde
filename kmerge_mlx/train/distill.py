"""Self-distillation: the uncompressed base model teaches the compressed one.

Owns: the teacher's distributions at the answer positions, whole or its top tokens, and the
divergence from them. Does not know where stored ones are kept (``teacher_file``).

The divergence is KL(teacher || student), summed over answer tokens. Of top tokens, what is left of
the probability is one further outcome, "any other token", so the sum is never above the whole
divergence and is zero only where both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.errors import TrainError
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.loss import AnswerHead
from kmerge_mlx.train.rows import Batch, make_batch

# Probabilities below this are rounding: their logarithms would drown the rest.
_TINY = 1e-6


class Teacher:
    """A base model that reads prompts uncompressed.

    Args:
        model: The base, its embedding wrapped with K = 1; its weights are the student's own arrays.
        top_k: How many tokens to keep; 0 keeps all.

    Raises:
        TrainError: More tokens than there are.
    """

    def __init__(self, model: nn.Module, top_k: int = 0):
        self.model, self.top_k = model.eval(), top_k
        self._head = AnswerHead(model)
        self._vocab_size = merged_embedding(model).vocab_size
        if top_k > self._vocab_size:
            raise TrainError(
                f"--teacher-top-k is {top_k}, the model has {self._vocab_size:,} tokens"
            )
        self._compiled = mx.compile(self._compute)

    def teach(
        self, batch: Batch, indices: Sequence[int], examples: Sequence[TokenizedExample], split: str
    ) -> Batch:
        """A student's batch with what the teacher says at its answer positions.

        Args:
            batch: The student's, made of ``examples``.
            indices: Where they stand in the data.
            examples: The same examples, in the same order.
            split: Which data.
        """
        ids, logprobs = self.targets(examples)
        return replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)

    def targets(self, examples: Sequence[TokenizedExample]) -> tuple[mx.array, mx.array]:
        """What the teacher says at the answer positions of examples.

        Returns:
            Ids ``(A, k)`` and log-probabilities ``(A, k)``; or no ids and ``(A, V)``. A is padded
            as in a batch of the same examples.
        """
        read = make_batch(examples, 1, 0, self._vocab_size)
        return self._compiled(read.ids, read.blocks, read.answer_at)

    def _compute(self, ids: mx.array, blocks: mx.array, answer_at: mx.array) -> tuple:
        batch = Batch(ids, blocks, answer_at, answer_at, answer_at)
        logprobs = nn.log_softmax(self._head.logits(self.model, batch).astype(mx.float32))
        logprobs = mx.stop_gradient(logprobs)
        if not self.top_k:
            return mx.zeros((0,), mx.int32), logprobs
        top = mx.argpartition(-logprobs, self.top_k - 1)[:, : self.top_k]
        return top.astype(mx.int32), mx.take_along_axis(logprobs, top, axis=-1)


def divergence(logits: mx.array, batch: Batch) -> mx.array:
    """KL(teacher || student) at each answer position.

    Args:
        logits: The student's, ``(A, V)``.
        batch: Carries ``teacher_logprobs`` ``(A, V)``, or ``(A, k)`` with ``teacher_ids``.

    Returns:
        ``(A,)`` float32 in nats.
    """
    student, teacher = nn.log_softmax(logits.astype(mx.float32)), batch.teacher_logprobs
    if not batch.teacher_ids.size:
        return (mx.exp(teacher) * (teacher - student)).sum(-1)
    student = mx.take_along_axis(student, batch.teacher_ids, axis=-1)
    shared = (mx.exp(teacher) * (teacher - student)).sum(-1)
    rest, left = _rest(teacher), _rest(student)
    return shared + rest * (mx.log(rest) - mx.log(left))


def distill_loss(head: AnswerHead, model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Summed divergence over a batch's answer tokens, and how many there are.

    Returns:
        Divergence ``()`` float32 in nats, tokens ``()`` float32.
    """
    losses = divergence(head.logits(model, batch), batch)
    return (losses * batch.weights).sum(), batch.weights.sum()


def _rest(logprobs: mx.array) -> mx.array:
    """What the probabilities leave of one: ``(A, k)`` to ``(A,)``."""
    return mx.maximum(1 - mx.exp(logprobs).sum(-1), _TINY)
