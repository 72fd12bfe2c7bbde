"""What every picture needs: colours, which file names there may be, and writing it whole.

Owns the style. Does not know what is drawn.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kmerge_mlx.errors import PlotError, first_line

SUFFIXES = (".png", ".svg", ".pdf")
# Told apart by everyone (Okabe, Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def check_plot(path: str | Path) -> None:
    """Refuses a picture that cannot be drawn, before any work is done.

    Raises:
        PlotError: No matplotlib, or a name that says no format.
    """
    if find_spec("matplotlib") is None:
        raise PlotError("--plot needs matplotlib: pip install 'kmerge-mlx[plot]'")
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"--plot is {path}, expected a name that ends with {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise PlotError(f"--plot is {path}, but there is no folder {path.parent}")


def write(figure: Any, path: str | Path) -> None:
    """Writes a picture under a temporary name and renames it.

    Args:
        figure: matplotlib's.
        path: The picture; its name says which format.

    Raises:
        PlotError: It cannot be written.
    """
    path = Path(path)
    new = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(new, dpi=120)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise PlotError(
            f"cannot write --plot {path}: {error.strerror or first_line(error)}"
        ) from error
