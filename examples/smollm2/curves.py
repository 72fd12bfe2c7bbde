"""Draws validations of several runs over their work, so that encoders of different cost compare.

    python examples/smollm2/curves.py PICTURE "H = D=1:narrow.jsonl" "H = 12 D=1.2:wide.jsonl"

Each run is LABEL=WORK:LOG: what one of its iterations multiplies, as a multiple of the first run's,
and its ``training/log.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from kmerge_mlx.plots import COLOURS, MARKERS, check_plot, plain_ticks, write


def points(log: Path, work: float) -> list[tuple[float, float]]:
    """Iterations times work, and the divergence from the base there, else the loss."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    found = {r["iteration"]: r.get("val_kl", r["val_loss"]) for r in records if "val_loss" in r}
    return [(iteration * work, value) for iteration, value in sorted(found.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", metavar="LABEL=WORK:LOG")
    parser.add_argument("--title", default="")
    parser.add_argument("--value", default="validation: KL to the base (nats per answer token)")
    args = parser.parse_args()
    check_plot(args.picture)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(args.runs):
        label, _, rest = run.rpartition("=")
        work, _, log = rest.partition(":")
        style = {"color": COLOURS[number % 8], "marker": MARKERS[number % 8], "alpha": 0.8}
        axes.plot(*zip(*points(Path(log), float(work)), strict=True), label=label, **style)
    axes.set_title(args.title, fontsize="medium")
    axes.set_xlabel("iterations, times the work of one beside the first run's")
    axes.set_ylabel(args.value)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    plain_ticks(axes.yaxis)
    write(figure, args.picture)


if __name__ == "__main__":
    main()
