"""``kmerge-mlx evaluate``: what merging costs, as a table, JSON or a picture."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import aligned, bar, note, print_json, seconds, size, wrapped
from kmerge_mlx.errors import EvaluateError
from kmerge_mlx.evaluation.settings import DATA, OWN_OPTIONS, PERPLEXITY, EvaluateSettings

if TYPE_CHECKING:
    from kmerge_mlx.evaluation.recommend import Recommendation
    from kmerge_mlx.evaluation.report import Report, Row


@command(EvaluateSettings, config_file=True)
def evaluate(settings: EvaluateSettings) -> None:
    """Score the answers to merged prompts, baselines beside them.

    Every score is given with its 95% interval. An answer is written greedily, and is right if it
    is the example's, white space aside.

    \b
    Examples:
      kmerge-mlx evaluate --task textualized-tree --baseline all --plot pareto.png
      kmerge-mlx evaluate --adapter-path A --data ./data --k 4 --baseline uncompressed
      kmerge-mlx evaluate --adapter-path A --data ./data --recommend --budget 2
      kmerge-mlx evaluate --adapter-path A --task recall --length 4096 --predictions answers.jsonl
    """
    settings.refuse_foreign(settings.task or DATA, OWN_OPTIONS)
    if settings.plot:
        from kmerge_mlx.plots import check_plot

        check_plot(settings.plot)
    from kmerge_mlx.evaluation.run import evaluate as measure

    try:
        # On Metal mlx-lm prints a warning about large models.
        with contextlib.redirect_stdout(sys.stderr):
            report = measure(settings, bar)
    except KeyboardInterrupt:
        if settings.predictions is not None:
            note(f"Stopped: the same command goes on with {settings.predictions}")
        raise
    named = report.settings
    note(f"Model: {named['model']} with {named['adapter_path'] or 'no adapter'}")
    if settings.json:
        print_json(report.to_json())
    elif report.measured:
        print("\n\n".join(_tables(report)))
        if report.recommended is not None:
            print(f"\n{_recommendation(report.recommended)}")
    for row in report.rows:
        if row.refused is not None:
            note(f"note: {row.label} is left out: {row.refused}")
    if bad := report.bad_rows:
        note(f"note: {bad:,} bad row{' was' if bad == 1 else 's were'} left out")
    if not report.measured:
        raise EvaluateError("no method can read these prompts")
    if settings.plot:
        from kmerge_mlx.plots.evaluation import draw_report

        draw_report(report, settings.plot)


def _tables(report: Report) -> list[str]:
    """A table for each group, or for each length of a recall prompt."""
    if report.depths:
        return [_recall_table(report, length) for length in report.depths]
    return [_group_table(report, name) for name in report.groups]


def _group_table(report: Report, name: str) -> str:
    from kmerge_mlx.evaluation.report import COLUMNS

    scores, labels = report.measured[0].scores[name], report.about[name].get("labels")
    shown = [column for column in COLUMNS if column in scores]
    heads = [column.replace("_", " ").replace("f1", "F1") for column in shown]
    title = f"{name.replace('_', ' ')}: {_questions(report.groups[name])}"
    if labels:
        heads = [f"F1 ({labels[0]})" if head == "F1" else head for head in heads]
    if "majority_accuracy" in scores:
        majority = (scores[f"majority_{kind}"].value for kind in ("accuracy", "balanced_accuracy"))
        title += " (always the most frequent answer: {:.2%}, balanced {:.2%})".format(*majority)
    return _table(report.measured, title, heads, [(name, column) for column in shown])


def _recall_table(report: Report, length: int) -> str:
    groups = report.depths[length]
    heads = [f"depth {100 * depth:.12g}%" for depth in groups.values()]
    size = _questions(min(report.groups[name] for name in groups))
    title = f"recall at {length:,} tokens: {size} at each depth"
    return _table(report.measured, title, heads, [(name, "recall") for name in groups])


def _table(
    rows: Sequence[Row], title: str, heads: Sequence[str], columns: Sequence[tuple[str, str]]
) -> str:
    """A line for each method; a column is a group's score, by group and name."""
    from kmerge_mlx.evaluation.report import cell

    groups = [*dict.fromkeys(group for group, _ in columns)]
    costs = ["ratio", "KV cache", *(["TTFT"] if rows[0].time_to_first_token else [])]
    lines = [["", *costs, *heads]]
    for row in rows:
        kept = size(fmean(row.kv_bytes[group] for group in groups))
        # Groups of one table differ in the needle's depth, and share their times.
        timed = [seconds(spread) for spread in [row.time_to_first_token.get(groups[0])] if spread]
        cells = [cell(name, row.scores[group][name]) for group, name in columns]
        lines.append([row.label, f"{row.ratio(groups):.2f}x", kept, *timed, *cells])
    return f"{wrapped(title)}\n{aligned(lines)}"


def _recommendation(found: Recommendation) -> str:
    """Which K to take, and what each one loses, on one line."""
    grows = found.score == PERPLEXITY
    unit, form = ("%", "{:.4g}") if grows else ("", "{:.1%}")
    said = [found.score.replace("_", " ")] if found.score else []
    for one in found.compared:
        value, reference = form.format(one.value), form.format(one.reference)
        ends = f"{one.difference:+.1f}{unit} ({one.low:+.1f} to {one.high:+.1f})"
        least = one.low if grows else -one.high  # that is lost, for sure
        verdict = "too few questions to tell"
        if one.within or least > found.budget:
            side = "within" if one.within else "beyond"
            verdict = f"{side} {found.budget:g}{unit or ' points'}"
        said.append(
            f"K = {one.k}: {value} against {reference} at K = 1, difference {ends}: {verdict}"
        )
    best = f"K = {found.k}"
    if found.k is None:
        best = "no K, as K = 1 " + ("scores 0" if found.compared else "did not answer")
    return "; ".join([*said, f"recommended: {best}"])


def _questions(size: int) -> str:
    return f"{size:,} question{'' if size == 1 else 's'}"
