"""The picture of an evaluation: which points, lines and words are in it, and where."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from kmerge_mlx.errors import PlotError
from kmerge_mlx.evaluation.intervals import Interval
from kmerge_mlx.plots import quality
from kmerge_mlx.plots.common import COLOURS
from kmerge_mlx.plots.quality import QualityPanel, QualityPoint, draw_quality, pareto_frontier
from tests.plots.test_plots import words_of

METHODS = ("K-token merging", "mean of K", "last tokens", "every K-th token")


def point(method: str, ratio: float, value: float, label: str = "", half: float = 0.04):
    return QualityPoint(label or method, method, ratio, value, Interval(value - half, value + half))


def thirteen() -> list[QualityPoint]:
    """Four methods at K = 2, 4, 8, and the uncompressed prompt."""
    points = [point("uncompressed", 1, 0.95)]
    for number, method in enumerate(METHODS):
        points += [point(method, k, 0.9 - 0.1 * number - 0.01 * k, f"{k}") for k in (2, 4, 8)]
    return points


@pytest.fixture
def figure(monkeypatch):
    """Draws, and gives matplotlib's figure before it is a picture."""
    figures: list[Any] = []
    monkeypatch.setattr(quality, "write", lambda figure, path: figures.append(figure))

    def draw(*panels: QualityPanel, **options: Any) -> Any:
        draw_quality(panels, "not written.png", **options)
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


@pytest.mark.parametrize(
    "points", [[point("a", 4, 0.9)], thirteen()[:3], thirteen()], ids=["1", "3", "13"]
)
def test_any_number_of_points_is_a_picture(tmp_path, points):
    draw_quality([QualityPanel("accuracy", points, 0.5)], tmp_path / "a.png", "trees")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_measure_the_ratio_and_every_method_are_named(tmp_path):
    panels = [QualityPanel("balanced accuracy", thirteen(), 0.5)]
    draw_quality(panels, tmp_path / "a.svg", "trees")
    assert words_of(tmp_path / "a.svg") >= {
        *("balanced accuracy", "compression ratio (original / compressed positions)", "trees"),
        *(*METHODS, "uncompressed", "majority answer", "Pareto frontier"),
        *("1x", "2x", "4x", "8x"),
    }


def test_a_method_of_one_point_goes_by_its_label_and_of_several_by_its_name(figure):
    points = [
        point("mean", 4, 0.6, "mean of 4"),
        *(point("merged", k, 1 - k / 20, f"K={k}") for k in (2, 4)),
    ]
    drawn = figure(QualityPanel("accuracy", points, 0.5, "chance"))
    assert legend(drawn) == ["mean of 4", "merged", "chance", "Pareto frontier"]
    assert not drawn.axes[0].texts


def test_points_of_a_method_are_joined_in_order_of_ratio(figure):
    points = [point("merged", k, v) for k, v in ((8, 0.7), (2, 0.9), (4, 0.8))]
    joined = line(figure(QualityPanel("accuracy", points)).axes[0], "merged")
    assert joined.get_xdata().tolist() == [2, 4, 8]
    assert joined.get_ydata().tolist() == [0.9, 0.8, 0.7]


def test_every_method_has_a_colour_and_a_marker_of_its_own_in_all_panels(figure):
    points = [point(f"method {i}", 2 + i, 0.5) for i in range(2 * len(COLOURS))]
    drawn = figure(QualityPanel("a", points), QualityPanel("b", points[::-1]))
    looks = [
        {p.method: (to_hex(m.get_color()), m.get_marker())}
        for axes in drawn.axes
        for p in points
        for m in [line(axes, p.method)]
    ]
    assert looks[: len(points)] == looks[len(points) :]
    assert len({str(*look.values()) for look in looks}) == len(points)


def test_error_bars_are_the_intervals_even_beside_the_value(figure):
    skewed = QualityPoint("a", "a", 4, 0.9, Interval(0.5, 0.7))
    bare = QualityPoint("b", "b", 8, 0.9)
    axes = figure(QualityPanel("accuracy", [skewed, bare])).axes[0]
    bars = [tuple(s[:, 1]) for c in axes.collections for s in c.get_segments() if len(s)]
    assert bars == [pytest.approx((0.5, 0.7))]


def test_the_frontier_is_what_nothing_beats():
    best = [point("a", 1, 0.9), point("b", 4, 0.8), point("a", 8, 0.5)]
    beaten = [
        *(point("c", 1, 0.85), point("c", 2, 0.8), point("c", 4, 0.79)),  # one is as good in one
        *(point("c", 8, 0.5), QualityPoint("c", "c", 16, float("nan"))),
    ]
    assert pareto_frontier([*best, *beaten]) == best
    assert pareto_frontier(thirteen()[::-1]) == thirteen()[:4]
    assert pareto_frontier([]) == []


def test_a_frontier_of_one_point_is_drawn_up_to_it(figure):
    points = [QualityPoint("K=1", "uncompressed", 1, 0.8), QualityPoint("K=4", "merged", 4, 0.9)]
    axes = figure(QualityPanel("accuracy", points)).axes[0]
    assert list(line(axes, "Pareto frontier").get_ydata()) == [0.9, 0.9]


