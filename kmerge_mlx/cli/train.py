"""``kmerge-mlx train``: options made from ``TrainSettings``, a progress bar, and lines to read."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.train.settings import TrainSettings

if TYPE_CHECKING:
    from mlx_lm.tuner.callbacks import TrainingCallback

    from kmerge_mlx.train.loop import Trainer
    from kmerge_mlx.train.ranks import Ranks
    from kmerge_mlx.train.setup import Run


def _resumed(settings: TrainSettings) -> TrainSettings:
    """Of a run that is resumed, the saved settings where nobody named others."""
    from kmerge_mlx.train.ranks import Ranks

    return _saved(settings, Ranks()) if settings.resume else settings


def _saved(settings: TrainSettings, ranks: Ranks) -> TrainSettings:
    """The settings of the run that is resumed, which only the first rank can read."""
    from kmerge_mlx.train.session import saved_settings

    text = json.dumps(saved_settings(settings.adapter_path)) if ranks.rank == 0 else ""
    return settings.over(json.loads(ranks.share_text(text)))


@command(TrainSettings, config_file=True, to_print=_resumed)
def train(settings: TrainSettings) -> None:
    """Fine-tune a merge encoder and LoRA on a base model.

    Every setting may also stand in a YAML file (-c), by its flag's name with underscores, beside
    those that have no flag: lora_parameters, lr_schedule, optimizer_config, hf_dataset and the
    *_feature keys. A flag beats the file, and the file beats the default.

    \b
    Examples:
      kmerge-mlx train --model Qwen/Qwen2.5-0.5B --data ./data --k 4 --adapter-path ./out
      kmerge-mlx train --model ./base --task textualized-tree --k 4 --adapter-path ./out
      kmerge-mlx train -c config.yaml --adapter-path ./out --resume
    """
    if code := _run(settings):
        raise typer.Exit(code)


def _run(settings: TrainSettings) -> int:
    """Trains, and shows it."""
    from kmerge_mlx.cli import progress
    from kmerge_mlx.plots.common import check_plot
    from kmerge_mlx.plots.training import TrainingPlot
    from kmerge_mlx.train import session
    from kmerge_mlx.train.ranks import connect

    with connect(_print_error) as ranks, contextlib.ExitStack() as shown:
        if settings.resume:
            settings = _saved(settings, ranks)
        if settings.plot:
            check_plot(settings.plot)
        stopping, stopped_by = shown.enter_context(_signals())
        shown_bars: list[progress.TrainingBar] = []

        def watch(run: Run) -> list[TrainingCallback]:
            shown_bars.append(progress.TrainingBar(run))
            plots = [TrainingPlot(run.path, settings.plot)] if settings.plot else []
            return [*shown_bars, *plots]

        def started(trainer: Trainer) -> None:
            for bar in shown_bars:
                bar.begin()
                shown.callback(bar.close)
            stopping(trainer)

        bars = progress.bars(quiet=ranks.rank != 0)
        outcome = session.train(settings, bars, watch, ranks, started)
        shown.close()
        if ranks.rank == 0:
            progress.print_outcome(outcome)
    # Of several machines only those that were told know which signal it was.
    return 128 + (*stopped_by, signal.SIGINT)[0] if outcome.interrupted else 0


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals() -> Iterator[tuple[Callable[[Trainer], None], list[int]]]:
    """Lets Ctrl-C and kill end a run with a save; a second Ctrl-C ends it at once.

    Yields:
        What to give the trainer to, and the signals that came.
    """
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def watch(trainer: Trainer) -> None:
        def stop(number: int, frame: Any) -> None:
            trainer.stop_requested = True
            came.append(number)
            signal.signal(number, signal.default_int_handler)
            # The terminal has written ^C where the bar is.
            print("\nstopping after this iteration (again: at once)", file=sys.stderr)

        for number in kept:
            signal.signal(number, stop)

    try:
        yield watch, came
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
