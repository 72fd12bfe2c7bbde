"""``kmerge-mlx bench``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmerge_mlx.cli.convert import ConvertSettings
from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import aligned, bar, note, print_json, wrapped
from kmerge_mlx.cli.report import (
    GLOSSARY,
    JSON,
    MARKDOWN,
    json_beside,
    lora,
    of_rounds,
    table,
    versions,
    write_report,
)
from kmerge_mlx.errors import AdapterError, SettingsError
from kmerge_mlx.settings import CacheSettings, ModelSettings, check_output, option
from kmerge_mlx.tools.shapes import SHAPES

if TYPE_CHECKING:
    import mlx.nn as nn

    from kmerge_mlx.source import Source
    from kmerge_mlx.tools.bench import Row
    from kmerge_mlx.tools.random_base import RandomBase
    from kmerge_mlx.virtual_tokens import MergedEmbedding

K, LORA_RANK, DTYPE = 4, 4, "bfloat16"
GENERATED, OF_A_REPORT = 16, 128  # tokens


@dataclass(frozen=True)
class BenchSettings(ModelSettings):
    """What to measure."""

    NAME = "bench"

    k: tuple[int, ...] = ModelSettings.setting(
        "k",
        default=(),
        help="Merge factor K, or several such as 2,4,8. 1 is plain mlx-lm, which is measured in "
        f"any case. Default: all that --adapter-path holds; without one, {K}.",
        many=True,
    )
    shape: str | None = option(
        None,
        str,
        "Measure random weights of the shape of this base, made in memory, instead of a --model.",
        choices=tuple(SHAPES),
    )
    dtype: str | None = ConvertSettings.setting(
        "dtype", help=f"Of the weights of --shape. Default: {DTYPE}."
    )
    length: tuple[int, ...] = option(
        (512, 2048), int, "Tokens of the prompt; give it again for another.", low=1, many=True
    )
    num_trials: int = option(
        3, int, "Rounds, after one that warms up.", low=1, flags=("--num-trials", "-n")
    )
    generation_tokens: int | None = option(
        None,
        int,
        f"Tokens generated in each run. Default: {GENERATED}; with --report {OF_A_REPORT}, the "
        "fewest there.",
        low=1,
        flags=("--generation-tokens", "-g"),
    )
    lora_rank: int = option(
        LORA_RANK, int, "Rank of the untrained LoRA without --adapter-path; 0 leaves it out.", low=0
    )
    prefill_step_size: int = CacheSettings.setting("prefill_step_size")
    delay: int = option(0, int, "Seconds of rest before each run.", low=0, high=3600)
    seed: int = option(0, int, "Seed of the random prompts.")
    as_json: bool = option(False, bool, "Print one JSON object on stdout.", flags=("--json",))
    plot: str | None = option(None, str, "Draw a picture into this file (.png, .svg, .pdf).")
    report: str | None = option(
        None,
        str,
        "Write a report of --shape on this machine into this file (.md), and the --json beside it. "
        "It names no user, host or folder.",
    )

    def clashes(self) -> list[str]:
        """What is wrong with settings that are good alone, one line each."""
        named = self.model or self.adapter_path
        few = self.report and self.tokens < OF_A_REPORT
        rules = {
            "`shape` is a base with random weights: leave `model` and `adapter_path` out": (
                self.shape and named
            ),
            "`dtype` is of the weights of a `shape`: leave it out": self.dtype and not self.shape,
            f"`report` is of a `shape` ({', '.join(SHAPES)}): give one": (
                self.report and not self.shape
            ),
            f"`generation_tokens` is {self.generation_tokens}, expected at least {OF_A_REPORT} for "
            "a `report`": few,
        }
        return [text for text, broken in rules.items() if broken]

    @property
    def tokens(self) -> int:
        """Tokens generated in each run."""
        return self.generation_tokens or (OF_A_REPORT if self.report else GENERATED)


@command(BenchSettings)
def bench(settings: BenchSettings) -> None:
    """Measure speed and memory against plain mlx-lm, side by side.

    Prompts are random token ids. Plain mlx-lm is the base model without an adapter. Without
    --adapter-path the encoder and LoRA are untrained, of the right sizes: they cost as much as
    trained ones.

    \b
    Examples:
      kmerge-mlx bench --model Qwen/Qwen2.5-0.5B
      kmerge-mlx bench --model M --k 2 --k 4 --k 8 --length 512 --length 8192 --plot speed.png
      kmerge-mlx bench --adapter-path A -n 5 -g 64 --json
      kmerge-mlx bench --shape qwen2.5-0.5b --report mac.md
    """
    _check_files(settings)

    from kmerge_mlx.tools import bench as benchmark
    from kmerge_mlx.tools.machine import describe_machine

    source, merged = _sources(settings)
    named = _named(settings, source)
    shared = ("num_trials", "prefill_step_size", "seed", "delay")
    how = {name: getattr(settings, name) for name in shared}
    how |= {"generation_tokens": settings.tokens}
    config = benchmark.BenchmarkConfig(tuple(sorted(set(settings.length))), **how)
    # On Metal mlx-lm prints a warning about large models.
    with contextlib.redirect_stdout(sys.stderr):
        sides = benchmark.load_sides(source, merged, config.lengths, settings.lora_rank)
        encoders = [_encoder(side.embedding) for side in sides if side.embedding is not None]
        if encoders and named["adapter_path"] is None:
            form = "K={merge_factor}: {parameters:,} {dtype}".format_map
            note(
                "note: no --adapter-path, so the encoders are untrained, of their default sizes "
                f"({', '.join(map(form, encoders))}), with {lora(settings.lora_rank)}"
            )
        rows = benchmark.measure(sides, config, bar("Positions read"))
    report = {
        "machine": describe_machine() | {"dtype": _dtype(sides[0].llm)},
        "settings": named | asdict(config),
        "encoders": encoders,
        "rows": [asdict(row) for row in rows],
    }
    print_json(report) if settings.as_json else print(_text(report, rows))
    if settings.plot:
        from kmerge_mlx.plots.speed import draw_speed

        draw_speed(rows, _backend(report["machine"]), settings.plot)
    if settings.report:
        write_report(report, rows, settings.report)


def _check_files(settings: BenchSettings) -> None:
    """Refuses what could not be written when the work is done, or would replace a file."""
    if settings.plot:
        from kmerge_mlx.plots import check_plot

        check_plot(settings.plot)
    if settings.report:
        files = {MARKDOWN: settings.report, JSON: json_beside(settings.report)}
        for suffix, path in files.items():
            check_output("report", path, [suffix])
        for path in files.values():
            if Path(path).exists():
                raise SettingsError(
                    f"`report`: {path} is there already: name another, or remove it"
                )


def _sources(
    settings: BenchSettings,
) -> tuple[Source | RandomBase, dict[int, Source | None]]:
    """The base, and what is measured beside it, by merge factor."""
    from kmerge_mlx.source import Source
    from kmerge_mlx.tools.random_base import RandomBase

    untrained = {k: None for k in settings.k or (K,) if k > 1}
    if name := settings.shape:
        return RandomBase(name, SHAPES[name], settings.dtype or DTYPE), untrained
    named = (settings.model, settings.adapter_path)
    (base,) = Source.find_all(*named, (1,), settings.trust_remote_code)
    if base.adapter_path is None:
        return base, untrained
    found = Source.find_all(*named, settings.k, settings.trust_remote_code)
    merged: dict[int, Any] = {one.k: one for one in found if one.k > 1}
    if not merged:
        raise AdapterError(
            "K = 1 is plain mlx-lm, which reads no adapter: leave `adapter_path` out, or choose "
            "one with a larger K"
        )
    return base, merged


def _named(settings: BenchSettings, source: Source | RandomBase) -> dict[str, Any]:
    """What is measured, by the names of the settings that choose it."""
    if settings.shape:
        found = {"shape": settings.shape, "model": None, "adapter_path": None}
    else:
        found = {"model": source.model, "adapter_path": source.adapter_path}
    return found | {"lora_rank": None if found["adapter_path"] else settings.lora_rank}


def _encoder(embedding: MergedEmbedding) -> dict[str, Any]:
    """The sizes of an encoder."""
    from kmerge_mlx.base import dtype_name

    encoder = embedding.encoder
    about = {"parameters": encoder.num_parameters, "dtype": dtype_name(encoder.dtype)}
    return encoder.config.to_json() | about


def _dtype(llm: nn.Module) -> str:
    """The dtype that a base computes in: that of its embeddings."""
    import mlx.core as mx

    from kmerge_mlx.base import dtype_name, find_embedding

    _, looked_up = find_embedding(llm, "the base model")
    return dtype_name(looked_up(mx.array([0])).dtype)


def _backend(machine: Mapping[str, str]) -> str:
    """Where it ran, in words."""
    return (
        f"MLX's {machine['backend']} backend, {machine['processor']} ({machine['machine']}), "
        f"{machine['dtype']}"
    )


def _text(report: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The report for people: where, what, a table, and what its words mean."""
    settings = report["settings"]
    adapter = "no adapter"
    if report["encoders"]:
        adapter = f"untrained encoders, {lora(settings['lora_rank'])}"
    if settings["adapter_path"]:
        adapter = f"adapter {settings['adapter_path']}"
    where = f"{_backend(report['machine'])}; {versions(report['machine'])}"
    what = f"{settings.get('shape') or settings['model']}, {adapter}; {of_rounds(settings)}, "
    what += f"{settings['generation_tokens']} tokens generated"
    words = "\n".join(f"{word:<12}  {meaning}" for word, meaning in GLOSSARY.items())
    return f"""\
{wrapped(where)}
{wrapped(what)}

{aligned(table(rows, settings["num_trials"] > 1), 2)}

{words}"""
