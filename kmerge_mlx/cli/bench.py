"""``kmerge-mlx bench``."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmerge_mlx import __version__
from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.tables import aligned, size
from kmerge_mlx.config import GenerationConfig
from kmerge_mlx.errors import AdapterError

if TYPE_CHECKING:
    from kmerge_mlx.adapters.folder import Adapter
    from kmerge_mlx.tools.bench import BenchmarkConfig, Row, Side, Spread

K = 4
LENGTHS = (512, 2048)


def bench(
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            "--merge-factor",
            min=1,
            help="Merge factor K; give it again for another. 1 is plain mlx-lm, which is measured "
            f"in any case. Default: all that --adapter-path holds; without one, {K}.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            min=1,
            help="Tokens of the prompt; give it again for another. Default: "
            f"{' and '.join(map(str, LENGTHS))}.",
            show_default=False,
        ),
    ] = None,
    num_trials: Annotated[
        int,
        typer.Option("--num-trials", "-n", min=1, help="Rounds, after one that warms up."),
    ] = 3,
    generation_tokens: Annotated[
        int, typer.Option("--generation-tokens", "-g", min=1, help="Tokens generated in each run.")
    ] = 16,
    prefill_step_size: opt.PrefillStepSize = GenerationConfig.prefill_step_size,
    delay: Annotated[
        int, typer.Option("--delay", min=0, max=3600, help="Seconds of rest before each run.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random prompts.")] = 0,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.Json = False,
    plot: opt.Plot = None,
) -> None:
    """Measure speed and memory against plain mlx-lm, side by side.

    Prompts are random token ids. Plain mlx-lm is the base model without an adapter. Without
    --adapter-path the encoder is untrained, of the right size: that costs as much as a trained one.

    \b
    Examples:
      kmerge-mlx bench --model Qwen/Qwen2.5-0.5B
      kmerge-mlx bench --model M --k 2 --k 4 --k 8 --length 512 --length 8192 --plot speed.png
      kmerge-mlx bench --adapter-path A -n 5 -g 64 --json
    """
    # The heavy imports wait until the command line is known to be good.
    from kmerge_mlx.plots.common import check_plot

    if plot:
        check_plot(plot)
    model, adapter_path = opt.chosen(model, adapter_path)

    from kmerge_mlx.cli.output import bars
    from kmerge_mlx.tools import bench as benchmark

    lengths = tuple(sorted(set(length or LENGTHS)))
    config = benchmark.BenchmarkConfig(
        lengths, num_trials, generation_tokens, prefill_step_size, seed, delay
    )
    adapters = _adapters(adapter_path, k)
    # On Metal mlx-lm prints a warning about large models.
    with contextlib.redirect_stdout(sys.stderr):
        sides = benchmark.load_sides(model, adapters, lengths, trust_remote_code=trust_remote_code)
        encoders = _encoders(sides)
        if encoders and adapter_path is None:
            _note_untrained(encoders)
        rows = benchmark.measure(sides, config, bars(quiet=False)("Positions read"))
    report = {
        "machine": _machine(sides[0]),
        "settings": {"model": model, "adapter_path": adapter_path, **asdict(config)},
        "encoders": encoders,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(report, ensure_ascii=False) if as_json else _text(report, rows, config))
    if plot:
        from kmerge_mlx.plots.speed import draw_speed

        draw_speed(rows, _backend(report["machine"]), plot)


def _adapters(path: str | None, ks: Sequence[int] | None) -> dict[int, Adapter | None]:
    """What is measured beside plain mlx-lm, by merge factor."""
    if path is None:
        return {k: None for k in ks or (K,) if k > 1}
    from kmerge_mlx.adapters.folder import find_adapters, load_adapter

    found = {k: load_adapter(path, k) for k in ks or find_adapters(path) if k > 1}
    if not found:
        raise AdapterError(
            "K = 1 is plain mlx-lm, which reads no adapter: leave --adapter-path out, or choose "
            "one with a larger K"
        )
    return found


def _encoders(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The sizes of the encoders."""
    from kmerge_mlx.base import dtype_name

    return [
        {
            **side.embedding.encoder.config.to_json(),
            "parameters": side.embedding.encoder.config.num_parameters,
            "dtype": dtype_name(side.embedding.encoder.w3.bias.dtype),
        }
        for side in sides
        if side.embedding is not None
    ]


def _note_untrained(encoders: Sequence[Mapping[str, Any]]) -> None:
    sizes = ", ".join(
        f"K={e['merge_factor']}: {e['parameters'] / 1e6:.1f}M {e['dtype']}" for e in encoders
    )
    print(
        "note: no --adapter-path, so the encoders are untrained, of their default sizes "
        f"({sizes}), and there is no LoRA",
        file=sys.stderr,
    )


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


def _text(report: Mapping[str, Any], rows: Sequence[Row], config: BenchmarkConfig) -> str:
    """The report for people: where, what, a table, and what its words mean."""
    machine, settings = report["machine"], report["settings"]
    adapter = "untrained encoders, no LoRA" if report["encoders"] else "no adapter"
    if settings["adapter_path"]:
        adapter = f"adapter {settings['adapter_path']}"
    rounds = f"{config.num_trials} round{'s' if config.num_trials > 1 else ''}"
    figure = "median (lowest-highest)" if config.num_trials > 1 else "figure"
    lines = [
        f"{_backend(machine)}; mlx {machine['mlx']}, mlx-lm {machine['mlx_lm']}, "
        f"kmerge-mlx {machine['kmerge_mlx']}",
        f"{settings['model']}, {adapter}; {figure} of {rounds} after one to warm up, "
        f"{config.generation_tokens} tokens generated",
        "",
        _table(rows, config.num_trials > 1),
        "",
        "K = 1         plain mlx-lm on the whole prompt",
        "TTFT          from token ids to the first token: with compressing, without tokenizing",
        "speed-up      TTFT of K = 1 over this one, in each round",
        "/ floor       TTFT over that of plain mlx-lm on as many ordinary tokens, in each round",
        "prompt tok/s  original tokens over TTFT",
        "KV cache      keys and values of the prompt's positions",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Row], spread: bool) -> str:
    heads = ("prompt", "K", "positions", "TTFT", "speed-up", "/ floor", "prompt tok/s")
    cells = [(*heads, "decode tok/s", "peak memory", "KV cache")]
    for row in rows:
        figures = row.figures
        cells.append(
            (
                f"{row.length:,} tokens",
                str(row.k),
                f"{row.positions:,}",
                _seconds(figures.time_to_first_token, spread),
                _figure(row.speedup, "{:.2f}", spread, "x"),
                _figure(row.overhead, "{:.3f}", spread),
                _figure(figures.prompt_tps, "{:,.1f}", False),
                _figure(figures.generation_tps, "{:,.1f}", spread),
                size(figures.peak_bytes.median),
                size(figures.kv_bytes),
            )
        )
    return aligned(cells)


def _figure(value: Spread | None, form: str, spread: bool, unit: str = "") -> str:
    """A median, and how far the rounds were apart."""
    if value is None:
        return "-"
    ends = f" ({form.format(value.min)}-{form.format(value.max)})" if spread else ""
    return f"{form.format(value.median)}{unit}{ends}"


def _seconds(value: Spread, spread: bool) -> str:
    if value.median >= 1:
        return _figure(value, "{:.2f}", spread, " s")
    trials = tuple(1e3 * trial for trial in value.trials)
    return _figure(type(value).of(trials), "{:.1f}", spread, " ms")
