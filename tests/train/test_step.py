"""The optimizer step: a token weighs the same wherever it is, and gradients are clipped as one."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx.train.loss import answer_loss
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import make_batch
from kmerge_mlx.train.step import Stepper
from tests.train.test_loss import PAD, V, examples, model_of


def stepper_of(max_grad_norm=0.0):
    """SGD: its update is the gradient itself, so gradients can be read off the weights."""
    model, optimizer = model_of(True), optim.SGD(0.1)
    optimizer.init(model.trainable_parameters())
    return model, Stepper(model, optimizer, answer_loss, max_grad_norm, Ranks())


def weights(model):
    return {name: mx.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def test_gradients_are_clipped_by_their_global_norm():
    batch = make_batch(examples(), 3, PAD, V)
    free, loose = stepper_of()
    held, tight = stepper_of(max_grad_norm=0.5)
    before = weights(free)
    told = loose.update(loose.add(batch, None))[2].item()
    tight.update(tight.add(batch, None))
    gradients, clipped = (
        {name: before[name] - array for name, array in weights(model).items()}
        for model in (free, held)
    )
    norm = mx.sqrt(sum((g**2).sum() for g in gradients.values())).item() / 0.1
    assert norm > 0.5
    assert told == pytest.approx(norm, rel=1e-3)
    for name, gradient in gradients.items():
        assert mx.allclose(clipped[name], gradient * (0.5 / norm), rtol=1e-3, atol=1e-6), name


def test_nothing_is_read_off_the_device_during_a_step(monkeypatch):
    """A step that waits for the device leaves it idle while the next batch is made."""
    _, stepper = stepper_of()
    batches = [make_batch(examples(4, seed), 3, PAD, V) for seed in range(2)]

    def wait(*arrays):
        raise AssertionError("the step waited")

    monkeypatch.setattr(mx, "eval", wait)
    stepper.update(stepper.add(batches[1], stepper.add(batches[0], None)))
