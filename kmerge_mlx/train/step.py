"""One optimizer step: sums of gradients, divided by tokens once, clipped, applied.

Owns accumulation, the sum over ranks, clipping and the update, compiled per batch shape. With one
rank nothing here waits for the device: what is returned are arrays that are still being computed.
Does not know data, files or when to stop.

Source: mlx-lm's trainer for the shape of the step; unlike it, a token weighs the same whatever
batch, accumulation step or rank it is in, and gradients are clipped by their global norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import Batch

Loss = Callable[[nn.Module, Batch], tuple[mx.array, mx.array]]
"""A model and a batch to a summed loss and the number of tokens in it."""


@dataclass
class Totals:
    """What has been added up since the last update.

    Args:
        loss: Summed loss, ``()`` float32.
        tokens: Answer tokens, ``()`` float32.
        gradients: Summed gradients, a tree of the trainable parameters.
    """

    loss: mx.array
    tokens: mx.array
    gradients: Any


@dataclass
class Update:
    """What an update did, over all ranks.

    Args:
        loss: Summed loss, ``()`` float32, in nats.
        tokens: Answer tokens, ``()`` float32.
        grad_norm: Global norm of the gradient per token before it was clipped, ``()`` float32.
    """

    loss: mx.array
    tokens: mx.array
    grad_norm: mx.array


class Stepper:
    """Runs batches forward and backward, and applies what they add up to.

    Args:
        model: The model; its trainable parameters are what is trained.
        optimizer: An MLX optimizer, its state already initialised.
        loss: What is minimised.
        max_grad_norm: Largest global gradient norm; 0 leaves it unclipped.
        ranks: The machines.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        loss: Loss,
        max_grad_norm: float,
        ranks: Ranks,
    ):
        self._ranks = ranks
        loss_and_grad = nn.value_and_grad(model, loss)
        state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def forward_backward(arrays: dict[str, mx.array]):
            sums, gradients = loss_and_grad(model, Batch(**arrays))
            # Some gradients are transposed views. Sums over them would be in another order than
            # over what a resumed run has read from the disk.
            return sums, tree_map(mx.contiguous, gradients)

        @partial(mx.compile, inputs=state, outputs=state)
        def apply(gradients: Any, tokens: mx.array) -> mx.array:
            gradients = tree_map(lambda g: g / tokens, gradients)
            clipped, norm = optim.clip_grad_norm(gradients, max_grad_norm or 1.0)
            optimizer.update(model, clipped if max_grad_norm else gradients)
            return norm

        self._forward_backward, self._apply, self._state = forward_backward, apply, state

    def add(self, batch: Batch, totals: Totals | None) -> Totals:
        """Adds one batch to what is being accumulated."""
        (loss, tokens), gradients = self._forward_backward(batch.arrays())
        if totals is not None:
            loss, tokens = loss + totals.loss, tokens + totals.tokens
            gradients = tree_map(mx.add, gradients, totals.gradients)
        mx.async_eval(loss, tokens, gradients, self._state)
        return Totals(loss, tokens, gradients)

    def update(self, totals: Totals) -> Update:
        """Applies accumulated gradients.

        Args:
            totals: From :meth:`add`, at least one batch.
        """
        loss, tokens, gradients = totals.loss, totals.tokens, totals.gradients
        if self._ranks.size > 1:
            loss, tokens, gradients = self._ranks.sum([loss, tokens, gradients])
        norm = self._apply(gradients, tokens)
        mx.async_eval(self._state, loss, tokens, norm)
        return Update(loss, tokens, norm)
