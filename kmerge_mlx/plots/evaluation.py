"""Draws an evaluation: quality over compression ratio and time, recall over the needle's depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kmerge_mlx.errors import PlotError
from kmerge_mlx.evaluation.report import COLUMNS, Report, Row, Score
from kmerge_mlx.plots import COLOURS, MARKERS, plain, plain_ticks, write

DRAWN = ("balanced_accuracy", "exact_match")
"""The score that is drawn of each group."""
DRAWN_ALONE = ("balanced_accuracy", "token_f1", "exact_match", "edit_similarity", "perplexity")
"""The scores that are drawn of a group that is the only one."""
NAMES = {"truncate": "last tokens", "stride": "one token in K", "mean": "mean of K"}
"""The legend's words for a method that was measured at several K."""
GREY, LIGHT_GREY = "#707070", "#c4c4c4"
APART = 5.0  # 1/72 inch between points of one place, so that their error bars can be seen
SAME = 0.05  # doublings within which two ratios are the same
TICKS_APART = 0.1  # of the axis: labels nearer than that would touch
ROUND = (1, 2, 5, 3, 1.5, 7)  # digits of a time that is a tick, the best first
MARGIN = 2**0.35  # left and right of the points
ABREAST = 3  # panels
MOST_TICKS = 6  # more depths than that are not all written out

Place = tuple[float, float]  # compression ratio (or seconds to the first token) and value


def draw_report(report: Report, path: str | Path) -> None:
    """Draws recall over depth where that was measured, else quality over compression."""
    if not report.measured:
        raise PlotError(f"`plot` {path}: there is nothing to draw, every method is left out")
    (draw_recall if report.depths else draw_quality)(report, path)


def draw_quality(report: Report, path: str | Path) -> None:
    """Draws quality over compression ratio, a panel for each score.

    Below it there is the same over the time to the first token, where that was measured. A method
    looks the same in every panel. Points of one ratio are drawn side by side.
    """
    from matplotlib.figure import Figure

    rows, groups = report.measured, report.groups
    drawn = DRAWN_ALONE if len(groups) == 1 else DRAWN
    panels = [(g, name) for g in groups for name in drawn if name in rows[0].scores[g]]
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(row.method, []).append(row.label)
    names = {m: ls[0] if len(ls) == 1 else NAMES.get(m, m) for m, ls in labels.items()}
    lines = 2 if all(row.time_to_first_token for row in rows) else 1
    figure = Figure(figsize=(1.6 + 5.2 * len(panels), 0.8 + 4 * lines), layout="constrained")
    entries: dict[str, Any] = {}
    for number, line in enumerate(figure.subplots(lines, len(panels), squeeze=False)):
        for axes, panel in zip(line, panels, strict=True):
            _draw_panel(axes, rows, *panel, names, over_time=number == 1)
            handles, words = axes.get_legend_handles_labels()
            entries |= dict(zip(words, handles, strict=True))
    # The methods, in the order in which they came, then the lines.
    order = sorted(entries, key=lambda label: label not in names.values())
    _outside_legend(figure, [entries[label] for label in order], order, len(panels))
    write(figure, path)


def pareto_frontier(places: Sequence[Place], sign: int = 1) -> list[Place]:
    """The places that no other one beats, in order of ratio; ``sign`` is -1 if lower is better."""
    frontier: list[Place] = []
    finite = [place for place in places if np.isfinite(place[1])]
    for place in sorted(finite, key=lambda p: (p[0], sign * p[1]), reverse=True):
        if not frontier or sign * place[1] > sign * frontier[-1][1]:
            frontier.append(place)
    return frontier[::-1]


def _draw_panel(
    axes: Any, rows: Sequence[Row], group: str, name: str, names: dict[str, str], over_time: bool
) -> None:
    """Draws one score of a group, of every method."""
    scores = [row.scores[group][name] for row in rows]
    along = [row.ratio([group]) for row in rows]
    if over_time:
        along = [row.time_to_first_token[group].median for row in rows]
    places = [(x, score.value) for x, score in zip(along, scores, strict=True)]
    majority = rows[0].scores[group].get(f"majority_{name}")
    drawn = [*scores, *([majority] if majority else [])]
    values = [value for score in drawn for value in vars(score).values() if value is not None]
    _quality_axes(axes, along, values, is_share=COLUMNS[name], over_time=over_time)
    words = f"{group}: {name.replace('f1', 'F1')}".replace("_", " ")
    axes.set_ylabel(words, parse_math=False)
    if majority is not None:
        style = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
        axes.axhline(majority.value, label="majority answer", **style)
    frontier = _draw_frontier(axes, places, 1 if COLUMNS[name] else -1, over_time)
    first = sorted(range(len(rows)), key=lambda i: places[i] not in frontier)
    shifts = {} if over_time else _shifts([(rows[i].method, along[i]) for i in first])
    for number, (method, label) in enumerate(names.items()):
        mine = [(places[i][0], scores[i]) for i, row in enumerate(rows) if row.method == method]
        mine.sort(key=lambda point: point[0])
        _draw_scores(axes, mine, number, label, shifts.get(method, 0.0))


