"""The training loop: steps, reports, validations, curriculum stages and saves until the run ends.

Everything that a later iteration depends on is in the run's ``State`` or in the engine's tensors,
so a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks

from kmerge_mlx.adapters.folder import Adapter
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.data.tasks import Progress, silent
from kmerge_mlx.errors import TrainError, first_line
from kmerge_mlx.model import adapter_of
from kmerge_mlx.train.checkpoint import append_log, cut_logs, save
from kmerge_mlx.train.loss import answer_logits, divergence
from kmerge_mlx.train.prepare import Run
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import Batch, Place, by_length, in_parts, shuffled
from kmerge_mlx.train.settings import TrainSettings
from kmerge_mlx.train.step import Engine


@dataclass(frozen=True)
class Figures:
    """What a validation measured.

    An answer is right if greedy decoding would write it, its end included. Balanced, each distinct
    answer weighs the same, so that always giving the most frequent one earns nothing.
    """

    loss: float  # nats, mean of an answer token
    accuracy: float
    balanced_accuracy: float
    kl: float | None = None  # from the teacher, nats, mean of an answer token

    @classmethod
    def mean(cls, figures: Collection[Figures]) -> Figures:
        """The mean over several K, each of which weighs the same."""
        columns = zip(*(vars(f).values() for f in figures), strict=True)
        return cls(*(None if None in c else sum(c) / len(c) for c in columns))

    def named(self, after: str = "") -> dict[str, float]:
        """The figures as mlx-lm names them: ``val_loss`` and so on, with ``after`` at the end."""
        return {f"val_{n}{after}": float(v) for n, v in vars(self).items() if v is not None}

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
        self._batches = [
            indices
            for batch in by_length(self._examples, batch_size, merge_factor)
            if (mine := batch[ranks.rank :: ranks.size])
            for indices, _ in in_parts(mine, [self._examples[i] for i in mine], merge_factor)
        ]
        answers = [str([*example.answer_ids]) for example in self._examples]
        self._kind = np.unique(answers, return_inverse=True)[1]  # a number for each distinct one

        @partial(mx.compile, inputs=[model.state])
        def measure(arrays: dict[str, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
            batch = Batch(**arrays)
            logits = answer_logits(model, batch).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, batch.targets)
            kl = mx.zeros((0,)) if batch.teacher_ids is None else divergence(logits, batch)
            return losses, mx.argmax(logits, axis=-1) == batch.targets, kl

        self._measure = measure

    def __call__(self, progress: Progress = silent) -> Figures:
        """Measures the model as it is now, without dropout; reports (batches done, in all)."""
        training = self._model.training
        self._model.eval()
        right = np.zeros(len(self._examples), np.float32)
        sums = np.zeros(4, np.float64)  # loss, divergence, tokens, whether there is a divergence
        for done, indices in enumerate(self._batches, 1):
            examples = [self._examples[i] for i in indices]
            losses, hits, kl = self._measure(self._make_batch(indices, examples).arrays())
            mx.eval(losses, hits, kl)
            lengths = [len(example.answer_ids) for example in examples]
            *ends, tokens = np.cumsum(lengths)
            right[indices] = [part.all() for part in np.split(np.array(hits)[:tokens], ends)]
            loss, kl_sum = (np.array(part, np.float64)[:tokens].sum() for part in (losses, kl))
            sums += (loss, kl_sum, tokens, kl.size)
            progress(done, len(self._batches))
        self._model.train(training)
        found = self._ranks.sum(mx.array(np.concatenate([right, sums]), mx.float32))
        right, (loss, kl, tokens, taught) = np.split(np.array(found, np.float64), [-4])
        of_kind = np.bincount(self._kind, right) / np.bincount(self._kind)
        return Figures(loss / tokens, right.mean(), of_kind.mean(), kl / tokens if taught else None)


def reporters(settings: TrainSettings) -> list[TrainingCallback]:
    """mlx-lm's callbacks for the services that ``report_to`` names."""
    if not settings.report_to:
        return []
    about = (settings.project_name, settings.adapter_path, settings.saved())
    try:
        return [get_reporting_callbacks(settings.report_to, *about)]
    except ImportError as error:
        raise TrainError(f"`report_to` {settings.report_to}: {first_line(error)}") from error


