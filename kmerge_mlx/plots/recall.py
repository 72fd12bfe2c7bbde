"""Draws recall over the depth of the needle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kmerge_mlx.evaluation.report import Report
from kmerge_mlx.plots.common import APART, draw_scores, plain, write

ABREAST = 3  # panels
MOST_TICKS = 6  # more depths than that are not all written out


def draw_recall(report: Report, path: str | Path) -> None:
    """Draws recall over the needle's depth, a panel for each length and a line for each method.

    Raises:
        PlotError: The picture cannot be written.
    """
    from matplotlib.figure import Figure

    panels = report.depths
    rows, columns = -(-len(panels) // ABREAST), min(len(panels), ABREAST)
    figure = Figure(figsize=(1.4 + 4.4 * columns, 0.8 + 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (length, depths) in zip(grid.flat, panels.items(), strict=False):
        _draw_axes(axes, f"{length:,} tokens", sorted(depths.values()))
        for number, row in enumerate(report.measured):
            points = [(depth, row.scores[name]["recall"]) for name, depth in depths.items()]
            shift = APART * (number - (len(report.measured) - 1) / 2)
            draw_scores(axes, points, number, row.label, shift)
    for axes in grid[:, 0]:
        axes.set_ylabel("recall")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(report.measured), 2 + columns),
        frameon=False,
        fontsize="small",
    )
    write(figure, path)


def _draw_axes(axes: Any, title: str, depths: list[float]) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("where the needle lies in the prompt")
    axes.set_xlim(-0.1, 1.1)
    axes.set_ylim(-0.03, 1.03)
    if len(depths) <= MOST_TICKS:
        axes.set_xticks(depths)
    axes.xaxis.set_major_formatter(lambda depth, _: f"{100 * depth:.6g}%")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    plain(axes)
