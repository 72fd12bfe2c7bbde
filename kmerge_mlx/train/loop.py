"""The loop: steps, reports, validations, stages and saves, until the run is over.

Owns what happens when. Everything a later iteration depends on is in :class:`State`, or in the
tensors of the engine, so a run that was killed goes on to the same bits. Does not print: whoever
watches does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.tuner.callbacks import TrainingCallback

from kmerge_mlx.adapters.folder import Adapter
from kmerge_mlx.errors import TrainError
from kmerge_mlx.model import adapter_of
from kmerge_mlx.train.checkpoint import TRAINING, save
from kmerge_mlx.train.engine import Engine
from kmerge_mlx.train.log import RunLog
from kmerge_mlx.train.order import Place, shuffled
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.setup import Run
from kmerge_mlx.train.validate import Figures, Validator


class Watcher(TrainingCallback):
    """What a run tells as it goes: mlx-lm's two callbacks, and these."""

    def on_iteration(self, iteration: int) -> None:
        """After every iteration."""

    def on_validation(self, done: int, total: int) -> None:
        """During a validation: batches done, batches in all."""

    def on_stage(self, iteration: int, name: str) -> None:
        """When a stage of the curriculum begins."""

    def on_save(self, iteration: int) -> None:
        """After every save."""


@dataclass
class Clock:
    """Time, tokens and iterations since the last report; validations and saves do not count.

    Args:
        tokens: Original tokens of prompts and answers.
        iterations: How many.
        seconds: What had passed when it was last stopped.
        since: When it was last started.
    """

    tokens: int = 0
    iterations: int = 0
    seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def stop(self) -> None:
        """Adds up what has passed since it was started."""
        self.seconds += time.perf_counter() - self.since

    def start(self) -> None:
        """Starts it again."""
        self.since = time.perf_counter()


