"""The optimizer step: a token weighs the same wherever it is, and gradients are clipped as one."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx.train.loss import AnswerHead, answer_loss
from kmerge_mlx.train.rows import make_batch
from kmerge_mlx.train.step import Stepper
from tests.test_train_loss import PAD, V, examples, model_of


def stepper_of(clip_norm=None, learning_rate=0.1):
    """SGD: its update is the gradient itself, so gradients can be read off the weights."""
    model = model_of(True)
    optimizer = optim.SGD(learning_rate)
    optimizer.init(model.trainable_parameters())
    return model, Stepper(model, optimizer, clip_norm)


def weights(model):
    return {name: mx.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def moved(model, before):
    return {name: before[name] - array for name, array in weights(model).items()}


def test_accumulated_batches_equal_one_batch():
    """Unequal parts: a mean of means would differ (DESIGN section 8)."""
    rows = examples(7, seed=4)
    whole, one = stepper_of()
    parts, two = stepper_of()
    loss, tokens = one.update(one.add(make_batch(rows, 3, PAD, V), None))
    totals = two.add(make_batch(rows[:1], 3, PAD, V), None)
    totals = two.add(make_batch(rows[1:], 3, PAD, V), totals)
    assert two.update(totals) == (pytest.approx(loss, abs=1e-5), tokens)
    for name, array in weights(whole).items():
        assert mx.abs(array - weights(parts)[name]).max().item() < 1e-5, name


def test_the_reported_loss_is_the_mean_over_answer_tokens():
    _, stepper = stepper_of()
    batch = make_batch(examples(), 3, PAD, V)
    plain = model_of(True)
    total, tokens = answer_loss(AnswerHead(plain), plain, batch)
    loss, count = stepper.update(stepper.add(batch, None))
    assert (loss, count) == (pytest.approx(total.item() / tokens.item(), rel=1e-5), tokens.item())


def test_gradients_are_clipped_by_their_global_norm():
    batch = make_batch(examples(), 3, PAD, V)
    free, loose = stepper_of()
    held, tight = stepper_of(clip_norm=0.5)
    before = weights(free)
    loose.update(loose.add(batch, None))
    tight.update(tight.add(batch, None))
    gradients, clipped = moved(free, before), moved(held, before)
    norm = mx.sqrt(sum((g**2).sum() for g in gradients.values())).item() / 0.1
    assert norm > 0.5
    for name, gradient in gradients.items():
        assert mx.allclose(clipped[name], gradient * (0.5 / norm), rtol=1e-3, atol=1e-6), name


def test_training_learns_the_answers_of_a_batch():
    model = model_of(True)
    optimizer = optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    stepper = Stepper(model, optimizer, clip_norm=1.0)
    batch = make_batch(examples(8), 3, PAD, V)
    losses = [stepper.update(stepper.add(batch, None))[0] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
