"""Draws a validation value of several runs over their work or rows, so that the runs compare.

    python examples/smollm2/curves.py PICTURE "H = D=1:narrow.jsonl" "H = 12 D=1.2:wide.jsonl"

Each run is LABEL=STEP:LOG or LABEL=STEP:LOG:VALUE: how far one of its iterations goes to the right
(say what it multiplies, as a multiple of the first run's), its ``training/log.jsonl``, and what is
drawn of it (``val_loss_k2``; if left out, ``val_kl``).
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from kmerge_mlx.plots import COLOURS, MARKERS, check_plot, plain_ticks, write


def points(log: Path, step: float, value: str = "val_kl") -> list[tuple[float, float]]:
    """Iterations times the step, and the value there (``val_kl``: divergence from the base)."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [(r["iteration"] * step, r[value]) for r in records if value in r]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", metavar="LABEL=STEP:LOG[:VALUE]")
    parser.add_argument("--title", default="")
    parser.add_argument("--x", default="iterations, times the work of one beside the first run's")
    parser.add_argument("--y", default="validation: KL to the base (nats per answer token)")
    parser.add_argument("--ylim", nargs=2, type=float, metavar=("LOW", "HIGH"))
    args = parser.parse_args()
    check_plot(args.picture)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for run, colour, marker in zip(args.runs, cycle(COLOURS), cycle(MARKERS)):
        label, _, rest = run.rpartition("=")
        step, log, *value = rest.split(":")
        found = zip(*points(Path(log), float(step), *value), strict=True)
        axes.plot(*found, label=label, color=colour, marker=marker, alpha=0.8)
    axes.set_title(args.title, fontsize="medium")
    axes.set_xlabel(args.x)
    axes.set_ylabel(args.y)
    axes.set_ylim(args.ylim)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    plain_ticks(axes.yaxis)
    write(figure, args.picture)


if __name__ == "__main__":
    main()
