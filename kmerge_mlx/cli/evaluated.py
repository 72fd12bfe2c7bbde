"""How an evaluation is shown: tables for each group of questions, and pictures.

Owns the wording of heads and which score stands for a group. Does not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kmerge_mlx.cli.tables import aligned
from kmerge_mlx.errors import PlotError
from kmerge_mlx.evaluation.questions import Group
from kmerge_mlx.evaluation.report import Row, Score
from kmerge_mlx.evaluation.run import Report
from kmerge_mlx.plots.quality import QualityPanel, QualityPoint, draw_quality
from kmerge_mlx.plots.recall import Point, draw_recall

# The scores of a table, in its order, and whether they are shares.
COLUMNS = {
    "balanced_accuracy": True,
    "accuracy": True,
    "f1": True,
    "f1_macro": True,
    "exact_match": True,
    "recall": True,
    "edit_similarity": True,
    "perplexity": False,
}
DRAWN = ("balanced_accuracy", "exact_match")
"""What stands for a group in a picture of several."""
DRAWN_ALONE = ("balanced_accuracy", "exact_match", "edit_similarity", "perplexity")
METHODS = {"truncate": "last tokens", "stride": "one token in K", "mean": "mean of K"}
"""What to call a method that was measured for several K."""


def tables(report: Report) -> list[str]:
    """The tables of a report: one for each group, or for each length of a prompt with a needle."""
    rows = [row for row in report.rows if row.refused is None]
    groups = report.questions.groups
    lengths = dict.fromkeys(group.place[0] for group in groups if group.place)
    sizes = report.questions.sizes()
    if not rows:
        return ["no method can read these prompts"]
    return [
        *(_table(group, sizes[group.name], rows) for group in groups if not group.place),
        *(_recall_table(length, groups, sizes, rows) for length in lengths),
    ]


def draw(report: Report, path: str) -> None:
    """Draws quality over compression; or recall over depth, where that was measured.

    Raises:
        PlotError: It cannot be written, or there is nothing to draw.
    """
    rows = [row for row in report.rows if row.refused is None]
    if not rows:
        raise PlotError(f"--plot {path}: there is nothing to draw, every method is left out")
    groups = report.questions.groups
    if not groups[0].place:
        names = DRAWN_ALONE if len(groups) == 1 else DRAWN
        panels = [(g, n) for g in groups for n in names if n in rows[0].results[g.name].scores]
        draw_quality([_panel(group, name, rows) for group, name in panels], path)
        return
    lines: dict[str, dict[str, list[Point]]] = {}
    for group in groups:
        length, depth = group.place
        panel = lines.setdefault(f"{length:,} tokens", {})
        for row in rows:
            score = row.results[group.name].scores["recall"]
            panel.setdefault(row.method.label, []).append((depth, score.value, score.interval))
    draw_recall(lines, path)


def _table(group: Group, size: int, rows: Sequence[Row]) -> str:
    scores = [row.results[group.name].scores for row in rows]
    names = [name for name in COLUMNS if name in scores[0]]
    lines = [["", "ratio", *(_head(name, group) for name in names)]]
    for row, found in zip(rows, scores, strict=True):
        cells = [cell(name, found[name]) for name in names]
        lines.append([row.method.label, _ratio(row, [group]), *cells])
    title = f"{group.name.replace('_', ' ')}: {_questions(size)}"
    if group.labels:
        majority = ("majority_accuracy", "majority_balanced_accuracy")
        always, balanced = (scores[0][name].value for name in majority)
        title += f" (always the most frequent answer: {always:.2%}, balanced {balanced:.2%})"
    return f"{title}\n{aligned(lines)}"


def _recall_table(
    length: int, groups: Sequence[Group], sizes: Mapping[str, int], rows: Sequence[Row]
) -> str:
    mine = [group for group in groups if group.place and group.place[0] == length]
    lines = [["", "ratio", *(f"depth {100 * group.place[1]:.12g}%" for group in mine)]]
    for row in rows:
        cells = [cell("recall", row.results[group.name].scores["recall"]) for group in mine]
        lines.append([row.method.label, _ratio(row, mine), *cells])
    title = f"recall at {length:,} tokens: {_questions(sizes[mine[0].name])} at each depth"
    return f"{title}\n{aligned(lines)}"


def _head(name: str, group: Group) -> str:
    words = name.replace("_", " ").replace("f1", "F1")
    return f"{words} ({group.labels[0]})" if name == "f1" else words


def _ratio(row: Row, groups: Sequence[Group]) -> str:
    return f"{row.compression_ratio(group.name for group in groups):.2f}x"


def _questions(size: int) -> str:
    return f"{size:,} question{'' if size == 1 else 's'}"


def cell(name: str, score: Score) -> str:
    """A score and its interval as a table shows it."""
    value, ends = score.value, score.interval
    if COLUMNS[name]:
        return f"{value:.2%} ({100 * ends.low:.1f}-{100 * ends.high:.1f})"
    return f"{value:.4g}" if ends is None else f"{value:.4g} ({ends.low:.4g}-{ends.high:.4g})"


def _panel(group: Group, name: str, rows: Sequence[Row]) -> QualityPanel:
    """One score of a group, of every method."""
    scores = [row.results[group.name].scores[name] for row in rows]
    points = [
        QualityPoint(
            row.method.label,
            METHODS.get(row.method.name, row.method.name),
            row.compression_ratio([group.name]),
            score.value,
            score.interval,
        )
        for row, score in zip(rows, scores, strict=True)
    ]
    majority = rows[0].results[group.name].scores.get(f"majority_{name}")
    return QualityPanel(
        f"{group.name.replace('_', ' ')}: {name.replace('_', ' ')}",
        points,
        None if majority is None else majority.value,
        is_share=COLUMNS[name],
        higher_is_better=COLUMNS[name],
    )