def test_the_frontier_of_perplexity_is_of_low_values(figure):
    good, bad = [point("a", 1, 3), point("a", 4, 5)], [point("b", 2, 6), point("b", 4, np.inf)]
    assert pareto_frontier([*bad, *good], higher_is_better=False) == good
    panel = QualityPanel("perplexity", [*bad, *good], is_share=False, higher_is_better=False)
    axes = figure(panel).axes[0]
    assert list(line(axes, "Pareto frontier").get_ydata()) == [3, 3, 5]
    assert "4.0" in ticks(axes.yaxis)


def test_the_frontier_falls_behind_a_points_ratio_not_before(figure):
    axes = figure(QualityPanel("accuracy", thirteen())).axes[0]
    frontier = line(axes, "Pareto frontier")
    assert frontier.get_drawstyle() == "steps-pre"
    assert list(frontier.get_xdata()) == [axes.get_xlim()[0], 1, 2, 4, 8]
    assert list(frontier.get_ydata()) == pytest.approx([0.95, 0.95, 0.88, 0.86, 0.82])


def test_one_point_has_no_frontier_and_no_baseline_is_no_line(figure):
    drawn = figure(QualityPanel("accuracy", [point("merged", 4, 0.9, "K=4")]))
    assert legend(drawn) == ["K=4"]
    assert ticks(drawn.axes[0].xaxis) == ["4x"]
    assert line(drawn.axes[0], "K=4").get_linestyle() == "None"


def test_ratios_are_ticks_unless_their_labels_would_touch(figure):
    points = [point("a", ratio, 0.5) for ratio in (1, 1.9, 2, 2.1, 3.87, 7.6)]
    axes = figure(QualityPanel("accuracy", points)).axes[0]
    assert axes.get_xscale() == "log"
    assert ticks(axes.xaxis) == ["1x", "2x", "3.9x", "7.6x"]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_points_of_one_ratio_are_side_by_side_and_the_best_in_their_place(figure):
    axes = figure(QualityPanel("accuracy", thirteen()[::-1])).axes[0]
    place = axes.transData.transform((4, 0.5))[0]
    shown = {m: line(axes, m).get_transform().transform((4, 0.5))[0] - place for m in METHODS}
    assert shown["K-token merging"] == 0
    gaps = np.diff(sorted(shown.values()))
    assert gaps == pytest.approx(quality.APART * axes.figure.dpi / 72)
    assert line(axes, "uncompressed").get_transform().transform((4, 0.5))[0] == place


def test_each_panel_has_its_measure_and_its_baseline(figure):
    second = [point("merged", 2, 0.5)]
    drawn = figure(
        QualityPanel("balanced accuracy", thirteen(), 0.5, "always true"),
        QualityPanel("exact match", second, 0.1, "any node"),
    )
    left, right = drawn.axes
    assert [axes.get_ylabel() for axes in (left, right)] == ["balanced accuracy", "exact match"]
    baselines = line(left, "always true"), line(right, "any node")
    assert [b.get_ydata()[0] for b in baselines] == [0.5, 0.1]
    assert len({b.get_linestyle() for b in baselines}) == 2
    assert len(drawn.legends) == 1
    assert legend(drawn)[-3:] == ["always true", "Pareto frontier", "any node"]


def test_everything_is_inside_the_axes_and_a_share_stays_near_0_to_1(figure):
    points = [point("a", 2, 0.99, half=0.01), point("b", 4, 0.3, half=0.2)]
    axes = figure(QualityPanel("accuracy", points, 0.02)).axes[0]
    low, high = axes.get_ylim()
    assert -0.02 <= low < 0.02
    assert 1 < high <= 1.02
    assert {"0%", "20%", "100%"} <= set(ticks(axes.yaxis))
    left, right = axes.get_xlim()
    assert left < 2 < 4 < right


@pytest.mark.parametrize("half", [0.001, 0.05, 0.08, 0.3])
def test_shares_are_shown_in_per_cent_as_they_are(figure, half):
    axes = figure(QualityPanel("accuracy", [point("a", 2, 0.6, half=half)])).axes[0]
    shown = [float(text.removesuffix("%")) for text in ticks(axes.yaxis)]
    assert shown == pytest.approx(100 * axes.get_yticks())


def test_infinite_ends_are_cut_at_the_axes(figure):
    endless = QualityPoint("a", "a", 2, 5.0, Interval(4.0, np.inf))
    axes = figure(QualityPanel("perplexity", [endless], is_share=False)).axes[0]
    assert np.isfinite(axes.get_ylim()).all()
    (bar,) = [s for c in axes.collections for s in c.get_segments() if len(s)]
    assert tuple(bar[:, 1]) == pytest.approx((4, axes.get_ylim()[1]))


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(PlotError, match=r"cannot write --plot .*no/such\.png"):
        draw_quality([QualityPanel("accuracy", thirteen())], tmp_path / "no" / "such.png")
