"""The pictures of an evaluation: which points, lines and words are in them, and where."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from kmerge_mlx.errors import PlotError
from kmerge_mlx.evaluation import baselines
from kmerge_mlx.evaluation.metrics import wilson_interval
from kmerge_mlx.evaluation.report import Report, Row, Score
from kmerge_mlx.generation.cost import Spread
from kmerge_mlx.plots import COLOURS, MARKERS, evaluation
from kmerge_mlx.plots.evaluation import APART, draw_report, pareto_frontier
from tests.evaluations import words_of

METHODS = ("merged", "mean", "truncate", "stride")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIVE = ("uncompressed", "K=4", "mean of 4", "last 1/4 of the tokens", "one token in 4")


def row(
    method: str, ratio: float, value: float, half: float | None = 0.04, name: str = "exact_match"
) -> Row:
    """A method's score in both of two groups."""
    ends = () if half is None else (value - half, value + half)
    scores = {name: Score(value, *ends), f"majority_{name}": Score(0.5)}
    sizes = dict.fromkeys(("one", "two"), (round(1000 * ratio), 1000))
    return Row(method, round(ratio), f"{method} {ratio}", sizes, dict.fromkeys(sizes, scores))


def quality(rows: list[Row], *groups: str) -> Report:
    about = {group: {"questions": 9} for group in groups or ("one",)}
    return Report("1", "cpu", {}, {}, 0, about, rows)


def recall(lengths: int, names=FIVE, depths=DEPTHS) -> Report:
    about, rows = {}, [Row(name, 4, name, {}, {}) for name in names]
    for i in range(lengths):
        for depth in depths:
            about[f"{i} {depth}"] = {"questions": 20, "length": 512 * 4**i, "depth": depth}
            for number, row in enumerate(rows):
                found = max(20 - 4 * number - i, 0)
                score = Score(found / 20, *wilson_interval(found, 20))
                row.scores[f"{i} {depth}"] = {"recall": score}
    return Report("1", "cpu", {}, {}, 0, about, rows)


def thirteen() -> list[Row]:
    """Four methods at K = 2, 4, 8, and the uncompressed prompt."""
    rows = [row("uncompressed", 1, 0.95)]
    for number, method in enumerate(METHODS):
        rows += [row(method, k, 0.9 - 0.1 * number - 0.01 * k) for k in (2, 4, 8)]
    return rows


@pytest.fixture
def figure(monkeypatch):
    """Draws a report, and gives matplotlib's figure before it is a picture."""
    figures: list[Any] = []
    monkeypatch.setattr(evaluation, "write", lambda figure, path: figures.append(figure))

    def draw(report: Report | list[Row]) -> Any:
        report = quality(report) if isinstance(report, list) else report
        draw_report(report, "not written.png")
        figures[-1].canvas.draw()
        return figures[-1]

    return draw


def line(axes: Any, label: str) -> Any:
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def bars(axes: Any) -> list[tuple[float, float]]:
    return [tuple(s[:, 1]) for c in axes.collections for s in c.get_segments() if len(s)]


def test_the_measure_the_ratio_and_every_method_are_named(tmp_path):
    draw_report(quality(thirteen(), "one", "two"), tmp_path / "a.svg")
    assert words_of(tmp_path / "a.svg") >= {
        *("one: exact match", "two: exact match", "majority answer", "Pareto frontier"),
        "compression ratio (equal ones side by side)",
        *("uncompressed 1", "merged", "mean of K", "last tokens", "one token in K"),
        *("1x", "2x", "4x", "8x"),
    }
    with pytest.raises(PlotError, match=r"cannot write `plot` .*no/such\.png"):
        draw_report(quality(thirteen()), tmp_path / "no" / "such.png")


def test_error_bars_are_the_intervals_even_beside_the_value_and_cut_at_the_axes(figure):
    skewed = row("a", 4, 0.6, 0.1)
    skewed.scores["one"]["exact_match"] = Score(0.9, 0.5, 0.7)
    axes = figure([skewed, row("b", 8, 0.9, None)]).axes[0]
    assert bars(axes) == [pytest.approx((0.5, 0.7))]
    endless = row("a", 2, 5.0, 1.0, name="perplexity")
    endless.scores["one"]["perplexity"] = Score(5.0, 4.0, np.inf)
    axes = figure([endless, row("b", 4, np.inf, None, name="perplexity")]).axes[0]
    assert np.isfinite(axes.get_ylim()).all()
    assert bars(axes) == [pytest.approx((4, axes.get_ylim()[1]))]