def _draw_frontier(axes: Any, places: Sequence[Place], sign: int, over_time: bool) -> list[Place]:
    """Draws what no other place beats, and returns it."""
    turn = -1 if over_time else 1  # a short time is good, as is a high ratio
    found = pareto_frontier([(turn * x, value) for x, value in places], sign)
    frontier = [(turn * x, value) for x, value in found]
    if len(places) > 1 and frontier:
        # A point's quality can be had at every ratio up to its own, and at every time from it on.
        end = (axes.get_xlim()[over_time], frontier[0][1])
        x, y = zip(end, *frontier, strict=True)
        style = {"color": LIGHT_GREY, "linewidth": 3, "zorder": 1, "label": "Pareto frontier"}
        axes.step(x, y, where="pre", **style)
    return frontier


def _quality_axes(
    axes: Any, along: list[float], values: list[float], is_share: bool, over_time: bool
) -> None:
    """Sets the limits from the true places; some points are drawn beside theirs."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    low, high = min(along) / MARGIN, max(along) * MARGIN
    axes.set_xlim(low, high)
    candidates = sorted(set(along), key=lambda r: (abs(r - round(r)) > 0.05, r))  # whole ones first
    if over_time:
        candidates = [first * 10.0**power for first in ROUND for power in range(-5, 5)]
    ticks: list[float] = []
    for x in candidates:
        apart = [abs(np.log2(x / tick)) / np.log2(high / low) for tick in ticks]
        if low <= x <= high and min(apart, default=1) >= TICKS_APART:
            ticks.append(x)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    if over_time:
        axes.xaxis.set_major_formatter(
            lambda s, _: f"{plain(s)} s" if s >= 1 else f"{plain(1e3 * s)} ms"
        )
        axes.set_xlabel("time to first token (median)")
    else:
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:.1f}".removesuffix(".0") + "x")
        axes.set_xlabel("compression ratio (equal ones side by side)")
    finite = [value for value in values if np.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low)
    if is_share:
        margin = max(margin, 0.03)
        axes.set_ylim(max(low - margin, -0.02), min(high + margin, 1.02))
        axes.yaxis.set_major_formatter(
            lambda share, _: f"{100 * share:.6g}%" if share < 1.001 else ""
        )
    else:
        margin = margin or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
        if low > 0 and high > 5 * low:  # on a narrow range a log axis has no readable ticks
            axes.set_yscale("log")
            axes.set_ylim(low / MARGIN, high * MARGIN)
        plain_ticks(axes.yaxis)
    _plain(axes)


def _shifts(points: Sequence[tuple[str, float]]) -> dict[str, float]:
    """How far beside their place a method's points (method and ratio) are drawn, in 1/72 inch.

    Only methods that share a ratio are moved, to the right and to the left in turn; the first one
    stays in its place.
    """

    def shares(method: str, ratio: float) -> bool:
        return any(m != method and abs(np.log2(r / ratio)) < SAME for m, r in points)

    moved = dict.fromkeys(method for method, ratio in points if shares(method, ratio))
    return {m: APART * ((i + 1) // 2) * (1 if i % 2 else -1) for i, m in enumerate(moved)}


def draw_recall(report: Report, path: str | Path) -> None:
    """Draws recall over the needle's depth, a panel for each length and a line for each method."""
    from matplotlib.figure import Figure

    panels = report.depths
    rows, columns = -(-len(panels) // ABREAST), min(len(panels), ABREAST)
    figure = Figure(figsize=(1.4 + 4.4 * columns, 0.8 + 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (length, depths) in zip(grid.flat, panels.items(), strict=False):
        _recall_axes(axes, f"{length:,} tokens", sorted(depths.values()))
        for number, row in enumerate(report.measured):
            points = [(depth, row.scores[name]["recall"]) for name, depth in depths.items()]
            shift = APART * (number - (len(report.measured) - 1) / 2)
            _draw_scores(axes, points, number, row.label, shift)
    for axes in grid[:, 0]:
        axes.set_ylabel("recall")
    _outside_legend(figure, *grid[0, 0].get_legend_handles_labels(), columns)
    write(figure, path)


def _recall_axes(axes: Any, title: str, depths: list[float]) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("where the needle lies in the prompt")
    axes.set_xlim(-0.1, 1.1)
    axes.set_ylim(-0.03, 1.03)
    if len(depths) <= MOST_TICKS:
        axes.set_xticks(depths)
    axes.xaxis.set_major_formatter(lambda depth, _: f"{100 * depth:.6g}%")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _plain(axes)


def _draw_scores(
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


def _outside_legend(
    figure: Any, handles: Sequence[Any], labels: Sequence[str], panels: int
) -> None:
    """One legend for all panels, below them."""
    style = {"frameon": False, "fontsize": "small"}
    columns = min(len(labels), 2 + panels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


def _plain(axes: Any) -> None:
    """Draws a light grid, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
