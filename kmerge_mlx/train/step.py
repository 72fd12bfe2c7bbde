"""One training step: gradients summed, divided by the tokens once, clipped, and applied.

With one rank nothing here waits for the device.

Source: mlx-lm's trainer for the shape of the step; unlike it, a token weighs the same whatever
batch, accumulation step or rank it is in, and gradients are clipped by their global norm. Optimizer
names and schedules are those of ``mlx_lm.lora`` and ``mlx_lm.tuner.utils.build_schedule``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.tuner.utils import build_schedule

from kmerge_mlx.config import is_number
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.errors import TrainError, first_line, short
from kmerge_mlx.model import merged_embedding, unfreeze
from kmerge_mlx.multi_encoder import MultiEncoder
from kmerge_mlx.train import loss as losses
from kmerge_mlx.train import multi_k
from kmerge_mlx.train.checkpoint import State
from kmerge_mlx.train.prepare import Run
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import MOST_POSITIONS, Batch, Rows, in_parts, make_batch, with_candidates
from kmerge_mlx.train.settings import OPTIMIZERS, RECONSTRUCTION, TrainSettings

Totals = dict[str, Any]
"""Sums since the last update: loss ``()``, tokens ``()``, gradients (a tree), all float32."""

OPTIMIZER, GRADIENTS, WINDOW = "optimizer", "gradients", "window"
EMPTY_WINDOW = {name: mx.array(0.0) for name in ("loss", "tokens", "norm")}
"""What is summed between two reports."""
SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")
_CLASSES = {kind.__name__.lower(): kind for kind in vars(optim).values() if isinstance(kind, type)}


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """Makes the optimizer of a run, its state not initialised yet."""
    if unknown := sorted(map(str, set(settings.optimizer_config) - set(OPTIMIZERS))):
        raise TrainError(
            f"optimizer_config names {short(unknown[0])}, expected one of {', '.join(OPTIMIZERS)}"
        )
    arguments = settings.optimizer_config.get(settings.optimizer) or {}
    schedule, encoders = settings.lr_schedule, settings.encoder_learning_rate
    rate = settings.learning_rate if schedule is None else _schedule(schedule)
    try:
        make = partial(_CLASSES[settings.optimizer], **arguments)
        # MLX takes most arguments unseen, and would fail at the first step.
        weights = {"matrix": mx.ones((2, 2)), "vector": mx.ones(2)}
        mx.eval(make(learning_rate=rate).apply_gradients(weights, weights))
        rest = make(learning_rate=rate)
        if encoders is None:
            return rest
        if schedule is not None:  # its first argument is the rate after warm-up
            if not (peak := schedule["arguments"][0]):
                raise TrainError(
                    "`encoder_learning_rate` follows lr_schedule, whose first argument stands for "
                    "the peak rate: found 0, expected more (use `warmup` for a rate that rises)"
                )
            encoders = _scaled(rate, encoders / peak)
        return optim.MultiOptimizer([make(learning_rate=encoders), rest], [_is_encoders])
    except (TypeError, ValueError) as error:
        where = f"optimizer_config.{settings.optimizer}"
        raise TrainError(f"{where} is {short(arguments)}: {first_line(error)}") from error


def _is_encoders(path: str, _: mx.array) -> bool:
    return ".encoder." in path


def _scaled(schedule: Callable[[mx.array], mx.array], by: float) -> Callable[[mx.array], mx.array]:
    return lambda step: schedule(step) * by


def _schedule(entry: dict[str, Any]) -> Callable[[mx.array], mx.array]:
    fits = entry.get("name") in SCHEDULES and isinstance(entry.get("arguments"), list)
    if set(entry) - {"name", "arguments", "warmup", "warmup_init"} or not fits:
        raise TrainError(
            f"lr_schedule is {short(entry)}, expected a name ({', '.join(SCHEDULES)}), a list of "
            "arguments and, if wanted, warmup and warmup_init"
        )
    try:
        schedule = build_schedule(entry)
        if not is_number(schedule(mx.array(1)).item()):
            raise TypeError("it gives no number")
    except (TypeError, ValueError, IndexError) as error:
        raise TrainError(f"lr_schedule {short(entry)}: {first_line(error)}") from error
    return schedule


def refill(tree: Any, saved: dict[str, mx.array]) -> Any:
    """A tree of the same form, its arrays replaced by saved ones, by flat name."""
    kinds = [
        {(name, a.shape, mx.issubdtype(a.dtype, mx.floating)) for name, a in arrays}
        for arrays in (tree_flatten(tree), saved.items())
    ]
    if wrong := {name for name, _, _ in kinds[0] ^ kinds[1]}:
        raise TrainError(
            f"the saved state does not fit this run ({short(min(wrong))} and {len(wrong) - 1} "
            "more): start anew in another `adapter_path`"
        )
    return tree_map_with_path(lambda name, _: saved[name], tree)


class Stepper:
    """Runs batches forward and backward, and applies what they add up to, compiled per shape."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        loss: losses.Loss,
        max_grad_norm: float,
        ranks: Ranks,
        grad_checkpoint: bool = False,
    ):
        self._ranks = ranks
        kept = nn.value_and_grad(model, loss)
        recomputed = nn.value_and_grad(model, losses.recomputing(loss))
        state = [model.state, optimizer.state, mx.random.state]
        merged = merged_embedding(model)
        several = merged is not None and isinstance(merged.encoder, MultiEncoder)

        @partial(mx.compile, inputs=state, outputs=state)
        def forward_backward(arrays: dict[str, mx.array]):
            # A row that is too long alone cannot be split: its activations are computed twice.
            twice = grad_checkpoint or arrays["ids"].size > MOST_POSITIONS
            if twice:  # the backward pass draws again, and leaves its keys behind
                mx.random.state[0][:], following = mx.random.split(mx.random.state[0])
            sums, gradients = (recomputed if twice else kept)(model, Batch(**arrays))
            if twice:
                mx.random.state[0][:] = following
            # Some gradients are transposed views. Sums over them would be in another order than
            # over what a resumed run has read from the disk.
            if several:
                gradients = multi_k.owned(gradients, [arrays["blocks"].shape[1] - merged.context])
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
        found = {"loss": loss, "tokens": tokens, "gradients": gradients}
        if totals is not None:
            found = multi_k.added(found, totals)
        mx.async_eval(found, self._state)
        return found

    def update(self, totals: Totals) -> tuple[mx.array, mx.array, mx.array]:
        """Applies what was added up over all ranks; returns arrays ``()`` float32.

        Summed loss in nats, answer tokens, and the norm of a token's gradient before clipping.
        """
        found = self._ranks.sum(totals)
        loss, tokens, gradients = (found[name] for name in ("loss", "tokens", "gradients"))
        norm = self._apply(gradients, tokens)
        mx.async_eval(self._state, loss, tokens, norm)
        return loss, tokens, norm


