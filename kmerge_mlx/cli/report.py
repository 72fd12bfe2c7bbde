"""What a benchmark says: its table, and the report of a machine that ``bench --report`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmerge_mlx.cli.output import figure, note, seconds, size
from kmerge_mlx.errors import SettingsError, first_line

if TYPE_CHECKING:
    from kmerge_mlx.tools.bench import Row

MARKDOWN, JSON = ".md", ".json"
PACKAGES = ("mlx", "mlx_lm", "kmerge_mlx")
GLOSSARY = {
    "K = 1": "plain mlx-lm on the whole prompt",
    "TTFT": "from token ids to the first token: with compressing, without tokenizing",
    "cold": "TTFT in the round that warms up: kernels are compiled, most of them in the first run "
    "of all, that of the largest K on the shortest prompt",
    "speed-up": "TTFT of K = 1 over this one, in each round",
    "/ floor": "TTFT over that of plain mlx-lm on as many plain tokens, in each round",
    "prompt tok/s": "original tokens over TTFT",
    "KV cache": "keys and values of the prompt's positions",
}
"""What the words of the table mean."""


def json_beside(path: str | Path) -> Path:
    """The file that holds a report as ``--json`` prints it."""
    return Path(path).with_suffix(JSON)


def lora(rank: int) -> str:
    """The LoRA that is measured without an adapter, in words."""
    return f"LoRA of rank {rank}" if rank else "no LoRA"


def of_rounds(settings: Mapping[str, Any]) -> str:
    """What each figure is of, in words."""
    trials = settings["num_trials"]
    found = f"median (lowest-highest) of {trials} rounds" if trials > 1 else "figure of 1 round"
    return f"{found} after one to warm up"


def versions(machine: Mapping[str, Any]) -> str:
    """The packages that were measured, in words."""
    return ", ".join(f"{name.replace('_', '-')} {machine[name]}" for name in PACKAGES)


def table(rows: Sequence[Row], spread: bool) -> list[tuple[str, ...]]:
    """The cells of the figures, the heads first; ``spread``: lowest and highest too."""
    heads = ("prompt", "K", "positions", "TTFT", "cold", "speed-up", "/ floor", "prompt tok/s")
    cells = [(*heads, "decode tok/s", "peak memory", "KV cache")]
    for row in rows:
        figures = row.figures
        prompt = (f"{row.length:,} tokens", str(row.k), f"{row.positions:,}")
        cold = type(figures.time_to_first_token).of([figures.cold_time_to_first_token])
        speeds = (
            seconds(figures.time_to_first_token, spread),
            seconds(cold, False),
            figure(row.speedup, "{:.2f}", spread, "x"),
            figure(row.overhead, "{:.3f}", spread),
            figure(figures.prompt_tps, "{:,.1f}", False),
            figure(figures.generation_tps, "{:,.1f}", spread),
        )
        cells.append((*prompt, *speeds, size(figures.peak_bytes.median), size(figures.kv_bytes)))
    return cells


def write_report(report: Mapping[str, Any], rows: Sequence[Row], path: str) -> None:
    """Writes a report as Markdown, and as JSON beside it, each whole or not at all."""
    from kmerge_mlx.files import replacing_file, write_json

    beside = json_beside(path)
    try:
        with replacing_file(Path(path)) as new:
            new.write_text(_markdown(report, rows, beside.name), encoding="utf-8")
        with replacing_file(beside) as new:
            write_json(new, report)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SettingsError(f"cannot write `report` {path}: {reason}") from error
    note(f"Written: {path} and {beside}")


def _markdown(report: Mapping[str, Any], rows: Sequence[Row], beside: str) -> str:
    machine, settings = report["machine"], report["settings"]
    spread = settings["num_trials"] > 1
    memory = size(machine["memory_bytes"])
    if machine["working_set_bytes"]:
        memory += f"; Metal recommends a working set of {size(machine['working_set_bytes'])}"
    merging = "nothing: K = 1 alone"
    if report["encoders"]:
        form = "K = {merge_factor}: {parameters:,} parameters in {dtype}".format_map
        merging = f"untrained encoders ({'; '.join(map(form, report['encoders']))}), "
        merging += lora(settings["lora_rank"])
    about = {
        "machine": f"{machine['processor']} ({machine['model']}, {machine['machine']})",
        "system": machine["system"],
        "memory": memory,
        "power": machine["power"],
        "backend": f"{machine['backend']} ({machine['device']}), MLX_ENABLE_TF32 {machine['tf32']}",
        "versions": f"{versions(machine)}, Python {machine['python']}",
        "model": f"{settings['shape']} in {machine['dtype']}, random weights made in memory",
        "merging": merging,
        "figures": f"{of_rounds(settings)}; {settings['generation_tokens']} tokens generated; "
        f"{settings['prefill_step_size']:,} positions prefilled at once; {settings['delay']} s of "
        f"rest before each run; seed {settings['seed']}",
    }
    heads, *lines = table(rows, spread)
    parts = [
        f"# kmerge-mlx bench: {settings['shape']}, {machine['dtype']}, {machine['processor']}",
        _grid(("", ""), about.items()),
        _grid(heads, lines),
        "\n".join(f"- {word}: {meaning}" for word, meaning in GLOSSARY.items()),
        f"All figures, of every round: {beside}",
    ]
    return "\n\n".join(parts) + "\n"


def _grid(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
