"""The picture of recall: which panels, lines and words are in it, and where."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from kmerge_mlx.evaluation.intervals import wilson_interval
from kmerge_mlx.plots import recall
from kmerge_mlx.plots.common import COLOURS
from kmerge_mlx.plots.recall import draw_recall
from tests.plots.test_plots import words_of

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIVE = ("uncompressed", "K=4", "mean of 4", "last 1/4 of the tokens", "one token in 4")


def line(found: int, depths=DEPTHS) -> list[tuple]:
    return [(depth, found / 20, wilson_interval(found, 20)) for depth in depths]


def panels(count: int, names=FIVE, depths=DEPTHS) -> dict[str, dict[str, list]]:
    return {
        f"{512 * 4**i:,} tokens": {
            name: line(max(20 - 4 * n - i, 0), depths) for n, name in enumerate(names)
        }
        for i in range(count)
    }


@pytest.fixture
def figure(monkeypatch):
    """Draws, and gives matplotlib's figure before it is a picture."""
    figures: list[Any] = []
    monkeypatch.setattr(recall, "write", lambda figure, path: figures.append(figure))

    def draw(*args: Any) -> Any:
        draw_recall(panels(*args), "not written.png")
        figures[-1].canvas.draw()
        return figures[-1]

    return draw


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("names", [("K=4",), FIVE])
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_it_is_written_with_every_length_method_and_depth(tmp_path, count, names, suffix):
    path = tmp_path / f"recall{suffix}"
    draw_recall(panels(count, names), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    assert words_of(path) == {
        *panels(count),
        *names,
        *("recall", "where the needle lies in the prompt"),
        *("0%", "25%", "50%", "75%", "100%", "20%", "40%", "60%", "80%"),
    }


def test_a_line_holds_the_values_and_a_method_looks_the_same_in_every_panel(figure):
    drawn = figure(3)
    for number, axes in enumerate(drawn.axes):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for place, name in enumerate(FIVE):
            assert list(lines[name].get_xdata()) == list(DEPTHS)
            assert list(lines[name].get_ydata()) == [(20 - 4 * place - number) / 20] * 5
            assert lines[name].get_color() == COLOURS[place]


def test_error_bars_are_the_intervals(figure):
    axes = figure(1, ("K=4",)).axes[0]
    (bars,) = axes.containers
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


def test_the_depths_that_were_measured_are_the_ticks(figure):
    axes = figure(1, FIVE, (0.125, 0.9)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["12.5%", "90%"]
    assert axes.get_xlim() == (-0.1, 1.1)


def test_nine_methods_look_different(figure):
    axes = figure(1, tuple(f"method {i}" for i in range(9))).axes[0]
    lines = [line for line in axes.get_lines() if line.get_label().startswith("method")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9
