"""Draws the picture of a training run from its log."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from kmerge_mlx.plots import COLOURS, plain_ticks, write
from kmerge_mlx.train.checkpoint import TRAINING, read_log

STYLES = (":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
"""The lines of the Ks of a run for several."""


def draw_training(runs: Sequence[Path], path: str | Path, labels: Sequence[str] = ()) -> None:
    """Draws loss and accuracy over the iterations, of one run or of several to compare."""
    from matplotlib.figure import Figure

    logs = [list(read_log(run / TRAINING)) for run in runs]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    for number, log in enumerate(logs):
        colour = COLOURS[number % len(COLOURS)]
        label = f"{labels[number]}: " if labels else ""
        _line(losses, log, "train_loss", f"{label}training", color=colour, alpha=0.35)
        _line(losses, log, "val_loss", f"{label}validation", color=colour)
        _line(losses, log, "val_kl", f"{label}KL to the base", color=colour, linestyle="--")
        _line(accuracies, log, "val_accuracy", f"{label}accuracy", color=colour)
        for name, text, axes in (
            ("val_loss", "", losses),
            ("val_accuracy", "accuracy, ", accuracies),
        ):
            each = {n for record in log for n in record if n.startswith(f"{name}_k")}
            ks = sorted(int(n.removeprefix(f"{name}_k")) for n in each)
            # A colour is a run's, unless there is one alone.
            shades = cycle(COLOURS[1:] if len(logs) == 1 else [colour])
            for k, style, shade in zip(ks, cycle(STYLES), shades):
                named = f"{label}{text}K={k}"
                _line(axes, log, f"{name}_k{k}", named, color=shade, linestyle=style, alpha=0.8)
        measured = [r for r in log if {"val_accuracy", "val_balanced_accuracy"} <= r.keys()]
        if any(abs(r["val_accuracy"] - r["val_balanced_accuracy"]) > 1e-3 for r in measured):
            balanced = f"{label}balanced accuracy"
            _line(accuracies, log, "val_balanced_accuracy", balanced, color=colour, linestyle=":")
        for record in log:  # where each stage of a curriculum begins
            if "begins" in record:
                at, style = record["iteration"], {"color": colour, "rotation": 90}
                accuracies.axvline(at, color=colour, linewidth=0.8, alpha=0.6)
                begins = str(record["begins"])
                accuracies.text(at, 0.02, begins, fontsize="x-small", parse_math=False, **style)
    stages = {str(record["stage"]) for log in logs for record in log if "stage" in record}
    if len(stages) == 1:  # what the data is called
        losses.set_title(stages.pop(), fontsize="medium", parse_math=False)
    losses.set_ylabel("loss (nats per answer token)")
    low, high = losses.dataLim.intervaly
    if low > 0 and high > 5 * low:  # on a narrow range a log axis has no readable ticks
        losses.set_yscale("log")
    plain_ticks(losses.yaxis)
    plain_ticks(accuracies.xaxis)
    accuracies.set_ylabel("answers right in every token")
    accuracies.set_ylim(-0.02, 1.02)
    accuracies.yaxis.set_major_formatter("{x:.0%}")
    accuracies.set_xlabel("iteration")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    write(figure, path)


def _line(axes: Any, log: Sequence[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(record["iteration"], record[name]) for record in log if name in record]
    if points:
        marker = "o" if len(points) == 1 else None  # a line of one point is not seen
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, marker=marker, **style)
