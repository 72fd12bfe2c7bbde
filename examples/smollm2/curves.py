"""Draws what several text runs still diverge by over their work, so that encoders compare.

    python examples/smollm2/curves.py PICTURE "H = D=1:narrow.jsonl" "H = 12 D=1.2:wide.jsonl"

Each run is LABEL=WORK:LOG: what one of its iterations multiplies, as a multiple of the first run's,
and its ``training/log.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from kmerge_mlx.plots import COLOURS, MARKERS, check_plot, plain_ticks, write


def points(log: Path, work: float) -> list[tuple[float, float]]:
    """Iterations times work, and the divergence from the base there."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [(r["iteration"] * work, r["val_kl"]) for r in records if "val_kl" in r]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", metavar="LABEL=WORK:LOG")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    check_plot(args.picture)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for run, colour, marker in zip(args.runs, cycle(COLOURS), cycle(MARKERS)):
        label, _, rest = run.rpartition("=")
        work, _, log = rest.partition(":")
        found = zip(*points(Path(log), float(work)), strict=True)
        axes.plot(*found, label=label, color=colour, marker=marker, alpha=0.8)
    axes.set_title(args.title, fontsize="medium")
    axes.set_xlabel("iterations, times the work of one beside the first run's")
    axes.set_ylabel("validation: KL to the base (nats per answer token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    plain_ticks(axes.yaxis)
    write(figure, args.picture)


if __name__ == "__main__":
    main()
