"""``kmerge-mlx evaluate``: what merging costs, as a table and as a picture."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli import options as opt
from kmerge_mlx.errors import short
from kmerge_mlx.evaluation.settings import (
    ALL,
    BASELINES,
    EVALUATED,
    HAYSTACKS,
    LENGTHS,
    SPLITS,
    TEXT,
    TREE,
    EvaluateConfig,
)

if TYPE_CHECKING:
    from kmerge_mlx.evaluation.run import Report

Task = enum.StrEnum("Task", {name.replace("-", "_"): name for name in EVALUATED})
Baseline = enum.StrEnum("Baseline", [*BASELINES, ALL])
Split = enum.StrEnum("Split", [*SPLITS])
Haystack = enum.StrEnum("Haystack", [*HAYSTACKS])
Defaults = EvaluateConfig
DATA = "--data"
# Options of some data or tasks alone, refused beside others instead of being ignored.
OWN_OPTIONS = {
    DATA: ("split", "limit", "labels", "positive", "skip_bad"),
    Task.textualized_tree: (
        *("split", "stage", "max_nodes", "num_trees", "find_parent", "reference_sampling"),
        *("data_seed", "positive"),
    ),
    Task.amazon_reviews: (
        *("split", "limit", "category", "file", "data_seed", "labels", "positive", "skip_bad"),
    ),
    Task.commitpackft: (
        *("split", "limit", "language", "file", "data_seed", "labels", "positive", "skip_bad"),
    ),
    Task.recall: ("haystack", "length", "depth", "num_needles", "data_seed"),
}
SPLIT, STAGE = Split(Defaults.split), opt.Stage(Defaults.stage)


def evaluate(
    context: typer.Context,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            "--merge-factor",
            min=1,
            help="Merge factor K; give it again for another. Default: all that --adapter-path "
            "holds. 1 is uncompressed.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        list[Baseline] | None,
        typer.Option(
            "--baseline",
            help="Measure this beside it; give it again for another. uncompressed: all T tokens, "
            "as --k 1; mean: of K embeddings, without the encoder; truncate: the last T/K tokens; "
            "stride: every K-th token.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Folder with test.jsonl, or a hub dataset of it.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            "--task",
            help="One of the paper's tasks instead, or `recall`: a needle at every depth of long "
            "prompts.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        Split, typer.Option("--split", help="Which split of --data or --task.")
    ] = SPLIT,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Most examples of --data, reviews or commits. Default: all.",
            show_default=False,
        ),
    ] = None,
    stage: opt.TreeStage = STAGE,
    max_nodes: opt.MaxNodes = None,
    num_trees: Annotated[
        int,
        typer.Option(
            "--num-trees",
            min=1,
            help="Trees: how many, each asked one true and one false question.",
        ),
    ] = Defaults.num_trees,
    find_parent: Annotated[
        int,
        typer.Option(
            "--find-parent", min=0, help="Trees: how many more questions for a parent's name."
        ),
    ] = Defaults.find_parent,
    reference_sampling: opt.ReferenceSampling = False,
    data_seed: Annotated[
        int, typer.Option("--data-seed", help="Seed of the tasks' draws and splits.")
    ] = Defaults.data_seed,
    category: opt.Category = None,
    language: opt.Language = None,
    file: opt.TaskFile = None,
    haystack: Annotated[
        Haystack | None,
        typer.Option(
            "--haystack",
            help="Recall: a number among sentences (text), or a node of a tree (the bundled "
            "model's default).",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            min=1,
            help="Recall: most tokens of a prompt; may be given again. Default: "
            + "; ".join(f"{' and '.join(map(str, LENGTHS[name]))} ({name})" for name in HAYSTACKS)
            + ".",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        list[float],
        typer.Option(
            "--depth",
            min=0,
            max=1,
            help="Recall: where the needle lies, 0 is first and 1 last; may be given again.",
        ),
    ] = Defaults.depths,
    num_needles: Annotated[
        int,
        typer.Option("--num-needles", min=1, help="Recall: prompts of each length and depth."),
    ] = Defaults.num_needles,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="The answers that are classes, such as true,false. Default: found in the data.",
            show_default=False,
        ),
    ] = None,
    positive: Annotated[
        str | None,
        typer.Option(
            "--positive",
            help="The label that F1 is of. Default: the first of --labels, or the most frequent.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-m",
            min=1,
            help="Most tokens of an answer. Default: as many as the longest right one has, and "
            "some more for recall from text.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Questions answered at once.")
    ] = Defaults.batch_size,
    predictions: Annotated[
        str | None,
        typer.Option(
            "--predictions",
            help="Write every answer into this JSONL file, and go on from it after a stop.",
            show_default=False,
        ),
    ] = None,
    skip_bad: opt.SkipBad = False,
    merges: opt.Merges = None,
    merge_threshold: opt.MergeThreshold = None,
    chat_template: opt.UseChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.Json = False,
    plot: opt.Plot = None,
) -> None:
    """Score the answers to merged prompts, baselines beside them.

    Every score is given with its 95% interval. An answer is written greedily, and is right if it
    is the example's, white space aside.

    \b
    Examples:
      kmerge-mlx evaluate --task textualized-tree --baseline all --plot pareto.png
      kmerge-mlx evaluate --adapter-path A --data ./data --k 4 --baseline uncompressed
      kmerge-mlx evaluate --adapter-path A --task recall --length 4096 --predictions answers.jsonl
    """
    if task is not None or data is not None:
        opt.refuse_foreign(context, OWN_OPTIONS, DATA if task is None else task)
    classes = tuple(part.strip() for part in (labels or "").split(",") if part.strip())
    if labels is not None and not classes:
        raise typer.BadParameter(
            f"found no label in {short(labels)}, expected them with commas between",
            param_hint="--labels",
        )
    base, adapters = opt.chosen(model, adapter_path)
    named = [str(name) for name in baseline or ()]
    own = TREE if base == BUNDLED else TEXT
    config = EvaluateConfig(
        model=base,
        adapter_path=adapters,
        ks=tuple(k or ()),
        baselines=BASELINES if ALL in named else tuple(dict.fromkeys(named)),
        data=data,
        task=task and str(task),
        split=str(split),
        limit=limit,
        stage=str(stage),
        max_nodes=max_nodes,
        num_trees=num_trees,
        find_parent=find_parent,
        reference_sampling=reference_sampling,
        data_seed=data_seed,
        category=category,
        language=language,
        file=file and str(file),
        haystack=str(haystack or own),
        lengths=tuple(length or ()),
        depths=tuple(depth),
        num_needles=num_needles,
        labels=classes,
        positive=positive,
        max_tokens=max_tokens,
        batch_size=batch_size,
        predictions=predictions,
        skip_bad=skip_bad,
        merges=merges and str(merges),
        merge_threshold=merge_threshold,
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
    )
    # The heavy imports wait until the command line is known to be good.
    from kmerge_mlx.plots.common import check_plot

    if plot:
        check_plot(plot)
        if predictions is not None and Path(plot).resolve() == Path(predictions).resolve():
            raise typer.BadParameter("the same file as --predictions", param_hint="--plot")

    from kmerge_mlx.cli.evaluated import draw, tables

    report = _measured(config)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print("\n\n".join(tables(report)))
    _print_notes(report)
    if plot:
        draw(report, plot)


def _measured(config: EvaluateConfig) -> Report:
    """Measures, and says after Ctrl-C what becomes of the answers."""
    from tqdm import tqdm

    from kmerge_mlx.cli.output import bars
    from kmerge_mlx.evaluation.run import evaluate as measure

    try:
        # On Metal mlx-lm prints a warning about large models.
        with contextlib.redirect_stdout(sys.stderr):
            return measure(config, bars(quiet=False))
    except KeyboardInterrupt:
        if config.predictions is not None:
            line = f"Stopped: the same command goes on with {config.predictions}"
            tqdm.write(line, file=sys.stderr)  # above the bar
        raise


def _print_notes(report: Report) -> None:
    """What the table cannot say, on stderr."""
    for row in report.rows:
        if row.refused is not None:
            print(f"note: {row.method.label} is left out: {row.refused}", file=sys.stderr)
    if bad := report.questions.bad:
        print(
            f"note: {bad:,} bad {'row was' if bad == 1 else 'rows were'} left out", file=sys.stderr
        )
