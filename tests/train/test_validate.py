"""Validation's figures: what greedy generation would have written, and means that weigh tokens."""

from __future__ import annotations

import numpy as np
import pytest

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.loop import Figures, Validator
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import make_batch
from tests.tiny import steps
from tests.train.test_loss import PAD, V, examples, model_of, naive_loss

K = 3


def figures_of(model, rows, batch_size=4) -> Figures:
    def batches(indices, examples):
        assert [rows[i] for i in indices] == list(examples)
        return make_batch(examples, K, PAD, V)

    return Validator(model, rows, batch_size, K, batches, Ranks())()


def greedy(model, rows: list[TokenizedExample], tokens: int) -> list[list[int]]:
    """What the model writes after each prompt, by mlx-lm's own loop."""
    model.eval()
    prompts = [merged_embedding(model).compress(row.segments) for row in rows]
    return [[int(token) for token, _ in steps(model, prompt, tokens)] for prompt in prompts]


def test_an_answer_is_right_if_greedy_generation_would_have_written_it():
    """Every third answer has another last token, every fourth another first one."""
    model, rows = model_of(True), examples(12, seed=3)
    written = [ids[: 1 + i % 4] for i, ids in enumerate(greedy(model, rows, 4))]
    changed = [list(ids) for ids in written]
    for i, ids in enumerate(changed):
        ids[-1] = (ids[-1] + (i % 3 == 0)) % V
        ids[0] = (ids[0] + (i % 4 == 1)) % V
    rows = [TokenizedExample(row.segments, ids) for row, ids in zip(rows, changed, strict=True)]
    right = np.array([ids == was for ids, was in zip(changed, written, strict=True)])
    assert 3 < right.sum() < 9
    assert figures_of(model, rows).accuracy == pytest.approx(right.mean())


def test_balanced_accuracy_is_the_mean_of_the_answers_recalls():
    """One answer that the model always gives, and three that it never does."""
    model, rows = model_of(True), examples(1, seed=3)
    (written,) = greedy(model, rows, 2)
    wrong = [[(written[0] + i) % V, written[1]] for i in (1, 2, 3)]
    answers = [written] * 5 + [wrong[0]] * 2 + wrong
    rows = [TokenizedExample(rows[0].segments, ids) for ids in answers]
    figures = figures_of(model, rows)
    assert figures.accuracy == pytest.approx(5 / 10)
    assert figures.balanced_accuracy == pytest.approx((1 + 0 + 0 + 0) / 4)


def test_the_loss_is_the_mean_over_tokens_and_not_over_rows_or_batches():
    model, rows = model_of(True), examples(7, seed=5)
    model.eval()
    losses = [naive_loss(model, [row]).item() for row in rows]
    tokens = [len(row.answer_ids) for row in rows]
    assert len(set(tokens)) > 2
    found = figures_of(model, rows).loss
    assert found == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
    of_rows = np.mean([loss / n for loss, n in zip(losses, tokens, strict=True)])
    assert abs(found - of_rows) > 1e-3