class Trainer:
    """Trains a run.

    Args:
        run: From ``setup.prepare``.
        watchers: Told what happens.
        ranks: The machines.
        keep: Further files that every save keeps in ``training/``, by name.

    Attributes:
        stop_requested: Set it to end the run with a save after the iteration at hand.
    """

    def __init__(
        self,
        run: Run,
        watchers: Sequence[TrainingCallback],
        ranks: Ranks,
        keep: Mapping[str, bytes] | None = None,
    ):
        self._run, self._config, self._ranks = run, run.config, ranks
        self._watchers = watchers if ranks.rank == 0 else ()
        self._ours = [watcher for watcher in self._watchers if isinstance(watcher, Watcher)]
        self._keep = keep
        self._log = RunLog(run.path / TRAINING)
        self._engine = Engine(run, ranks)
        self._best: Adapter | None = None
        self._clock = Clock()
        self._stopping = self.stop_requested = False

    def train(self) -> str | None:
        """Runs to the end.

        Returns:
            Why it ended before ``iters``, or None.

        Raises:
            TrainError: The loss or a weight is no longer finite (nothing of that is saved), or
                something could not be written (the last save is whole).
        """
        state = self._run.state
        try:
            self._begin()
            while state.finished is None and state.iteration < self._config.iters:
                self._iterate()
                if self._stopping:
                    break
        except OSError as error:
            last = f"the save of iteration {self._saved} is whole"
            raise TrainError(f"cannot write {self._run.path}: {error.strerror}; {last}") from error
        return state.finished

    def _begin(self) -> None:
        """Makes a new run be there before its first step, and a saved one stand where it stood."""
        state = self._run.state
        self._saved = state.iteration
        self._enter_stage()
        if not state.rng:
            self._save()
        elif self._ranks.rank == 0:
            self._log.cut(state.log)
        if state.iteration == 0:
            self._validate()
        self._clock = Clock()

    def _enter_stage(self) -> None:
        """Opens a stage's data where the run stands in it."""
        run, config, engine = self._run, self._config, self._engine
        number, k = run.state.stage, run.merge.merge_factor
        stage = self._stage = run.stages[number]
        seed = (config.seed % 2**32, number)
        self._rows = shuffled(stage.train, config.batch_size, k, seed, run.state.place)
        self._validator = None
        if stage.valid is not None:
            size = len(stage.valid)
            if config.val_batches >= 0:
                size = min(size, config.val_batches * config.batch_size)
            if size:
                examples = [stage.valid[i] for i in range(size)]
                self._validator = Validator(
                    *(run.model, engine.head, examples, config.batch_size, k),
                    make_batch=partial(engine.make_batch, split="valid"),
                    ranks=self._ranks,
                )

    def _iterate(self) -> None:
        config, state, clock = self._config, self._run.state, self._clock
        rows = next(self._rows)
        state.iteration += 1
        self._engine.step(rows, state.iteration)
        state.place = rows.place
        clock.iterations += 1
        clock.tokens += sum(example.num_tokens for example in rows.examples)
        if mx.get_cache_memory() > config.cache_limit:
            mx.clear_cache()
        over = state.iteration == config.iters
        if state.iteration % config.steps_per_report == 0 or over:
            self._report()
        clock = self._clock
        clock.stop()
        if state.iteration % config.steps_per_eval == 0 or over:
            self._validate()
        self._stopping = self._is_stopping(over)
        due = state.iteration % config.save_every == 0
        if due or over or state.finished or self._stopping:
            self._save()
        clock.start()
        for watcher in self._ours:
            watcher.on_iteration(state.iteration)

    def _is_stopping(self, over: bool) -> bool:
        """Whether to stop here; several machines ask each other only now and then."""
        if self._ranks.size == 1:
            return self.stop_requested
        due = over or self._run.state.iteration % self._config.steps_per_report == 0
        return due and self._ranks.any(self.stop_requested)

    def _report(self) -> None:
        """Reads the loss off the device: the one place where training waits for it."""
        state, clock = self._run.state, self._clock
        total, tokens, norm = self._engine.read_window()
        if not tokens:
            return  # no update since the last one
        loss = total / tokens
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(f"the loss is {loss}, the gradient's norm {norm}")
        clock.stop()
        state.trained_tokens += int(tokens)
        record = {
            "iteration": state.iteration,
            "train_loss": loss,
            "learning_rate": self._engine.learning_rate,
            "grad_norm": norm,
            "trained_tokens": state.trained_tokens,
        }
        timing = {
            "iterations_per_second": clock.iterations / clock.seconds,
            "tokens_per_second": clock.tokens / clock.seconds,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._clock = Clock()
        self._write(record, timing)
        for watcher in self._watchers:
            watcher.on_train_loss_report(record | timing)

    def _validate(self) -> None:
        """Measures, and decides whether a stage or the run is over."""
        if self._validator is None:
            return
        figures = self._measure(self._validator)
        if self._run.state.iteration:
            self._decide(figures)

    def _measure(self, validator: Validator) -> Figures:
        """Measures, tells, and remembers the best."""
        state, begin = self._run.state, time.perf_counter()

        def progress(done: int, total: int) -> None:
            for watcher in self._ours:
                watcher.on_validation(done, total)

        figures = validator(progress)
        if not math.isfinite(figures.score):
            self._diverged(f"the validation loss is {figures.score}")
        record = {"iteration": state.iteration, "stage": self._stage.name, **figures.named()}
        timing = {"val_time": time.perf_counter() - begin}
        self._write(record, timing)
        for watcher in self._watchers:
            watcher.on_val_loss_report(record | timing)
        state.stale += 1
        if state.best_score is None or figures.score < state.best_score:
            state.best_score, state.best_iteration, state.stale = figures.score, state.iteration, 0
            self._best = self._adapter()
        return figures

    def _decide(self, figures: Figures) -> None:
        """Whether a stage has been learnt, or learning has stopped."""
        state, config, limit = self._run.state, self._config, self._stage.threshold
        if limit is not None and min(figures.accuracy, figures.balanced_accuracy) >= limit:
            if state.stage + 1 == len(self._run.stages):
                state.finished = f"{self._stage.name} reached its threshold of {limit:g}"
                return
            state.stage, state.place, state.stale = state.stage + 1, Place(), 0
            # The next stage is harder: its losses do not compare with this one's.
            state.best_score = state.best_iteration = self._best = None
            self._enter_stage()
            self._write({"iteration": state.iteration, "begins": self._stage.name})
            for watcher in self._ours:
                watcher.on_stage(state.iteration, self._stage.name)
            # There is a best from the first; the stage itself lasts until the next validation.
            self._measure(self._validator)
        elif config.early_stop and state.stale >= config.early_stop:
            state.finished = f"no better validation since iteration {state.best_iteration}"

    def _save(self) -> None:
        """Writes everything, if every weight is a number."""
        run, state = self._run, self._run.state
        if not self._engine.all_finite():
            self._diverged("a weight or a gradient is not a number any more")
        tensors = self._engine.tensors()
        state.rng = mx.random.state[0].tolist()
        if self._ranks.rank == 0:
            save(run.path, self._adapter(), state, run.identity, tensors, self._best, self._keep)
        self._best, self._saved = None, state.iteration
        for watcher in self._ours:
            watcher.on_save(state.iteration)

    def _adapter(self) -> Adapter:
        return adapter_of(self._run.model, self._run.merge, self._run.tuning)

    def _write(self, record: dict[str, Any], timing: dict[str, Any] | None = None) -> None:
        if self._ranks.rank == 0:
            self._log.write(record, timing)

    def _diverged(self, what: str) -> None:
        raise TrainError(
            f"training diverged: {what} at iteration {self._run.state.iteration}; the save of "
            f"iteration {self._saved} in {self._run.path} is whole: lower --learning-rate or "
            "--max-grad-norm"
        )