class Engine:
    """Trains a run's model batch by batch, in its phases: the encoder alone, then everything."""

    def __init__(self, run: Run):
        self._run, self._settings, self._ranks = run, run.settings, run.ranks
        self._merged = merged_embedding(run.model)
        self._ks = tuple(run.merges)
        self._totals: Totals | None = None
        self._window = EMPTY_WINDOW
        unfreeze(run.model, run.tuning)
        if run.ranks.size > 1:
            _share(run)
        self._enter_phase(run.state.iteration < self._settings.encoder_warmup, run.tensors)
        run.tensors = {}
        if run.state.rng:
            mx.random.seed((run.state.rng[0] << 32) | run.state.rng[1])

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        own = getattr(self._optimizer, "optimizers", [self._optimizer])
        return own[-1].learning_rate.item()

    def step(self, rows: Rows) -> None:
        """Adds a batch up, of which this rank takes its share, and updates when it is time."""
        settings, state = self._settings, self._run.state
        mine = slice(self._ranks.rank, None, self._ranks.size)
        given, k = (rows.indices[mine], rows.examples[mine]), self._drawn(state.iteration)
        # Reconstruction compares with the tokens of all the batch, and reads no row.
        for indices, examples in [given] if self._reconstructs else in_parts(*given, k):
            batch = self.make_batch(indices, examples, "train", k)
            if self._reconstructs:
                batch = with_candidates(batch, k)
            self._totals = self._stepper.add(batch, self._totals)
        state.added += 1
        # A phase or a run that ends within a group applies what it has: nothing is dropped.
        last = state.iteration in (settings.iters, settings.encoder_warmup)
        if state.added == settings.grad_accumulation_steps or last:
            loss, tokens, norm = self._stepper.update(self._totals)
            loss, tokens = loss + self._window["loss"], tokens + self._window["tokens"]
            self._window = {"loss": loss, "tokens": tokens, "norm": norm}
            self._totals, state.added = None, 0
        if self._warming and state.iteration == settings.encoder_warmup:
            self._enter_phase(False, {})

    def _drawn(self, iteration: int) -> int:
        """The K of an iteration's batch; while the encoder is trained alone, one that has one."""
        ks = [k for k in self._ks if k > 1 or not self._warming]
        return multi_k.drawn(ks, self._settings.seed, iteration)

    def make_batch(
        self, indices: Sequence[int], examples: Sequence[TokenizedExample], split: str, k: int
    ) -> Batch:
        """A batch of examples (``indices`` of a split), with the teacher's distributions."""
        merged, teacher = self._merged, self._run.teacher
        pad, v = merged.pad_token_id, merged.vocab_size
        batch = make_batch(examples, k, pad, v, merged.context)
        return batch if teacher is None else teacher.teach(batch, indices, examples, split)

    def read_window(self) -> tuple[float, float, float]:
        """Waits for the device: loss in nats and tokens since the last time, and gradient norm."""
        window, self._window = self._window, EMPTY_WINDOW
        return window["loss"].item(), window["tokens"].item(), window["norm"].item()

    def all_finite(self) -> bool:
        """Whether every trained weight is a number, and whatever has been added up."""
        trees = [self._run.model.trainable_parameters(), self._totals or []]
        return mx.stack([mx.isfinite(a).all() for _, a in tree_flatten(trees)]).all().item()

    def tensors(self) -> dict[str, mx.array]:
        """Everything but the adapter that the next step depends on, by flat names."""
        found = self._parts()
        if GRADIENTS in found:
            found[GRADIENTS] = self._ranks.sum(self._totals)
        return dict(tree_flatten(found))

    def _parts(self) -> dict[str, Any]:
        found = {OPTIMIZER: self._optimizer.state, WINDOW: self._window}
        if self._totals is not None:
            found[GRADIENTS] = self._totals
        if self._reconstructs:
            found[losses.DECODER] = self._merged[losses.DECODER].parameters()
        return found

    def _enter_phase(self, warming: bool, saved: dict[str, mx.array]) -> None:
        """Chooses what is trained and for what; each phase has an optimizer of its own."""
        run, settings = self._run, self._settings
        self._warming = warming
        self._reconstructs = warming and settings.encoder_warmup_loss == RECONSTRUCTION
        unfreeze(run.model, run.tuning, encoder_only=warming)
        self._merged.pop(losses.DECODER, None)
        loss = losses.answer_loss
        if self._reconstructs:
            losses.add_decoder(self._merged)
            loss = losses.reconstruction_loss
        run.model.train()
        self._optimizer = make_optimizer(settings)
        self._optimizer.init(run.model.trainable_parameters())
        if saved:
            self._restore(saved)
        how = (settings.max_grad_norm, self._ranks, settings.grad_checkpoint)
        self._stepper = Stepper(run.model, self._optimizer, loss, *how)

    def _restore(self, saved: dict[str, mx.array]) -> None:
        """Goes on from a saved run's tensors."""
        state, zero = self._run.state, mx.array(0.0)
        weights = self._run.model.trainable_parameters()
        if state.added:
            done = range(state.iteration - state.added, state.iteration)
            weights = multi_k.owned(weights, {self._drawn(i + 1) for i in done})
            self._totals = {"loss": zero, "tokens": zero, "gradients": weights}
        found = refill(self._parts(), saved)
        self._optimizer.state, self._window = found[OPTIMIZER], found[WINDOW]
        if self._reconstructs:
            self._merged[losses.DECODER].update(found[losses.DECODER])
        # What several ranks had added up was saved as one sum.
        self._totals = found.get(GRADIENTS) if self._ranks.rank == 0 else None


def _share(run: Run) -> None:
    """Gives every rank the first one's weights, state and tensors: it alone has read a save."""
    ranks = run.ranks
    run.model.update(tree_map(ranks.share, run.model.trainable_parameters()))
    run.state = State.from_json(ranks.share_json(asdict(run.state)))
    kinds = {n: (a.shape, str(a.dtype).split(".")[-1]) for n, a in run.tensors.items()}
    for name, (shape, dtype) in ranks.share_json(kinds).items():
        mine = run.tensors.get(name, mx.zeros(shape, getattr(mx, dtype)))
        run.tensors[name] = ranks.share(mine)
