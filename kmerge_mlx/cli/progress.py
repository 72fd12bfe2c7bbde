"""What a training run shows while it goes: bars where someone looks, lines for everyone.

Owns the wording of reports on stderr. Does not know how a run is made or trained.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kmerge_mlx.adapters.folder import carried_by
from kmerge_mlx.model import adapter_of
from kmerge_mlx.train.dataset import prompt_compression
from kmerge_mlx.train.loop import Watcher
from kmerge_mlx.train.session import Outcome
from kmerge_mlx.train.settings import TrainSettings
from kmerge_mlx.train.setup import Run

SECONDS_BETWEEN_LINES = 30
"""In a log file, work before training says how far it is."""
LITTLE = 1.05
"""A compression ratio below it is worth a word."""


def bars(quiet: bool) -> Callable[[str], Callable[[int, int], None]]:
    """Progress bars for the work before training.

    Args:
        quiet: Whether another machine shows it.

    Returns:
        A label to what is called with (work done, work in all).
    """

    return lambda label: _Bar(label, quiet)


class _Bar:
    """One piece of work: a bar on a terminal, and a line now and then where there is none."""

    def __init__(self, label: str, quiet: bool):
        self._label, self._quiet = label, quiet
        self._bar: Any = None
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._bar = self._bar or tqdm(total=total, desc=self._label, leave=False)
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._bar.close()
        elif time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(f"{self._label}: {done:,} of {total:,}", file=sys.stderr, flush=True)


class TrainingBar(Watcher):
    """A bar with loss, speed, memory and time left, and a line for every report.

    Args:
        run: What is trained.
    """

    def __init__(self, run: Run):
        self._run = run
        self._config: TrainSettings = run.config
        self._bar: Any = None
        self._valid: Any = None

    def begin(self) -> None:
        """Shows what is about to be trained, once nothing is left that could be refused."""
        self._say(_header(self._run))
        self._bar = tqdm(
            total=self._config.iters,
            initial=self._run.state.iteration,
            desc="Training",
            unit="it",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def on_iteration(self, iteration: int) -> None:
        self._bar.update(iteration - self._bar.n)

    def on_train_loss_report(self, train_info: dict) -> None:
        now = train_info
        self._bar.set_postfix_str(
            f"loss {now['train_loss']:.3f}, {now['tokens_per_second']:,.0f} tok/s, "
            f"{now['peak_memory']:.2f} GB",
            refresh=False,
        )
        self._say(
            f"Iter {now['iteration']}: Train loss {now['train_loss']:.3f}, "
            f"Learning Rate {now['learning_rate']:.3e}, "
            f"It/sec {now['iterations_per_second']:.3f}, "
            f"Tokens/sec {now['tokens_per_second']:.3f}, "
            f"Trained Tokens {now['trained_tokens']}, Peak mem {now['peak_memory']:.3f} GB"
        )

    def on_validation(self, done: int, total: int) -> None:
        if self._valid is None:
            hidden = not sys.stderr.isatty()
            self._valid = tqdm(total=total, desc="Validating", leave=False, disable=hidden)
        self._valid.update(done - self._valid.n)
        if done == total:
            self._valid.close()
            self._valid = None

    def on_val_loss_report(self, val_info: dict) -> None:
        now = val_info
        kl = f", KL to the base {now['val_kl']:.4f}" if "val_kl" in now else ""
        self._say(
            f"Iter {now['iteration']}: Val loss {now['val_loss']:.3f}{kl}, "
            f"Accuracy {now['val_accuracy']:.2%} "
            f"(balanced {now['val_balanced_accuracy']:.2%}), Val took {now['val_time']:.3f}s"
        )

    def on_stage(self, iteration: int, name: str) -> None:
        self._say(f"Iter {iteration}: stage {name} begins")

    def on_save(self, iteration: int) -> None:
        if iteration:
            self._say(f"Iter {iteration}: Saved to {self._config.adapter_path}")

    def close(self) -> None:
        """Takes the bars away."""
        if self._valid is not None:
            self._valid.close()
        self._bar.close()

    def _say(self, line: str) -> None:
        """Writes a line above the bar."""
        tqdm.write(line, file=sys.stderr)


def print_outcome(outcome: Outcome) -> None:
    """How a run ended, and what to do next, on stderr."""
    lines = []
    if outcome.interrupted:
        lines.append(f"Stopped at iteration {outcome.iteration}: --resume goes on from here")
    elif outcome.reason:
        lines.append(f"Ended at iteration {outcome.iteration}: {outcome.reason}")
    if outcome.best_path is not None:
        lines.append(
            f"Best validation {outcome.best_score:.4f} at iteration {outcome.best_iteration}: "
            f"{outcome.best_path}"
        )
    lines.append(f"Last weights: {outcome.path}")
    lines.append(
        f"Try them: kmerge-mlx generate --adapter-path {outcome.best_path or outcome.path}"
    )
    print("\n".join(lines), file=sys.stderr)


def _header(run: Run) -> str:
    """What is about to be trained, and on how much."""
    state = run.state
    if state.finished or state.iteration >= run.config.iters:
        more = "" if state.finished else ": a larger --iters goes on"
        return f"This run was over at iteration {state.iteration}{more}"
    adapter, stage = adapter_of(run.model, run.merge, run.tuning), run.stages[state.stage]
    encoder = sum(array.size for array in adapter.encoder_weights.values())
    tuned = [*adapter.tuning_weights.values(), *adapter.head_weights.values()]
    base = run.model.model_type if hasattr(run.model, "model_type") else "base"
    valid = "no validation set" if stage.valid is None else f"{len(stage.valid):,} to validate"
    skipped = f", {stage.train.bad:,} bad rows left out" if stage.train.bad else ""
    ratio = prompt_compression(stage.train, run.merge.merge_factor)
    prompts = f"prompts compressed {ratio:.2f}x"
    if run.merge.merge_factor > 1 and ratio < LITTLE:
        prompts += (
            "\nnote: next to nothing of them merges: mark what should with <merge>, lower "
            "--merge-threshold, or give --merges all"
        )
    if carried_by(Path(run.config.model)) is not None:
        prompts += f"\nnote: the adapter that {run.config.model} carries is not trained on"
    start = f"Resuming at iteration {state.iteration}" if state.rng else "Starting"
    if run.config.resume and not state.rng:
        start = f"{run.path} holds no run to resume: starting one"
    return (
        f"{start}: {base}, K={run.merge.merge_factor}, encoder {encoder / 1e6:.2f}M and "
        f"{run.config.fine_tune_type} {sum(a.size for a in tuned) / 1e6:.2f}M trainable\n"
        f"Data: {stage.name}, {len(stage.train):,} examples, {valid}{skipped}, {prompts}"
    )
