"""The arithmetic of a run: batches in, updates out, and all of its tensors for a save.

Owns: model, optimizer, what is added up, the phases (the encoder alone, then everything), and the
sums since the last report. Does not know files, validations or when a run is over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.model import merged_embedding, unfreeze
from kmerge_mlx.train import warmup
from kmerge_mlx.train.checkpoint import State
from kmerge_mlx.train.distill import distill_loss
from kmerge_mlx.train.loss import AnswerHead, answer_loss
from kmerge_mlx.train.optimizer import load_state, make_optimizer, refill, state_tensors
from kmerge_mlx.train.order import Rows
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import Batch, make_batch
from kmerge_mlx.train.settings import RECONSTRUCTION
from kmerge_mlx.train.setup import Run
from kmerge_mlx.train.step import Loss, Stepper, Totals

OPTIMIZER, GRADIENTS, DECODER, WINDOW = "optimizer", "gradients", "decoder", "window"


class Engine:
    """Trains a run's model, batch by batch.

    Args:
        run: From ``setup.prepare``.
        ranks: The machines.

    Attributes:
        head: The model's answer head.
    """

    def __init__(self, run: Run, ranks: Ranks):
        self._run, self._config, self._ranks = run, run.config, ranks
        self._merged = merged_embedding(run.model)
        self.head = AnswerHead(run.model)
        self._totals: Totals | None = None
        self._window = {"loss": mx.array(0.0), "tokens": mx.array(0.0), "norm": mx.array(0.0)}
        unfreeze(run.model, run.tuning)
        if ranks.size > 1:
            _share(run, ranks)
        self._enter_phase(run.state.iteration < run.config.encoder_warmup, _part(run, OPTIMIZER))
        self._restore()

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return self._optimizer.learning_rate.item()

    def step(self, rows: Rows, iteration: int) -> None:
        """Adds a batch up, and updates the weights when it is time.

        Args:
            rows: The batch, of which this rank takes its share.
            iteration: Which one this is, from 1.
        """
        config, ranks, state = self._config, self._ranks, self._run.state
        mine = slice(ranks.rank, None, ranks.size)
        batch = self.make_batch(rows.indices[mine], rows.examples[mine], "train")
        if self._reconstructs:
            batch = warmup.with_candidates(batch, self._merged.merge_factor)
        self._totals = self._stepper.add(batch, self._totals)
        state.added += 1
        # A phase or a run that ends in between applies what it has: nothing is dropped.
        last = iteration in (config.iters, config.encoder_warmup)
        if state.added == config.grad_accumulation_steps or last:
            update = self._stepper.update(self._totals)
            window = self._window
            self._window = {
                "loss": window["loss"] + update.loss,
                "tokens": window["tokens"] + update.tokens,
                "norm": update.grad_norm,
            }
            self._totals, state.added = None, 0
        if self._warming and iteration == config.encoder_warmup:
            self._enter_phase(False, {})

    def make_batch(
        self, indices: Sequence[int], examples: Sequence[TokenizedExample], split: str
    ) -> Batch:
        """What the student reads of some examples, and what the teacher says of them.

        Args:
            indices: Where they stand in the data.
            examples: What they are.
            split: Which data.
        """
        merged, teacher = self._merged, self._run.teacher
        batch = make_batch(
            *(examples, merged.merge_factor, merged.pad_token_id, merged.vocab_size),
            context=merged.context,
        )
        return batch if teacher is None else teacher.teach(batch, indices, examples, split)

    def read_window(self) -> tuple[float, float, float]:
        """Waits for the device and reads what was summed since the last time.

        Returns:
            Summed loss in nats, answer tokens, and the last update's gradient norm; no tokens if
            there was no update.
        """
        values = tuple(self._window[name].item() for name in ("loss", "tokens", "norm"))
        self._window = {name: mx.array(0.0) for name in self._window}
        return values

    def all_finite(self) -> bool:
        """Whether every trained weight is a number, and whatever has been added up."""
        trees = [self._run.model.trainable_parameters()]
        if self._totals is not None:
            trees.append(self._totals.gradients)
        arrays = [array for tree in trees for _, array in tree_flatten(tree)]
        return mx.stack([mx.isfinite(array).all() for array in arrays]).all().item()

    def tensors(self) -> dict[str, mx.array]:
        """Everything but the adapter that the next step depends on, by flat names."""
        found = {OPTIMIZER: state_tensors(self._optimizer), WINDOW: self._window}
        if self._totals is not None:
            found[GRADIENTS] = self._ranks.sum(dict(tree_flatten(vars(self._totals))))
        if self._reconstructs:
            found[DECODER] = dict(tree_flatten(self._merged.decoder.parameters()))
        return {f"{part}.{n}": a for part, named in found.items() for n, a in named.items()}

    def _enter_phase(self, warming: bool, saved: dict[str, mx.array]) -> None:
        """Chooses what is trained and for what; each phase has an optimizer of its own."""
        run, config = self._run, self._config
        self._warming = warming
        self._reconstructs = warming and config.encoder_warmup_loss == RECONSTRUCTION
        unfreeze(run.model, run.tuning, encoder_only=warming)
        warmup.remove_decoder(self._merged)
        loss: Loss = partial(answer_loss if run.teacher is None else distill_loss, self.head)
        if self._reconstructs:
            warmup.add_decoder(self._merged)
            loss = warmup.reconstruction_loss
        run.model.train()
        self._optimizer = make_optimizer(config)
        load_state(self._optimizer, run.model, saved or None)
        self._stepper = Stepper(run.model, self._optimizer, loss, config.max_grad_norm, self._ranks)

    def _restore(self) -> None:
        """Goes on from the run's saved tensors, then forgets them."""
        run, state = self._run, self._run.state
        if decoder := _part(run, DECODER):
            self._merged.decoder.load_weights(list(decoder.items()))
        if window := _part(run, WINDOW):
            self._window = window
        # What several ranks had added up was saved as one sum.
        if (sums := _part(run, GRADIENTS)) and self._ranks.rank == 0:
            gradients = {n.removeprefix(f"{GRADIENTS}."): a for n, a in sums.items()}
            tree = refill(run.model.trainable_parameters(), gradients)
            self._totals = Totals(sums["loss"], sums["tokens"], tree)
        run.tensors = {}
        if state.rng:
            mx.random.seed((state.rng[0] << 32) | state.rng[1])


def _share(run: Run, ranks: Ranks) -> None:
    """Gives every rank the first one's weights, state and tensors: it alone has read a save."""
    first = ranks.rank == 0
    run.model.update(tree_map(ranks.share, run.model.trainable_parameters()))
    run.state = State.from_json(json.loads(ranks.share_text(json.dumps(asdict(run.state)))))
    kinds = {n: (a.shape, str(a.dtype).split(".")[-1]) for n, a in run.tensors.items()}
    for name, (shape, dtype) in json.loads(ranks.share_text(json.dumps(kinds))).items():
        mine = run.tensors[name] if first else mx.zeros(shape, getattr(mx, dtype))
        run.tensors[name] = ranks.share(mine)


def _part(run: Run, name: str) -> dict[str, mx.array]:
    start = f"{name}."
    return {n.removeprefix(start): a for n, a in run.tensors.items() if n.startswith(start)}