class Trainer:
    """Trains a run; set ``stop_requested`` to end it with a save after the present iteration.

    ``watchers`` are mlx-lm's callbacks, called on the first rank alone, and may also have
    ``on_iteration(iteration)``, ``on_validation(done, total)``, ``on_stage(record)`` and
    ``on_save(iteration)``.
    """

    def __init__(self, run: Run, watchers: Sequence[Any] = ()):
        self._run, self._settings, self._ranks = run, run.settings, run.ranks
        self._watchers = watchers if run.ranks.rank == 0 else ()
        self._engine = Engine(run)
        self._best: dict[int, Adapter] = {}
        self._saved = run.state.iteration
        self._stopping = self.stop_requested = False
        self._iterations, self._tokens, self._seconds = 0, 0, 0.0  # since the last report

    def train(self) -> None:
        """Runs to the end; the run's state says how far it came, and why it ended."""
        run, state = self._run, self._run.state
        try:
            self._begin()
            while not (state.finished or self._stopping or state.iteration >= self._settings.iters):
                self._iterate()
        except OSError as error:
            last = f"the save of iteration {self._saved} is whole"
            raise TrainError(f"cannot write {run.path}: {error.strerror}; {last}") from error

    def _begin(self) -> None:
        """Saves a new run before its first step; drops what a saved one logged after its save."""
        state = self._run.state
        self._enter_stage()
        if not state.rng:
            self._save()
        elif self._ranks.rank == 0:
            cut_logs(self._run.path, state)
        if state.iteration == 0 and self._validators:
            self._measure()

    def _enter_stage(self) -> None:
        """Opens a stage's data at the place where the run is."""
        run, settings = self._run, self._settings
        stage = self._stage = run.stages[run.state.stage]
        seed = (settings.seed % 2**32, run.state.stage)
        # By length at the smallest K, whatever K a batch has: the order follows from the place.
        k = settings.ks[0]
        self._rows = shuffled(stage.train, settings.batch_size, k, seed, run.state.place)
        self._validators = {}
        size = 0 if stage.valid is None else len(stage.valid)
        if settings.val_batches >= 0:
            size = min(size, settings.val_batches * settings.batch_size)
        if size:
            examples, b = [stage.valid[i] for i in range(size)], settings.batch_size
            for k in run.merges:
                make_batch = partial(self._engine.make_batch, split="valid", k=k)
                made = Validator(run.model, examples, b, k, make_batch, self._ranks)
                self._validators[k] = made

    def _iterate(self) -> None:
        settings, state, begin = self._settings, self._run.state, time.perf_counter()
        rows = next(self._rows)
        state.iteration += 1
        self._engine.step(rows)
        state.place = rows.place
        self._iterations += 1
        self._tokens += sum(example.num_tokens for example in rows.examples)
        if mx.get_cache_memory() > settings.cache_limit:
            mx.clear_cache()
        over = state.iteration == settings.iters
        reporting = state.iteration % settings.steps_per_report == 0 or over
        # The one place where training waits for the device.
        sums = self._engine.read_window() if reporting else (0.0, 0.0, 0.0)
        self._seconds += time.perf_counter() - begin
        if sums[1]:
            self._report(*sums)
        if self._validators and (state.iteration % settings.steps_per_eval == 0 or over):
            self._decide(self._measure())
        self._stopping = self.stop_requested
        if self._ranks.size > 1:  # several machines ask each other only now and then
            self._stopping = reporting and self._ranks.any(self.stop_requested)
        due = state.iteration % settings.save_every == 0 or over
        if due or state.finished or self._stopping:
            self._save()
        self._tell("on_iteration", state.iteration)

    def _report(self, total: float, tokens: float, norm: float) -> None:
        state, loss = self._run.state, total / tokens
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(f"the loss is {loss}, the gradient's norm {norm}")
        state.trained_tokens += int(tokens)
        record = {
            "train_loss": loss,
            "learning_rate": self._engine.learning_rate,
            "grad_norm": norm,
            "trained_tokens": state.trained_tokens,
        }
        timing = {
            "iterations_per_second": self._iterations / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._iterations, self._tokens, self._seconds = 0, 0, 0.0
        self._log("on_train_loss_report", record, timing)

    def _measure(self) -> Figures:
        """Validates each K, logs it, and keeps the best adapter by the mean over them."""
        state, begin, found = self._run.state, time.perf_counter(), {}
        for k, validator in self._validators.items():
            found[k] = validator(partial(self._tell, "on_validation"))
        figures = Figures.mean(found.values())
        if not math.isfinite(figures.score):
            self._diverged(f"the validation loss is {figures.score}")
        record = {"stage": self._stage.name, **figures.named()}
        if len(found) > 1:
            record |= {n: v for k, own in found.items() for n, v in own.named(f"_k{k}").items()}
        self._log("on_val_loss_report", record, {"val_time": time.perf_counter() - begin})
        state.stale += 1
        if state.best_score is None or figures.score < state.best_score:
            state.best_score, state.best_iteration, state.stale = figures.score, state.iteration, 0
            self._best = self._adapters()
        return figures

    def _decide(self, figures: Figures) -> None:
        """Ends a stage that has been learnt, or a run that no longer learns."""
        state, early, limit = self._run.state, self._settings.early_stop, self._stage.threshold
        if limit is not None and min(figures.accuracy, figures.balanced_accuracy) >= limit:
            if state.stage + 1 == len(self._run.stages):
                state.finished = f"{self._stage.name} reached its threshold of {limit:g}"
                return
            state.stage, state.place, state.stale = state.stage + 1, Place(), 0
            # The next stage is harder: its losses do not compare with those of this one.
            state.best_score, state.best_iteration, self._best = None, None, {}
            self._enter_stage()
            self._log("on_stage", {"begins": self._stage.name})
            # Measured at once, so that there is a best; the stage can end at the next validation.
            self._measure()
        elif early and state.stale >= early:
            state.finished = f"no better validation since iteration {state.best_iteration}"

    def _save(self) -> None:
        """Writes everything, if every weight is a number."""
        run, state = self._run, self._run.state
        if not self._engine.all_finite():
            self._diverged("a weight or a gradient is not a number any more")
        tensors = self._engine.tensors()
        state.rng = mx.random.state[0].tolist()
        if self._ranks.rank == 0:
            save(run, self._adapters(), tensors, self._best)
        self._best, self._saved = {}, state.iteration
        self._tell("on_save", state.iteration)

    def _adapters(self) -> dict[int, Adapter]:
        run = self._run
        return {k: adapter_of(run.model, merge, run.tuning) for k, merge in run.merges.items()}

    def _log(self, event: str, record: dict[str, Any], timing: dict[str, float] = {}) -> None:  # noqa: B006
        """Appends a record to the log, its timing to another, and tells the watchers both."""
        record = {"iteration": self._run.state.iteration} | record
        if self._ranks.rank == 0:
            append_log(self._run.path, record, timing)
        self._tell(event, record | timing)

    def _tell(self, event: str, *about: Any) -> None:
        for watcher in self._watchers:
            if hasattr(watcher, event):  # mlx-lm's own reporters know two of the events
                getattr(watcher, event)(*about)

    def _diverged(self, what: str) -> None:
        raise TrainError(
            f"training diverged: {what} at iteration {self._run.state.iteration}; the save of "
            f"iteration {self._saved} in {self._run.path} is whole: lower `learning_rate` or "
            "`max_grad_norm`"
        )
