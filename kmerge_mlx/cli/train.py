"""``kmerge-mlx train``, and what it shows: a progress bar, and lines to read."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import bar, note, on_signals, wrapped
from kmerge_mlx.errors import TrainError
from kmerge_mlx.train.settings import TrainSettings

if TYPE_CHECKING:
    from kmerge_mlx.train.prepare import Run
    from kmerge_mlx.train.ranks import Ranks

BAR = "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""All of it fits into 80 columns."""
LITTLE = 1.05  # compression ratio of the prompts below which a note says what to do


def _resumed(settings: TrainSettings, ranks: Ranks | None = None) -> TrainSettings:
    """For ``--resume``, the saved settings in the place of those that nobody named."""
    from kmerge_mlx.train.checkpoint import saved_settings

    first = ranks is None or ranks.rank == 0  # it alone has the folder
    saved = saved_settings(Path(settings.adapter_path)) if settings.resume and first else {}
    return settings.over(ranks.share_json(saved) if ranks else saved)


@command(TrainSettings, config_file=True, to_print=_resumed)
def train(settings: TrainSettings) -> None:
    """Fine-tune a merge encoder and LoRA on a base model.

    Every setting may also be in a YAML file (-c), by its flag's name with underscores, beside
    those that have no flag: lora_parameters, lr_schedule, optimizer_config, hf_dataset and the
    *_feature keys. A flag beats the file, and the file beats the default.

    \b
    Examples:
      kmerge-mlx train --model Qwen/Qwen2.5-0.5B --data ./data --k 4 --adapter-path ./out
      kmerge-mlx train --model ./base --task textualized-tree --k 4 --adapter-path ./out
      kmerge-mlx train -c config.yaml --adapter-path ./out --resume
    """
    from kmerge_mlx.files import alone
    from kmerge_mlx.train.ranks import connect

    ranks = connect()
    path = Path(settings.adapter_path)
    # The first machine alone reads and writes the folder, and until it ends no other run does.
    with alone(path, TrainError) if ranks.rank == 0 else contextlib.nullcontext():
        _train(settings, ranks)


def _train(settings: TrainSettings, ranks: Ranks) -> None:
    """Trains, and says how it ended."""
    from kmerge_mlx.adapters.folder import carried_by, look_up
    from kmerge_mlx.plots import check_plot
    from kmerge_mlx.train.loop import Trainer, reporters
    from kmerge_mlx.train.prepare import prepare

    first, settings = ranks.rank == 0, _resumed(settings, ranks)
    if settings.plot:
        check_plot(settings.plot)
    carried = carried_by(Path(settings.model)) if first and settings.model is not None else None
    if carried is not None:
        said = "adapter that {} carries is not trained on"
        if look_up(carried).choose()[1].has_window:
            said = "window encoder that {} carries is not trained: a new one of K-Token Merging is"
        note(wrapped("note: the " + said.format(settings.model)))
    run = prepare(settings, bar if first else (lambda label: lambda done, total: None), ranks)
    watchers = [TrainingBar(run), *reporters(settings)] if first else []
    trainer = Trainer(run, watchers)
    came: list[int] = []

    def stop(number: int) -> None:
        trainer.stop_requested = True
        came.append(number)
        signal.signal(number, signal.default_int_handler)
        # The terminal has written ^C where the bar is.
        note("\nstopping after this iteration (again: at once)")

    with on_signals(stop), watchers[0] if first else contextlib.nullcontext():
        trainer.train()
    interrupted = run.state.finished is None and run.state.iteration < settings.iters
    if first:
        _print_outcome(run, interrupted)
    if interrupted:  # of several machines only those that got the signal know which one it was
        raise typer.Exit(128 + (*came, signal.SIGINT)[0])


