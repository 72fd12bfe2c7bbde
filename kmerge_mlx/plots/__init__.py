"""Pictures: colours, points with their intervals, legends and writing, which all of them share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kmerge_mlx.errors import PlotError, first_line
from kmerge_mlx.files import replacing_file

if TYPE_CHECKING:
    from kmerge_mlx.evaluation.report import Score

SUFFIXES = (".png", ".svg", ".pdf")
# Colour-blind people can tell them apart (Okabe, Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
APART = 5.0  # 1/72 inch between points of one place, so that their error bars can be seen


def check_plot(path: str | Path) -> None:
    """Refuses a picture that cannot be drawn, before any work is done.

    Raises PlotError if matplotlib is missing, or the file cannot be written or has no known format.
    """
    if find_spec("matplotlib") is None:
        raise PlotError("`plot` needs matplotlib: pip install 'kmerge-mlx[plot]'")
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"`plot` is {path}, expected a name that ends with {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise PlotError(f"`plot` is {path}, but there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PlotError(f"`plot` is {path}, which cannot be written: name another file")


def draw_scores(
    axes: Any, points: Sequence[tuple[float, Score]], number: int, name: str, shift: float
) -> None:
    """Draws scores (place along the axis and score of each, in order) and their intervals.

    The axes' limits are set before. ``number`` chooses colour and marker, and points are drawn
    ``shift`` 1/72 inch beside their place.
    """
    from matplotlib.transforms import ScaledTranslation

    colour = COLOURS[number % len(COLOURS)]
    place = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    axes.plot(
        [x for x, _ in points],
        [score.value for _, score in points],
        color=colour,
        marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linestyle="-" if len(points) > 1 else "none",
        linewidth=1.2,
        transform=place,
        zorder=3,
        label=name,
    )
    known = [(x, score.low, score.high) for x, score in points if score.low is not None]
    x, *ends = np.array(known).reshape(-1, 3).T
    low, high = np.clip(ends, *axes.get_ylim())  # one may be infinite
    # Bars around the middle, because a bootstrap's interval need not include the value.
    style = {"ecolor": colour, "elinewidth": 1.2, "capsize": 2.5, "transform": place, "zorder": 2}
    axes.errorbar(x, (low + high) / 2, yerr=(high - low) / 2, fmt="none", **style)


def outside_legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], panels: int) -> None:
    """One legend for all panels, below them."""
    style = {"frameon": False, "fontsize": "small"}
    columns = min(len(labels), 2 + panels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


def plain(axes: Any) -> None:
    """Draws a light grid, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def write(figure: Any, path: str | Path) -> None:
    """Writes a whole picture, in the format that its name says, or none; raises PlotError."""
    try:
        with replacing_file(Path(path)) as new:
            figure.savefig(new, dpi=120)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise PlotError(f"cannot write `plot` {path}: {reason}") from error
