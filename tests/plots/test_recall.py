"""The picture of recall: which panels, lines and words are in it, and where."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from kmerge_mlx.evaluation.metrics import wilson_interval
from kmerge_mlx.evaluation.report import Report, Row, Score
from kmerge_mlx.plots import recall
from kmerge_mlx.plots.common import COLOURS
from kmerge_mlx.plots.recall import draw_recall
from tests.evaluations import words_of

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIVE = ("uncompressed", "K=4", "mean of 4", "last 1/4 of the tokens", "one token in 4")


def report(lengths: int, names=FIVE, depths=DEPTHS) -> Report:
    about, rows = {}, [Row(name, 4, name, {}, {}) for name in names]
    for i in range(lengths):
        for depth in depths:
            about[f"{i} {depth}"] = {"questions": 20, "length": 512 * 4**i, "depth": depth}
            for number, row in enumerate(rows):
                found = max(20 - 4 * number - i, 0)
                score = Score(found / 20, wilson_interval(found, 20))
                row.scores[f"{i} {depth}"] = {"recall": score}
    return Report("1", "cpu", {}, {}, 0, about, rows)


@pytest.fixture
def figure(monkeypatch):
    """Draws, and gives matplotlib's figure before it is a picture."""
    figures: list[Any] = []
    monkeypatch.setattr(recall, "write", lambda figure, path: figures.append(figure))

    def draw(*args: Any) -> Any:
        draw_recall(report(*args), "not written.png")
        figures[-1].canvas.draw()
        return figures[-1]

    return draw


def test_it_is_written_with_every_length_method_and_depth(tmp_path):
    draw_recall(report(3), tmp_path / "recall.svg")
    assert words_of(tmp_path / "recall.svg") == {
        *("512 tokens", "2,048 tokens", "8,192 tokens", *FIVE),
        *("recall", "where the needle lies in the prompt"),
        *("0%", "25%", "50%", "75%", "100%", "20%", "40%", "60%", "80%"),
    }


def test_a_line_holds_the_values_and_a_method_looks_the_same_in_every_panel(figure):
    for number, axes in enumerate(figure(3).axes):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for place, name in enumerate(FIVE):
            assert list(lines[name].get_xdata()) == list(DEPTHS)
            assert list(lines[name].get_ydata()) == [(20 - 4 * place - number) / 20] * 5
            assert lines[name].get_color() == COLOURS[place]


def test_error_bars_are_the_intervals(figure):
    (bars,) = figure(1, ("K=4",)).axes[0].containers
    ends = wilson_interval(20, 20)
    for segment in bars.lines[2][0].get_segments():
        assert segment[:, 1] == pytest.approx([ends.low, ends.high])


def test_the_points_of_a_depth_do_not_lie_on_each_other(figure):
    axes = figure(1).axes[0]
    lines = [line for line in axes.get_lines() if line.get_label() in FIVE]
    places = [line.get_transform().transform((0.5, 0.5))[0] for line in lines]
    width = axes.figure.dpi / 72
    assert [round((b - a) / width, 1) for a, b in pairwise(places)] == [5] * 4
    assert sum(places) / 5 == pytest.approx(axes.transData.transform((0.5, 0.5))[0])


def test_many_lengths_are_drawn_in_rows_and_many_depths_are_not_all_written_out(figure):
    drawn = figure(4, FIVE, tuple(i / 10 for i in range(11)))
    assert len(drawn.axes) == 4
    assert drawn.axes[3].get_position().y1 < drawn.axes[0].get_position().y0
    assert len(drawn.axes[0].get_xticks()) < 11
    few = figure(1, FIVE, (0.125, 0.9)).axes[0]
    assert [label.get_text() for label in few.get_xticklabels()] == ["12.5%", "90%"]
