"""Validation: loss and accuracy on examples that are not trained on, by teacher forcing.

An answer counts as right if each of its tokens, the end included, is the likeliest after those
before it; that is exactly when greedy decoding would write it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.train.loss import answer_logits, divergence
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import Batch, by_length


@dataclass(frozen=True)
class Figures:
    """What a validation measured.

    Args:
        loss: Mean cross-entropy of an answer token, in nats.
        accuracy: Share of the answers that are right in every token.
        balanced_accuracy: The mean over the distinct answers of each one's accuracy, so that
            always giving the most frequent answer earns nothing.
        kl: Mean divergence from the teacher per answer token, in nats, or None without one.
    """

    loss: float
    accuracy: float
    balanced_accuracy: float
    kl: float | None = None

    def named(self) -> dict[str, float]:
        """The figures as mlx-lm names them: ``val_loss`` and so on."""
        return {f"val_{n}": float(v) for n, v in vars(self).items() if v is not None}

    @property
    def score(self) -> float:
        """What has to fall: the divergence where there is a teacher, else the loss."""
        return self.loss if self.kl is None else self.kl


class Validator:
    """Measures a model on fixed examples, at least one, in batches of B over all ranks."""

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[TokenizedExample],
        batch_size: int,
        merge_factor: int,
        make_batch: Callable[[Sequence[int], Sequence[TokenizedExample]], Batch],
        ranks: Ranks,
    ):
        self._model, self._examples, self._make_batch = model, list(examples), make_batch
        self._ranks = ranks
        batches = by_length(self._examples, batch_size, merge_factor)
        self._batches = [part for batch in batches if (part := batch[ranks.rank :: ranks.size])]
        kinds: dict[tuple[int, ...], int] = {}
        self._kind = np.array(
            [kinds.setdefault(tuple(e.answer_ids), len(kinds)) for e in self._examples]
        )

        @partial(mx.compile, inputs=[model.state])
        def measure(arrays: dict[str, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
            batch = Batch(**arrays)
            logits = answer_logits(model, batch).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, batch.targets)
            kl = mx.zeros((0,)) if batch.teacher_ids is None else divergence(logits, batch)
            return losses, mx.argmax(logits, axis=-1) == batch.targets, kl

        self._measure = measure

    def __call__(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Figures:
        """Measures the model as it is now, without dropout; reports (batches done, in all)."""
        training = self._model.training
        self._model.eval()
        right = np.zeros(len(self._examples), np.float32)
        sums = np.zeros(3, np.float64)  # loss, divergence, tokens
        taught = False
        for done, indices in enumerate(self._batches, 1):
            examples = [self._examples[i] for i in indices]
            losses, hits, kl = self._measure(self._make_batch(indices, examples).arrays())
            mx.eval(losses, hits, kl)
            lengths = [len(example.answer_ids) for example in examples]
            tokens, taught = sum(lengths), taught or bool(kl.size)
            ends = np.cumsum(lengths)[:-1]
            right[indices] = [part.all() for part in np.split(np.array(hits)[:tokens], ends)]
            kl_sum = np.array(kl, np.float64)[:tokens].sum()
            sums += (np.array(losses, np.float64)[:tokens].sum(), kl_sum, tokens)
            progress(done, len(self._batches))
        self._model.train(training)
        found = self._ranks.sum(mx.array(np.concatenate([right, sums]), mx.float32))
        right, (loss, kl, tokens) = np.split(np.array(found, np.float64), [-3])
        of_kind = np.bincount(self._kind, right) / np.bincount(self._kind)
        return Figures(loss / tokens, right.mean(), of_kind.mean(), kl / tokens if taught else None)
