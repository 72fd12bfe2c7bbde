"""Numbers at an axis: written out, whatever their size."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from kmerge_mlx.plots import plain, plain_ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00002, "0.00002"), (1.5, "1.5"), (1_500_000, "1,500,000"), (-0.25, "-0.25")],
)
def test_a_number_is_written_out(value, text):
    assert plain(value) == text


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("values", [[0.00001, 0.0005], [1e6, 5e7], [10_000_000.1, 10_000_000.2]])
def test_ticks_have_neither_powers_of_ten_nor_an_offset(scale, values):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], values)
    axes.set_yscale(scale)
    plain_ticks(axes.yaxis)
    figure.canvas.draw()
    labels = [label.get_text() for label in axes.yaxis.get_ticklabels(which="both")]
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert all(set(label) <= set("0123456789.,-") for label in labels)
    assert any(labels)
