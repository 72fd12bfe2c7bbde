"""``kmerge-mlx train``: options made from ``TrainConfig``, a progress bar, and lines to read."""

from __future__ import annotations

import contextlib
import inspect
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmerge_mlx.errors import TrainError
from kmerge_mlx.settings import SIZE, option_of
from kmerge_mlx.train.settings import TrainConfig, from_layers

if TYPE_CHECKING:
    from mlx_lm.tuner.callbacks import TrainingCallback

    from kmerge_mlx.train.loop import Trainer
    from kmerge_mlx.train.ranks import Ranks
    from kmerge_mlx.train.setup import Run

# What the command line reads for each kind; a list is text with commas.
_TYPES = {int: int, float: float, str: str, bool: bool, SIZE: str, list: str}


def train(config: str | None, print_config: bool, **given: Any) -> None:
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
    flags = {name: _read(name, value) for name, value in given.items() if value is not None}
    file = {} if config is None else _read_yaml(config)
    # The heavy imports wait until the command line is known to be good.
    settings = from_layers(file, flags)
    if print_config and settings.resume:
        from kmerge_mlx.train.ranks import Ranks

        settings = _saved(settings, file, flags, Ranks())
    if print_config:
        print(_as_yaml(settings), end="")
    elif code := _run(settings, file, flags):
        raise typer.Exit(code)


def _saved(
    settings: TrainConfig, file: dict[str, Any], flags: dict[str, Any], ranks: Ranks
) -> TrainConfig:
    """The settings of the run that is resumed, which only the first rank can read."""
    from kmerge_mlx.train.session import saved_settings

    first = ranks.rank == 0
    text = json.dumps(saved_settings(settings.adapter_path)) if first else ""
    return from_layers(json.loads(ranks.share_text(text)), file, flags)


def _run(settings: TrainConfig, file: dict[str, Any], flags: dict[str, Any]) -> int:
    """Trains, and shows it."""
    from kmerge_mlx.cli import progress
    from kmerge_mlx.plots.common import check_plot
    from kmerge_mlx.plots.training import TrainingPlot
    from kmerge_mlx.train import session
    from kmerge_mlx.train.ranks import connect

    with connect(_print_error) as ranks, contextlib.ExitStack() as shown:
        if settings.resume:
            settings = _saved(settings, file, flags, ranks)
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


def _parameter(field: Field) -> inspect.Parameter:
    """The command line's view of a setting; None means that the flag was not given."""
    option, name = option_of(field), field.name.replace("_", "-")
    kind = _TYPES[option.kind]
    names = [f"--{name}", *option.flags]
    default = field.default if isinstance(field.default, int | float | str) else None
    shown = "" if default in (None, False, 0) else f" Default: {default}."
    info = typer.Option(
        *names,
        help=option.help + shown,
        show_default=False,
        rich_help_panel=option.group,
        # Not a choice of Typer's: the settings' own check says more, for YAML too.
        metavar=f"<{'|'.join(option.choices)}>" if option.choices else None,
        **({"min": option.low, "max": option.high} if kind in (int, float) else {}),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _signature() -> inspect.Signature:
    config = typer.Option("-c", "--config", help="A YAML file with settings.", show_default=False)
    show = typer.Option("--print-config", help="Print the settings as YAML, and train nothing.")
    ours = [f for f in fields(TrainConfig) if not option_of(f).yaml_only]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(
                "config", keyword, default=None, annotation=Annotated[str | None, config]
            ),
            *map(_parameter, ours),
            inspect.Parameter(
                "print_config", keyword, default=False, annotation=Annotated[bool, show]
            ),
        ]
    )


train.__signature__ = _signature()
train.__annotations__ = {n: p.annotation for n, p in train.__signature__.parameters.items()}


def _read(name: str, value: Any) -> Any:
    """A flag's value as the settings hold it."""
    if name == "curriculum":
        return [part.strip() for part in value.split(",") if part.strip()]
    if name == "clear_cache_threshold" and value.isdecimal():
        return int(value)
    return value


def _read_yaml(path: str) -> dict[str, Any]:
    """The settings in a file, numbers such as 1e-5 read as mlx-lm reads them."""
    import yaml
    from mlx_lm.lora import yaml_loader

    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            found = yaml.load(file, yaml_loader)
    except OSError as error:
        raise TrainError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise TrainError(f"--config {path} is not YAML: {reason[:200]}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise TrainError(f"--config {path} holds no settings, expected lines of `name: value`")
    return found


def _as_yaml(settings: TrainConfig) -> str:
    """The settings as :func:`_read_yaml` reads them: text that looks like a number is quoted."""
    import yaml
    from mlx_lm.lora import yaml_loader

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers = yaml_loader.yaml_implicit_resolvers

    plain = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True)


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
