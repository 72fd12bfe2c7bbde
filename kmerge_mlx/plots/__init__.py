"""What pictures share: their colours, the check before any work, and how they are written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmerge_mlx.errors import PlotError, first_line
from kmerge_mlx.files import replacing_file
from kmerge_mlx.settings import check_output

SUFFIXES = (".png", ".svg", ".pdf")
# Colour-blind people can tell them apart (Okabe, Ito); the last is a purple in place of yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#6A3D9A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")


def check_plot(path: str | Path) -> None:
    """Refuses a picture that cannot be drawn, before any work is done.

    Raises PlotError if matplotlib is missing, or the file cannot be written or has no known format.
    """
    if find_spec("matplotlib") is None:
        raise PlotError("`plot` needs matplotlib: pip install 'kmerge-mlx[plot]'")
    check_output("plot", path, SUFFIXES, PlotError)


def plain_ticks(axis: Any) -> None:
    """Writes an axis' numbers out: neither powers of ten, nor an offset beside the axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(lambda *_: "")
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """A number as people write it: 1,500 or 0.00002."""
    whole, dot, rest = f"{value:,.10f}".partition(".")
    return (whole + dot + rest).rstrip("0").rstrip(".")


def write(figure: Any, path: str | Path) -> None:
    """Writes a whole picture, in the format that its name says, or none; raises PlotError."""
    try:
        with replacing_file(Path(path)) as new:
            figure.savefig(new, dpi=120)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise PlotError(f"cannot write `plot` {path}: {reason}") from error