def test_the_frontier_is_what_nothing_beats_up_to_a_points_ratio(figure):
    best = [(1, 0.9), (4, 0.8), (8, 0.5)]
    beaten = [(1, 0.85), (2, 0.8), (4, 0.79), (8, 0.5), (16, float("nan"))]
    assert pareto_frontier([*best, *beaten]) == best
    assert pareto_frontier([]) == []
    assert pareto_frontier([(2, 6), (4, np.inf), (1, 3), (4, 5)], sign=-1) == [(1, 3), (4, 5)]
    axes = figure(thirteen()).axes[0]
    frontier = line(axes, "Pareto frontier")
    assert frontier.get_drawstyle() == "steps-pre"
    assert list(frontier.get_xdata()) == [axes.get_xlim()[0], 1, 2, 4, 8]
    assert list(frontier.get_ydata()) == pytest.approx([0.95, 0.95, 0.88, 0.86, 0.82])
    alone = figure([row("merged", 4, 0.9)])
    assert legend(alone) == ["merged 4", "majority answer"]
    assert ticks(alone.axes[0].xaxis) == ["4x"]


def test_a_line_of_recall_holds_the_values_and_their_intervals(figure):
    for number, axes in enumerate(figure(recall(3)).axes):
        for place, name in enumerate(FIVE):
            assert list(line(axes, name).get_xdata()) == list(DEPTHS)
            assert list(line(axes, name).get_ydata()) == [(20 - 4 * place - number) / 20] * 5
            assert line(axes, name).get_color() == COLOURS[place]
            assert legend(axes.figure) == list(FIVE)
        places = [line(axes, name).get_transform().transform((0.5, 0.5))[0] for name in FIVE]
        assert np.diff(places) == pytest.approx(APART * axes.figure.dpi / 72)
    assert bars(figure(recall(1, ("K=4",))).axes[0]) == [pytest.approx(wilson_interval(20, 20))] * 5


def timed(method: str, k: int, value: float, seconds: float) -> Row:
    times = dict.fromkeys(("one", "two"), Spread.of([seconds]))
    return replace(row(method, k, value), time_to_first_token=times)


def test_quality_over_time_is_a_second_line_where_a_short_time_is_good(figure):
    rows = [timed("uncompressed", 1, 0.9, 2.0), timed("merged", 4, 0.8, 0.6)]
    rows += [timed("spec-prefill", 4, 0.7, 2.4), timed("spec-prefill", 2, 0.75, 3.0)]
    drawn = figure(quality(rows, "one", "two"))
    assert len(drawn.axes) == 4
    axes = drawn.axes[2]
    assert axes.get_xlabel() == "time to first token (median)"
    assert list(line(axes, "spec-prefill").get_xdata()) == [2.4, 3.0]
    frontier = line(axes, "Pareto frontier")
    assert list(frontier.get_xdata()) == [axes.get_xlim()[1], 2.0, 0.6]
    assert list(frontier.get_ydata()) == [0.9, 0.9, 0.8]
    assert ticks(axes.xaxis) == ["500 ms", "700 ms", "1 s", "1.5 s", "2 s", "3 s"]
    wide = [timed("a", 2, 0.5, 0.004), timed("b", 2, 0.5, 700)]
    axes = figure(quality(wide)).axes[1]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_picture_of_all_methods_tells_them_apart(figure):
    rows = [row("uncompressed", 1, 0.95), row("base", 1, 0.9)]
    names = [name for name, method in baselines.METHODS.items() if method.compresses]
    rows += [row(name, k, 0.9 - 0.1 * i) for i, name in enumerate(names) for k in (2, 4)]
    axes = figure(rows).axes[0]
    drawn = [found for found in axes.get_lines() if found.get_marker() in MARKERS]
    assert len(drawn) == len(baselines.METHODS)
    assert len({to_hex(found.get_color()) for found in drawn}) == len(drawn)
    assert len({found.get_marker() for found in drawn}) == len(drawn)
