"""The picture of an evaluation: quality against compression, the baselines beside it.

Owns what is drawn, and how. Does not know models or scores: it is given named points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmerge_mlx.evaluation.intervals import Interval
from kmerge_mlx.plots.common import APART, draw_points, write

DASHES = ("--", ":", "-.")
GREY, LIGHT_GREY = "#707070", "#c4c4c4"
SAME = 0.05  # doublings, within which a ratio is another's
TICKS_APART = 0.1  # of the axis: two labels nearer than that would touch
MARGIN = 2**0.35  # left and right of the points


@dataclass(frozen=True)
class QualityPoint:
    """One way to read prompts, measured.

    Args:
        label: Its name, such as ``K=4``; the legend's where the method has no other point.
        method: What it has in common with the points it is joined to, such as ``merged``; the
            legend's where there are several. Points of one method have one colour and marker.
        ratio: Original tokens per position read, above 0.
        value: The quality.
        interval: Where the quality lies, if that is known.
    """

    label: str
    method: str
    ratio: float
    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class QualityPanel:
    """One measure of quality, of every way that was measured.

    Args:
        measure: Its name, with its unit if it has one.
        points: The ways, at least one.
        baseline: What comes of no reading at all, such as the majority's answer; or None.
        baseline_label: What that is.
        is_share: Whether it is a share, from 0 to 1, shown in per cent.
        higher_is_better: False for perplexity.
    """

    measure: str
    points: Sequence[QualityPoint]
    baseline: float | None = None
    baseline_label: str = "majority answer"
    is_share: bool = True
    higher_is_better: bool = True


def draw_quality(panels: Sequence[QualityPanel], path: str | Path, title: str = "") -> None:
    """Draws quality against compression ratio, with the Pareto frontier, a panel for each measure.

    A method looks the same in every panel. Points of one ratio are drawn side by side.

    Args:
        panels: One measure or more.
        path: The picture; its name says which format.
        title: What was measured, such as the model and the data; none is drawn if empty.

    Raises:
        PlotError: It cannot be written.
    """
    from matplotlib.figure import Figure

    names = _legend_names([point for panel in panels for point in panel.points])
    figure = Figure(figsize=(1.6 + 5.2 * len(panels), 4.8), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    entries: dict[str, Any] = {}
    dashes: dict[str, str] = {}  # of each kind of baseline
    for axes, panel in zip(columns, panels, strict=True):
        dash = dashes.setdefault(panel.baseline_label, DASHES[len(dashes) % len(DASHES)])
        _draw_panel(axes, panel, names, dash)
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    # The methods, in the order in which they came, then the lines.
    order = sorted(entries, key=lambda label: label not in names.values())
    figure.legend(
        [entries[label] for label in order],
        order,
        loc="outside lower center",
        ncols=min(len(order), 2 + len(panels)),
        frameon=False,
        fontsize="small",
    )
    if title:
        figure.suptitle(title)
    write(figure, path)


def pareto_frontier(
    points: Sequence[QualityPoint], higher_is_better: bool = True
) -> list[QualityPoint]:
    """The points that no other beats: as good at a higher ratio, or better at the same or a higher.

    Args:
        points: Any; those without a finite value are on no frontier.
        higher_is_better: Whether a higher value is the better one.

    Returns:
        Them in order of ratio, so that the quality falls; one of points that are equal in both.
    """
    sign = 1 if higher_is_better else -1
    frontier: list[QualityPoint] = []
    finite = [point for point in points if np.isfinite(point.value)]
    for point in sorted(finite, key=lambda p: (p.ratio, sign * p.value), reverse=True):
        if not frontier or sign * point.value > sign * frontier[-1].value:
            frontier.append(point)
    return frontier[::-1]


def _legend_names(points: Sequence[QualityPoint]) -> dict[str, str]:
    """What to call each method, in order of appearance: its only point's label, if it has one."""
    labels: dict[str, list[str]] = {}
    for point in points:
        of_method = labels.setdefault(point.method, [])
        if point.label not in of_method:
            of_method.append(point.label)
    return {m: of_method[0] if len(of_method) == 1 else m for m, of_method in labels.items()}


def _draw_panel(axes: Any, panel: QualityPanel, names: dict[str, str], dash: str) -> None:
    _draw_axes(axes, panel)
    if panel.baseline is not None:
        style = {"color": GREY, "linestyle": dash, "linewidth": 1.2}
        axes.axhline(panel.baseline, label=panel.baseline_label, **style)
    frontier = pareto_frontier(panel.points, panel.higher_is_better)
    if len(panel.points) > 1 and frontier:
        # Up to a point's ratio, its quality is to be had.
        axes.step(
            [axes.get_xlim()[0], *(point.ratio for point in frontier)],
            [frontier[0].value, *(point.value for point in frontier)],
            where="pre",
            color=LIGHT_GREY,
            linewidth=3,
            zorder=1,
            label="Pareto frontier",
        )
    shifts = _shifts(panel, frontier)
    for number, (method, name) in enumerate(names.items()):
        points = sorted((p for p in panel.points if p.method == method), key=lambda p: p.ratio)
        if points:
            drawn = [(point.ratio, point.value, point.interval) for point in points]
            draw_points(axes, drawn, number, name, shifts.get(method, 0.0))


def _draw_axes(axes: Any, panel: QualityPanel) -> None:
    """Limits first: points that are drawn beside their place do not set them."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ratios = sorted({point.ratio for point in panel.points})
    axes.set_xscale("log", base=2)
    axes.set_xlim(ratios[0] / MARGIN, ratios[-1] * MARGIN)
    ticks = _ticks(ratios, np.log2(ratios[-1] / ratios[0] * MARGIN**2) * TICKS_APART)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:.1f}".removesuffix(".0") + "x")
    axes.set_xlabel("compression ratio (original / compressed positions)")
    axes.set_ylim(_y_limits(panel))
    if panel.is_share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")
    axes.set_ylabel(panel.measure)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(ratios: Sequence[float], least: float) -> list[float]:
    """Ratios that can be labelled: no two nearer than ``least`` doublings, whole ones first."""
    ticks: list[float] = []
    for ratio in sorted(ratios, key=lambda r: (abs(r - round(r)) > 0.05, r)):
        if all(abs(np.log2(ratio / tick)) >= least for tick in ticks):
            ticks.append(ratio)
    return sorted(ticks)


def _y_limits(panel: QualityPanel) -> tuple[float, float]:
    ends = [end for p in panel.points if p.interval for end in vars(p.interval).values()]
    values = [*ends, *(point.value for point in panel.points)]
    values += [] if panel.baseline is None else [panel.baseline]
    values = [value for value in values if np.isfinite(value)] or [0.0]
    low, high = min(values), max(values)
    if panel.is_share:
        margin = max(0.06 * (high - low), 0.03)
        return max(low - margin, -0.02), min(high + margin, 1.02)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _shifts(panel: QualityPanel, frontier: Sequence[QualityPoint]) -> dict[str, float]:
    """How far beside their place a method's points are drawn, in 1/72 inch.

    Only methods that share a ratio are moved, to the right and to the left in turn, and those of
    the frontier the least: it is drawn in its place.
    """

    def shares(point: QualityPoint) -> bool:
        others = (p for p in panel.points if p.method != point.method)
        return any(abs(np.log2(p.ratio / point.ratio)) < SAME for p in others)

    moved = dict.fromkeys(p.method for p in (*frontier, *panel.points) if shares(p))
    return {m: APART * ((i + 1) // 2) * (1 if i % 2 else -1) for i, m in enumerate(moved)}
