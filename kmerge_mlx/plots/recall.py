"""The picture of recall: is a needle found, wherever in the prompt it lies?

Owns what is drawn, and how. Does not know models or scores: it is given named lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kmerge_mlx.plots.common import APART, Point, draw_points, write

ABREAST = 3  # panels
MOST_TICKS = 6  # more depths than that are not written out


def draw_recall(panels: Mapping[str, Mapping[str, Sequence[Point]]], path: str | Path) -> None:
    """Draws recall over the needle's depth, a panel for each length and a line for each method.

    Args:
        panels: Depth from 0 to 1 and recall, in order of depth, by the panel's title, then by the
            method's name.
        path: The picture; its name says which format.

    Raises:
        PlotError: It cannot be written.
    """
    from matplotlib.figure import Figure

    columns = min(len(panels), ABREAST)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.4 + 4.4 * columns, 0.8 + 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        _draw_axes(axes, title, sorted({depth for line in lines.values() for depth, *_ in line}))
        for name, line in lines.items():
            number = names.index(name)
            draw_points(axes, line, number, name, APART * (number - (len(names) - 1) / 2))
    for axes in grid[:, 0]:
        axes.set_ylabel("recall")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(names), 2 + columns),
        frameon=False,
        fontsize="small",
    )
    write(figure, path)


def _draw_axes(axes: Any, title: str, depths: Sequence[float]) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("where the needle lies in the prompt")
    axes.set_xlim(-0.1, 1.1)
    axes.set_ylim(-0.03, 1.03)
    if len(depths) <= MOST_TICKS:
        axes.set_xticks(depths)
    axes.xaxis.set_major_formatter(lambda depth, _: f"{100 * depth:.6g}%")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
