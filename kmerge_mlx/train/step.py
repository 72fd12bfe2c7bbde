"""One optimizer step: sums of gradients, divided by tokens once, clipped, applied.

Owns accumulation, the average over ranks, clipping and the update, compiled per batch shape. Does
not know data, files or when to stop.

Source: mlx-lm's trainer for the shape of the step; unlike it, a token weighs the same whatever
batch, accumulation step or rank it is in, and gradients are clipped by their global norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from kmerge_mlx.train.loss import AnswerHead, answer_loss
from kmerge_mlx.train.rows import Batch


@dataclass
class Totals:
    """What has been added up since the last update.

    Args:
        loss: Summed cross-entropy, ``()`` float32.
        tokens: Answer tokens, ``()`` float32.
        gradients: Summed gradients, a tree of the trainable parameters.
    """

    loss: mx.array
    tokens: mx.array
    gradients: Any


class Stepper:
    """Runs batches forward and backward, and applies what they add up to.

    Args:
        model: The model; its trainable parameters are what is trained.
        optimizer: An MLX optimizer, its state already initialised.
        clip_norm: Largest global gradient norm, or None.
    """

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, clip_norm: float | None = None
    ):
        self._model, self._optimizer = model, optimizer
        head = AnswerHead(model)
        loss_and_grad = nn.value_and_grad(model, partial(answer_loss, head))
        state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def forward_backward(ids, blocks, answer_at, targets, weights):
            batch = Batch(ids, blocks, answer_at, targets, weights, 0, 0)
            return loss_and_grad(model, batch)

        @partial(mx.compile, inputs=state, outputs=state)
        def apply(gradients, tokens):
            gradients = tree_map(lambda g: g / tokens, gradients)
            norm = mx.array(0.0)
            if clip_norm is not None:
                gradients, norm = optim.clip_grad_norm(gradients, clip_norm)
            optimizer.update(model, gradients)
            return norm

        self._forward_backward, self._apply, self._state = forward_backward, apply, state

    def add(self, batch: Batch, totals: Totals | None) -> Totals:
        """Adds one batch to what is being accumulated; evaluated when it returns."""
        (loss, tokens), gradients = self._forward_backward(
            batch.ids, batch.blocks, batch.answer_at, batch.targets, batch.weights
        )
        if totals is not None:
            loss, tokens = loss + totals.loss, tokens + totals.tokens
            gradients = tree_map(mx.add, gradients, totals.gradients)
        mx.eval(loss, tokens, gradients, self._state)
        return Totals(loss, tokens, gradients)

    def update(self, totals: Totals) -> tuple[float, int]:
        """Applies accumulated gradients.

        Args:
            totals: From :meth:`add`, at least one batch.

        Returns:
            Mean loss per answer token over all ranks, in nats, and how many tokens that was.
        """
        loss, tokens, gradients = totals.loss, totals.tokens, totals.gradients
        if mx.distributed.init().size() > 1:
            loss, tokens = mx.distributed.all_sum(loss), mx.distributed.all_sum(tokens)
            gradients = tree_map(mx.distributed.all_sum, gradients)
        self._apply(gradients, tokens)
        mx.eval(self._state, loss, tokens)
        return loss.item() / tokens.item(), int(tokens.item())
