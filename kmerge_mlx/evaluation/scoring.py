"""Answers a model gives, and how likely it finds the right ones.

Owns one pass over a batch of questions: greedy generation through mlx-lm's batching, and the
likelihood of the right answer. Does not know what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.errors import PromptError
from kmerge_mlx.evaluation.baselines import Method
from kmerge_mlx.generation.stream import batch_generate, check_context
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train.dataset import num_positions
from kmerge_mlx.train.loss import answer_logits, cross_entropy
from kmerge_mlx.train.rows import make_batch
from kmerge_mlx.virtual_tokens import CompressedPrompt

MOST_POSITIONS = 1 << 14
"""Positions read at once for likelihoods: at D = 896, some 300 MB."""
MOST_LOGITS = 1 << 27
"""Logits held at once, for the same: 512 MiB."""


@dataclass(frozen=True)
class Prediction:
    """What came of one question.

    Args:
        text: What the model wrote.
        nll: Negative log-likelihood of the right answer and its end, summed, in nats.
        answer_tokens: How many tokens that is.
        prompt_tokens: Tokens of the prompt.
        positions: How many positions they were read in.
    """

    text: str
    nll: float
    answer_tokens: int
    prompt_tokens: int
    positions: int


class Scorer:
    """Scores questions with one model.

    Args:
        model: From :func:`methods.reader`.
        tokenizer: mlx-lm's tokenizer wrapper.
        batch_size: Most questions at once.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int):
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._embedding = merged_embedding(model)

    def refusal(self, method: Method, rows: Sequence[TokenizedExample]) -> str | None:
        """Why a method cannot read some prompt, or None if it can read all."""
        for row in rows:
            try:
                check_context(self._model, method.cut(row.segments))
            except PromptError as error:
                return str(error)
        return None

    def score(
        self, method: Method, rows: Sequence[TokenizedExample], max_tokens: Sequence[int]
    ) -> list[Prediction]:
        """Answers a batch of questions.

        Args:
            method: How their prompts are read.
            rows: Prompts and right answers; at most ``batch_size``.
            max_tokens: Most tokens of each answer.
        """
        # Merged anew, whatever came before: an answer's last digits depend on its batch alone.
        self._embedding.forget_blocks()
        prompts = [self._embedding.compress(method.cut(row.segments)) for row in rows]
        answers = batch_generate(
            self._model,
            self._tokenizer,
            prompts,
            max_tokens=list(max_tokens),
            prefill_batch_size=self._batch_size,
            completion_batch_size=self._batch_size,
        )
        nll = self._nll(prompts, [row.answer_ids for row in rows])
        return [
            Prediction(text, loss, len(row.answer_ids), len(row.prompt_ids), len(prompt.ids))
            for row, prompt, text, loss in zip(rows, prompts, answers.texts, nll, strict=True)
        ]

    def _nll(
        self, prompts: Sequence[CompressedPrompt], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        """Each right answer's negative log-likelihood."""
        embedding, found = self._embedding, []
        # A virtual id is bound, so a prompt is read as it stands.
        read = [
            TokenizedExample([Segment(prompt.ids, False)], list(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for rows in _in_passes(read, embedding.vocab_size):
            batch = make_batch(rows, 1, embedding.pad_token_id, embedding.vocab_size)
            logits = answer_logits(self._model, batch).astype(mx.float32)
            losses = np.array(cross_entropy(logits, batch.targets)[0], np.float64)
            ends = np.cumsum([len(row.answer_ids) for row in rows])
            found += [float(part.sum()) for part in np.split(losses[: ends[-1]], ends[:-1])]
        return found


def _in_passes(
    rows: Sequence[TokenizedExample], vocab_size: int
) -> Iterator[Sequence[TokenizedExample]]:
    """Rows in runs that are read at once: long prompts and long answers take memory."""
    start = 0
    for end in range(1, len(rows) + 1):
        grown = rows[start : end + 1]
        positions = len(grown) * max(row.num_tokens for row in grown)
        logits = vocab_size * sum(len(row.answer_ids) for row in grown)
        if end == len(rows) or positions > MOST_POSITIONS or logits > MOST_LOGITS:
            yield rows[start:end]
            start = end


def in_batches(
    method: Method, rows: Sequence[TokenizedExample], batch_size: int
) -> list[list[int]]:
    """Every row once, in batches of similar length: the same ones whenever it is asked."""
    lengths = [num_positions(replace(r, segments=method.cut(r.segments)), method.k) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
