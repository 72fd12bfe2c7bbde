"""``kmerge-mlx bench``."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kmerge_mlx import __version__
from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import (
    aligned,
    bar,
    figure,
    note,
    print_json,
    seconds,
    size,
    wrapped,
)
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.settings import CacheSettings, ModelSettings, option

if TYPE_CHECKING:
    from kmerge_mlx.source import Source
    from kmerge_mlx.tools.bench import Row, Side
    from kmerge_mlx.virtual_tokens import MergedEmbedding

K, LORA_RANK = 4, 4
PACKAGES = ("mlx", "mlx_lm", "kmerge_mlx")


@dataclass(frozen=True)
class BenchSettings(ModelSettings):
    """What to measure."""

    NAME = "bench"

    k: tuple[int, ...] = ModelSettings.setting(
        "k",
        default=(),
        help="Merge factor K; give it again for another. 1 is plain mlx-lm, which is measured in "
        f"any case. Default: all that --adapter-path holds; without one, {K}.",
        many=True,
    )
    length: tuple[int, ...] = option(
        (512, 2048), int, "Tokens of the prompt; give it again for another.", low=1, many=True
    )
    num_trials: int = option(
        3, int, "Rounds, after one that warms up.", low=1, flags=("--num-trials", "-n")
    )
    generation_tokens: int = option(
        16, int, "Tokens generated in each run.", low=1, flags=("--generation-tokens", "-g")
    )
    lora_rank: int = option(
        LORA_RANK, int, "Rank of the untrained LoRA without --adapter-path; 0 leaves it out.", low=0
    )
    prefill_step_size: int = CacheSettings.setting("prefill_step_size")
    delay: int = option(0, int, "Seconds of rest before each run.", low=0, high=3600)
    seed: int = option(0, int, "Seed of the random prompts.")
    as_json: bool = option(False, bool, "Print one JSON object on stdout.", flags=("--json",))
    plot: str | None = option(None, str, "Draw a picture into this file (.png, .svg, .pdf).")


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
    """
    if settings.plot:
        from kmerge_mlx.plots import check_plot

        check_plot(settings.plot)

    from kmerge_mlx.tools import bench as benchmark

    source, merged = _sources(settings)
    shared = ("num_trials", "generation_tokens", "prefill_step_size", "seed", "delay")
    how = {name: getattr(settings, name) for name in shared}
    config = benchmark.BenchmarkConfig(tuple(sorted(set(settings.length))), **how)
    # On Metal mlx-lm prints a warning about large models.
    with contextlib.redirect_stdout(sys.stderr):
        sides = benchmark.load_sides(source, merged, config.lengths, settings.lora_rank)
        encoders = [_encoder(side.embedding) for side in sides if side.embedding is not None]
        if encoders and source.adapter_path is None:
            form = "K={merge_factor}: {parameters:,} {dtype}".format_map
            note(
                "note: no --adapter-path, so the encoders are untrained, of their default sizes "
                f"({', '.join(map(form, encoders))}), with {_lora(settings.lora_rank)}"
            )
        rows = benchmark.measure(sides, config, bar("Positions read"))
    report = {
        "machine": _machine(sides[0]),
        "settings": {
            **{name: getattr(source, name) for name in ("model", "adapter_path")},
            "lora_rank": None if source.adapter_path else settings.lora_rank,
            **asdict(config),
        },
        "encoders": encoders,
        "rows": [asdict(row) for row in rows],
    }
    print_json(report) if settings.as_json else print(_text(report, rows))
    if settings.plot:
        from kmerge_mlx.plots.speed import draw_speed

        draw_speed(rows, _backend(report["machine"]), settings.plot)


