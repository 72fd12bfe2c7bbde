"""``kmerge-mlx data``."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kmerge_mlx.cli import options as opt
from kmerge_mlx.config import DATA_SEED, TASKS
from kmerge_mlx.data.textualized_tree import TreeTask

DEFAULTS = TreeTask()


Task = enum.StrEnum("Task", {name.replace("-", "_"): name for name in TASKS})
STAGE = opt.Stage(str(DEFAULTS.stage))

# Options of one task alone, refused beside another instead of being ignored.
OWN_OPTIONS = {
    Task.textualized_tree: (
        *("stage", "max_nodes", "num_trees", "questions_per_tree", "find_parent"),
        "reference_sampling",
    ),
    Task.amazon_reviews: ("category", "file", "skip_bad"),
    Task.commitpackft: ("language", "file", "skip_bad"),
}


def data(
    context: typer.Context,
    task: Annotated[Task, typer.Argument(metavar="TASK", help=f"One of {', '.join(Task)}.")],
    out: Annotated[str, typer.Option("--out", help="Folder to write.", show_default=False)],
    seed: Annotated[
        int, typer.Option("--seed", help="The same one gives the same bytes.")
    ] = DATA_SEED,
    train: Annotated[
        int | None,
        typer.Option(
            "--train",
            min=0,
            help="Rows (trees) to train on. Default: as in the paper.",
            show_default=False,
        ),
    ] = None,
    valid: Annotated[
        int | None,
        typer.Option(
            "--valid", min=0, help="Rows (trees) of the validation set.", show_default=False
        ),
    ] = None,
    test: Annotated[
        int | None,
        typer.Option("--test", min=0, help="Rows (trees) of the test set.", show_default=False),
    ] = None,
    stage: opt.TreeStage = STAGE,
    max_nodes: opt.MaxNodes = None,
    num_trees: Annotated[
        int, typer.Option("--num-trees", min=0, help="Trees: how many, in all splits together.")
    ] = DEFAULTS.num_trees,
    questions_per_tree: Annotated[
        int,
        typer.Option(
            "--questions-per-tree", min=2, help="Trees: most questions of one, half of them true."
        ),
    ] = DEFAULTS.questions_per_tree,
    find_parent: Annotated[
        int,
        typer.Option(
            "--find-parent", min=0, help="Trees: most questions of one for a node's parent by name."
        ),
    ] = DEFAULTS.find_parent,
    reference_sampling: opt.ReferenceSampling = False,
    category: opt.Category = None,
    language: opt.Language = None,
    file: opt.TaskFile = None,
    skip_bad: opt.SkipBad = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a data folder at --out.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Make or fetch a benchmark's data as JSONL.

    Writes train.jsonl, valid.jsonl and test.jsonl, rows of prompt and completion as mlx-lm reads
    them. No tree, and no prompt, is in two splits. Reviews and commits come from the Hugging Face
    hub, or from a --file. The folder is written whole or not at all.

    \b
    Examples:
      kmerge-mlx data textualized-tree --stage small --out ./tree-small
      kmerge-mlx data textualized-tree --stage large --reference-sampling --num-trees 500 --out ./t
      kmerge-mlx data amazon-reviews --out ./reviews --train 20000 --test 2000
      kmerge-mlx data commitpackft --file commits.jsonl.gz --out ./commits --test 500
    """
    opt.refuse_foreign(context, OWN_OPTIONS, task)
    if file is not None and (category is not None or language is not None):
        raise typer.BadParameter(
            "they name data of the hub, and there is a --file: leave them out, or it",
            param_hint="--category, --language",
        )

    # The heavy imports wait until the command line is known to be good.
    from kmerge_mlx.data.writing import check_data_destination, data_folder, write_summary

    check_data_destination(out, force)
    splits = {"train": train, "valid": valid, "test": test}
    given = {split: rows for split, rows in splits.items() if rows is not None}
    if task is Task.textualized_tree:
        options = (num_trees, seed, questions_per_tree, find_parent, reference_sampling)
        make = _trees(TreeTask(stage.value, *options, given, max_nodes))
    else:
        name = language if category is None else category
        make = _hub_task(task, file, name, given, seed, skip_bad)
    with data_folder(out) as folder:
        summary = make(folder)
        write_summary(folder, summary)
    if as_json:
        print(json.dumps({"folder": out} | summary, ensure_ascii=False))
    else:
        _print_summary(out, summary)


def _trees(task: TreeTask) -> Callable[[Path], dict[str, Any]]:
    from kmerge_mlx.data.textualized_tree import write

    def make(folder: Path) -> dict[str, Any]:
        with _bar("Drawing") as progress:
            return write(task, folder, progress)

    return make


def _hub_task(
    task: Task,
    file: Path | None,
    name: str | None,
    given: dict[str, int],
    seed: int,
    skip_bad: bool,
) -> Callable[[Path], dict[str, Any]]:
    from dataclasses import replace

    from kmerge_mlx.data import amazon_reviews, commitpackft
    from kmerge_mlx.data.sampling import write_splits

    default, module = (
        (amazon_reviews.CATEGORY, amazon_reviews)
        if task is Task.amazon_reviews
        else (commitpackft.LANGUAGE, commitpackft)
    )
    sizes = replace(module.SIZES, **given)
    name = default if name is None else name
    source = file or module.fetch(name)
    origin = str(file) if file else f"{module.REPO} {name}"

    def make(folder: Path) -> dict[str, Any]:
        with _bar("Reading") as progress:
            drawn = write_splits(source, module.pair, sizes, folder, seed, skip_bad, progress)
        return {"task": str(task), "source": origin, **drawn}

    return make


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if anyone looks.

    Yields:
        What to call with (work done, work in all).
    """
    bar: Any = None
    # Whatever ends the block, Ctrl-C included, gives the terminal its cursor back.
    with contextlib.ExitStack() as shown:

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None and sys.stderr.isatty():
                bar = typer.progressbar(length=total, label=label, file=sys.stderr)
                shown.enter_context(bar)
            if bar is not None:
                bar.update(done - bar.pos)

        yield progress


def _print_summary(out: str, summary: dict[str, Any]) -> None:
    """What was written, on stderr, for people."""
    unit = next(name for name in summary if name.startswith("shared_")).removeprefix("shared_")
    kind = summary.get("stage") or summary.get("source")
    lines = [f"{out}: {summary['task']}, {kind}, seed {summary['seed']}"]
    if "rows_read" in summary:
        lines.append(
            f"  read   {summary['rows_read']:,} rows, {summary['repeated_prompts']:,} with the "
            f"prompt of another, {summary['rows_without_answer']:,} without an answer, "
            f"{summary['bad_lines']:,} bad lines"
        )
    for split, found in summary["splits"].items():
        lines.append(
            f"  {split:<5}  {found['rows']:,} rows, {found[f'distinct_{unit}']:,} distinct {unit}"
        )
        for tally, counts in found.items():
            if isinstance(counts, dict):
                lines.append(f"         {tally}: {_shares(counts)}")
    lines.append(f"  {unit} in more than one split: {summary[f'shared_{unit}']}")
    print("\n".join(lines), file=sys.stderr)
    if summary.get("first_bad"):
        print(f"note: the first bad line: {summary['first_bad']}", file=sys.stderr)


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {n:,} ({n / total:.1%})" for name, n in counts.items())
