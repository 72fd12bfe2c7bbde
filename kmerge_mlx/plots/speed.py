"""Draws a benchmark: time to first token and KV cache over the prompt's length, for each K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmerge_mlx.plots import COLOURS, MARKERS, plain, plain_ticks, write

if TYPE_CHECKING:
    from kmerge_mlx.tools.bench import Row

Spread = tuple[Sequence[float], Sequence[float]] | None
"""How far the lowest and the highest measurement are from each value."""


def draw_speed(rows: Sequence[Row], title: str, path: str | Path) -> None:
    """Draws lines over the prompt's length, or bars where there is only one length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    times, caches = figure.subplots(1, 2)
    draw = _bars if len({row.length for row in rows}) == 1 else _lines
    seconds = [row.figures.time_to_first_token for row in rows]
    low, high = [s.median - s.min for s in seconds], [s.max - s.median for s in seconds]
    draw(times, rows, [s.median for s in seconds], (low, high))
    draw(caches, rows, [row.figures.kv_bytes / 1e6 for row in rows], None)
    times.set_ylabel("time to first token (s)")
    caches.set_ylabel("KV cache of the prompt (MB)")
    figure.suptitle(title, fontsize="medium")
    write(figure, path)


def _name(k: int) -> str:
    return "plain mlx-lm" if k == 1 else f"K = {k}"


def _lines(axes: Any, rows: Sequence[Row], values: Sequence[float], spread: Spread) -> None:
    """A line for each K."""
    lengths = sorted({row.length for row in rows})
    for number, k in enumerate(sorted({row.k for row in rows})):
        mine = [i for i, row in enumerate(rows) if row.k == k]
        axes.errorbar(
            [rows[i].length for i in mine],
            [values[i] for i in mine],
            None if spread is None else [[side[i] for i in mine] for side in spread],
            label=_name(k),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            capsize=3,
        )
    axes.set_xscale("log")
    if max(values) > 5 * min(values):  # on a narrow range a log axis has no readable ticks
        axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.tick_params(axis="x", rotation=45 if len(lengths) > 5 else 0)
    axes.minorticks_off()
    axes.set_xlabel("prompt (tokens)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _bars(axes: Any, rows: Sequence[Row], values: Sequence[float], spread: Spread) -> None:
    """A bar for each K, with its figure on top."""
    names = [_name(row.k).replace(" mlx", "\nmlx") for row in rows]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(rows))]
    bars = axes.bar(names, values, yerr=spread, color=colours, capsize=4)
    figures = [plain(float(f"{value:.3g}")) for value in values]
    axes.bar_label(bars, figures, padding=2, fontsize="small")
    plain_ticks(axes.yaxis)
    axes.margins(y=0.1)
    axes.set_xlabel(f"prompt of {rows[0].length:,} tokens")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