def _sources(settings: BenchSettings) -> tuple[Source, dict[int, Source | None]]:
    """The base, and what is measured beside it, by merge factor."""
    from kmerge_mlx.source import Source

    named = (settings.model, settings.adapter_path)
    (base,) = Source.find_all(*named, (1,), settings.trust_remote_code)
    if base.adapter_path is None:
        return base, {k: None for k in settings.k or (K,) if k > 1}
    found = Source.find_all(*named, settings.k, settings.trust_remote_code)
    merged: dict[int, Any] = {one.k: one for one in found if one.k > 1}
    if not merged:
        raise AdapterError(
            "K = 1 is plain mlx-lm, which reads no adapter: leave `adapter_path` out, or choose "
            "one with a larger K"
        )
    return base, merged


def _encoder(embedding: MergedEmbedding) -> dict[str, Any]:
    """The sizes of an encoder."""
    from kmerge_mlx.base import dtype_name

    encoder = embedding.encoder
    about = {"parameters": encoder.num_parameters, "dtype": dtype_name(encoder.dtype)}
    return encoder.config.to_json() | about


def _lora(rank: int) -> str:
    return f"LoRA of rank {rank}" if rank else "no LoRA"


def _machine(reference: Side) -> dict[str, str]:
    """Where it ran, and with what."""
    import mlx.core as mx
    import mlx_lm

    from kmerge_mlx.base import dtype_name, find_embedding

    device = mx.default_device()
    gpu = "Metal" if mx.metal.is_available() else "CUDA"
    _, table = find_embedding(reference.llm, "the base model")
    return {
        "backend": "CPU" if device == mx.Device(mx.cpu) else gpu,
        "device": str(device),
        "machine": platform.machine(),
        "processor": str(mx.device_info(device).get("device_name", "unknown")),
        "dtype": dtype_name(table(mx.array([0])).dtype),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "kmerge_mlx": __version__,
    }


def _backend(machine: Mapping[str, str]) -> str:
    """Where it ran, in words."""
    return (
        f"MLX's {machine['backend']} backend, {machine['processor']} ({machine['machine']}), "
        f"{machine['dtype']}"
    )


def _text(report: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The report for people: where, what, a table, and what its words mean."""
    machine, settings = report["machine"], report["settings"]
    adapter = "no adapter"
    if report["encoders"]:
        adapter = f"untrained encoders, {_lora(settings['lora_rank'])}"
    if settings["adapter_path"]:
        adapter = f"adapter {settings['adapter_path']}"
    rounds, trials = "figure of 1 round", settings["num_trials"]
    if spread := trials > 1:
        rounds = f"median (lowest-highest) of {trials} rounds"
    versions = (f"{name.replace('_', '-')} {machine[name]}" for name in PACKAGES)
    where = f"{_backend(machine)}; {', '.join(versions)}"
    what = f"{settings['model']}, {adapter}; {rounds} after one to warm up, "
    what += f"{settings['generation_tokens']} tokens generated"
    return f"""\
{wrapped(where)}
{wrapped(what)}

{_table(rows, spread)}

K = 1         plain mlx-lm on the whole prompt
TTFT          from token ids to the first token: with compressing, without tokenizing
speed-up      TTFT of K = 1 over this one, in each round
/ floor       TTFT over that of plain mlx-lm on as many plain tokens, in each round
prompt tok/s  original tokens over TTFT
KV cache      keys and values of the prompt's positions"""


def _table(rows: Sequence[Row], spread: bool) -> str:
    heads = ("prompt", "K", "positions", "TTFT", "speed-up", "/ floor", "prompt tok/s")
    cells = [(*heads, "decode tok/s", "peak memory", "KV cache")]
    for row in rows:
        figures = row.figures
        prompt = (f"{row.length:,} tokens", str(row.k), f"{row.positions:,}")
        speeds = (
            seconds(figures.time_to_first_token, spread),
            figure(row.speedup, "{:.2f}", spread, "x"),
            figure(row.overhead, "{:.3f}", spread),
            figure(figures.prompt_tps, "{:,.1f}", False),
            figure(figures.generation_tps, "{:,.1f}", spread),
        )
        cells.append((*prompt, *speeds, size(figures.peak_bytes.median), size(figures.kv_bytes)))
    return aligned(cells, 2)