class TrainingBar:
    """A bar with loss, speed, memory and time left, and a line for every report of a run."""

    def __init__(self, run: Run):
        self._run = run
        self._validating: Callable[[int, int], None] | None = None

    def __enter__(self) -> None:
        from tqdm import tqdm

        note(_header(self._run))
        done, total = self._run.state.iteration, self._run.settings.iters
        more = {"bar_format": BAR, "dynamic_ncols": True, "disable": None}
        self._bar = tqdm(desc="Training", total=total, initial=done, **more)

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def on_iteration(self, iteration: int) -> None:
        self._bar.update(iteration - self._bar.n)

    def on_train_loss_report(self, now: dict[str, Any]) -> None:
        loss, speed, memory = (now[n] for n in ("train_loss", "tokens_per_second", "peak_memory"))
        postfix = f"loss {loss:.2f}, {speed:,.0f} tok/s, {memory:.1f} GB"
        self._bar.set_postfix_str(postfix, refresh=False)
        told = (
            f"Iter {now['iteration']}: Train loss {loss:.3f}, Learning Rate "
            f"{now['learning_rate']:.3e}, It/sec {now['iterations_per_second']:.3f}, Tokens/sec "
            f"{speed:.3f}, Trained Tokens {now['trained_tokens']}, Peak mem {memory:.3f} GB"
        )
        note(wrapped(told))

    def on_validation(self, done: int, total: int) -> None:
        self._validating = self._validating or bar("Validating")
        self._validating(done, total)
        if done == total:
            self._validating = None

    def on_val_loss_report(self, now: dict[str, Any]) -> None:
        kl = f", KL to the base {now['val_kl']:.4f}" if "val_kl" in now else ""
        names = {k: f"val_loss_k{k}" for k in self._run.merges}
        each = [f"K={k} {now[name]:.3f}" for k, name in names.items() if name in now]
        each = f" ({', '.join(each)})" if each else ""
        told = (
            f"Iter {now['iteration']}: Val loss {now['val_loss']:.3f}{each}{kl}, "
            f"Accuracy {now['val_accuracy']:.2%} "
            f"(balanced {now['val_balanced_accuracy']:.2%}), Val took {now['val_time']:.3f}s"
        )
        note(wrapped(told))

    def on_stage(self, now: dict[str, Any]) -> None:
        note(f"Iter {now['iteration']}: stage {now['begins']} begins")

    def on_save(self, iteration: int) -> None:
        if iteration:
            note(f"Iter {iteration}: Saved to {self._run.settings.adapter_path}")
            if plot := self._run.settings.plot:
                from kmerge_mlx.plots.training import draw_training

                draw_training([self._run.path], plot)


def _print_outcome(run: Run, interrupted: bool) -> None:
    """How a run ended, and what to do next, on stderr."""
    from kmerge_mlx.train.checkpoint import BEST

    state, best, lines = run.state, run.path, [f"Last weights: {run.path}"]
    if state.best_iteration is not None:
        best, score = run.path / BEST, f"{state.best_score:.4f}"
        lines.insert(0, f"Best validation {score} at iteration {state.best_iteration}: {best}")
    if interrupted:
        lines.insert(0, f"Stopped at iteration {state.iteration}: --resume goes on from here")
    elif state.finished:
        lines.insert(0, f"Ended at iteration {state.iteration}: {state.finished}")
    command = ["kmerge-mlx", "generate", "--model", run.settings.model, "--adapter-path", best]
    if len(ks := run.settings.ks) > 1:
        command += ["--k", next(k for k in ks if k > 1)]  # as serve takes it
    command += ["--trust-remote-code"] * run.settings.trust_remote_code
    # A FILE merges, and `-` is one: the line does something as it is, in any shell.
    lines += [
        "Try them:",
        f"echo Some text of your own to read | {shlex.join(map(str, command))} -",
    ]
    note("\n".join(lines))


def _header(run: Run) -> str:
    """What is about to be trained, and on how much."""
    from kmerge_mlx.model import adapter_of
    from kmerge_mlx.train.dataset import prompt_compression

    state, settings, ks = run.state, run.settings, run.settings.ks
    if state.finished or state.iteration >= settings.iters:
        more = "" if state.finished else ": a larger --iters goes on"
        return f"This run was over at iteration {state.iteration}{more}"
    start = f"Resuming at iteration {state.iteration}" if state.rng else "Starting"
    if settings.resume and not state.rng:
        start = f"{run.path} holds no run to resume: starting one"
    adapters = [adapter_of(run.model, merge, run.tuning) for merge in run.merges.values()]
    adapter, stage = adapters[0], run.stages[state.stage]
    encoder = sum(array.size for a in adapters for array in a.encoder_weights.values()) / 1e6
    tuned = [*adapter.tuning_weights.values(), *adapter.head_weights.values()]
    tuned = f"{settings.fine_tune_type} {sum(array.size for array in tuned) / 1e6:.2f}M"
    valid = "no validation set" if stage.valid is None else f"{len(stage.valid):,} to validate"
    skipped = f", {stage.train.bad:,} bad rows left out" if stage.train.bad else ""
    ratios = [prompt_compression(stage.train, k) for k in ks]
    kind, factors = getattr(run.model, "model_type", "base"), ",".join(map(str, ks))
    encoders = f"encoder{'s' * (len(ks) > 1)} {encoder:.2f}M"
    lines = [
        f"{start}: {kind}, K={factors}, {encoders} and {tuned} trainable",
        f"Data: {stage.name}, {len(stage.train):,} examples, {valid}{skipped}, prompts compressed "
        f"{', '.join(f'{ratio:.2f}x' for ratio in ratios)}",
    ]
    if ks[-1] > 1 and ratios[-1] < LITTLE:
        lines.append(
            "note: next to nothing of them merges: mark what should with <merge>, lower "
            "--merge-threshold, or give --merges all"
        )
    return "\n".join(map(wrapped, lines))
