"""``kmerge-mlx data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import bar, note, print_json
from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data import WRITTEN
from kmerge_mlx.data.git_history import CommitTask
from kmerge_mlx.data.sources import SPLITS
from kmerge_mlx.data.texts import TextTask
from kmerge_mlx.data.textualized_tree import TreeTask
from kmerge_mlx.evaluation.settings import FILE_CLASH, EvaluateSettings
from kmerge_mlx.settings import Settings, argument, option
from kmerge_mlx.train.settings import TrainSettings

# Settings that not all tasks have.
OWN = {name: task.options() for name, task in WRITTEN.items()}


@dataclass(frozen=True)
class DataSettings(Settings):
    """What data to make, and where to."""

    NAME = "data"

    task: str = argument("TASK", f"One of {', '.join(WRITTEN)}.", choices=tuple(WRITTEN))
    out: str | None = option(None, str, "Folder to write.", required=True)
    seed: int = option(DATA_SEED, int, "The same one gives the same bytes.")
    train: int | None = option(
        None,
        int,
        "Rows (trees) to train on. Default: the paper's; of qa, commits and text, what is left.",
        low=0,
    )
    valid: int | None = option(
        None, int, "Rows (trees) of the validation set. Default of the same: 5%.", low=0
    )
    test: int | None = option(
        None,
        int,
        "Rows (trees) of the test set. Default of qa and commits: 10%; of text: none.",
        low=0,
    )
    stage: str = EvaluateSettings.setting("stage")
    max_nodes: int | None = EvaluateSettings.setting("max_nodes")
    num_trees: int = option(
        TreeTask.num_trees, int, "Trees: how many, in all splits together.", low=0
    )
    questions_per_tree: int = option(
        TreeTask.questions_per_tree, int, "Trees: most questions of one, half of them true.", low=2
    )
    find_parent: int = option(
        0, int, "Trees: most questions of one for a node's parent by name.", low=0
    )
    reference_sampling: bool = EvaluateSettings.setting("reference_sampling")
    category: str | None = EvaluateSettings.setting("category")
    language: str | None = EvaluateSettings.setting("language")
    file: str | None = EvaluateSettings.setting("file")
    repo: tuple[str, ...] = option(
        (), str, "Commits: a git repository; give it again for another.", many=True
    )
    max_chars: int | None = option(
        None,
        int,
        "Commits: longest file, before and after, in characters. "
        f"Default: {CommitTask.max_chars:,}. Text: longest piece. Default: {TextTask.max_chars}.",
        low=1,
    )
    reconstruction: float = option(
        TextTask.reconstruction, float, "Text: share of the rows that repeat it.", low=0, high=1
    )
    words: int = TrainSettings.setting("words")
    skip_bad: bool = option(False, bool, "Count bad lines and go on, instead of stopping.")
    force: bool = option(False, bool, "Replace a data folder at --out.")
    as_json: bool = option(False, bool, "Print one JSON object on stdout.", flags=("--json",))

    def clashes(self) -> list[str]:
        return [FILE_CLASH] if self.file and (self.category or self.language) else []


@command(DataSettings)
def data(settings: DataSettings) -> None:
    """Make or fetch a benchmark's data as JSONL.

    Writes train.jsonl, valid.jsonl and test.jsonl. No tree, no prompt, no article and no file is in
    two splits. Trees and the documents of recall are drawn. Amazon's reviews and CommitPackFT come
    from the Hugging Face hub, or from a --file; commits are those of your own git repositories;
    text is any text, to go on from and to repeat.
    The folder is written whole or not at all.

    \b
    Examples:
      kmerge-mlx data textualized-tree --stage small --out ./tree-small
      kmerge-mlx data textualized-tree --stage large --reference-sampling --num-trees 500 --out ./t
      kmerge-mlx data amazon-reviews --out ./reviews --train 20000 --test 2000
      kmerge-mlx data commitpackft --file commits.jsonl.gz --out ./commits --test 500
      kmerge-mlx data qa --file train-v2.0.json --out ./squad
      kmerge-mlx data commits --repo ~/src/app --repo ~/src/lib --language python --out ./edits
      kmerge-mlx data recall --words 300 --out ./recall
      kmerge-mlx data text --file articles.jsonl --out ./texts
    """
    settings.refuse_foreign(settings.task, OWN)
    sizes = {s: n for s, n in settings.given().items() if s in SPLITS}
    kind, trees = WRITTEN[settings.task], settings.task == TreeTask.name
    task = kind.of(settings, seed=settings.seed, **{"splits" if trees else "sizes": sizes})
    progress = bar("Drawing" if trees else "Reading")
    summary = task.write(settings.out, settings.force, progress)
    if settings.as_json:
        print_json({"folder": settings.out} | summary)
    else:
        _print_summary(settings.out, summary, kind.left_out)


def _print_summary(out: str, summary: dict[str, Any], left_out: str) -> None:
    """What was written, on stderr, for people."""
    (unit,) = (name.removeprefix("shared_") for name in summary if name.startswith("shared_"))
    kind = summary.get("stage") or summary.get("source")
    lines = [f"{out}: {summary['task']}, {kind}, seed {summary['seed']}"]
    if "rows_read" in summary:
        lines.append(
            f"  read   {summary['rows_read']:,} rows, {summary['repeated_prompts']:,} with the "
            f"prompt of another, {summary['rows_without_answer']:,} {left_out}, "
            f"{summary['bad_lines']:,} bad lines"
        )
    for split, found in summary["splits"].items():
        lines.append(
            f"  {split:<5}  {found['rows']:,} rows, {found[f'distinct_{unit}']:,} distinct {unit}"
        )
        for tally, counts in found.items():
            if isinstance(counts, dict):
                total = sum(counts.values())
                shares = [f"{name} {n:,} ({n / total:.1%})" for name, n in counts.items()]
                lines.append(f"         {tally}: {', '.join(shares)}")
    lines.append(f"  {unit} in more than one split: {summary[f'shared_{unit}']}")
    if summary.get("first_bad"):
        lines.append(f"note: the first bad line: {summary['first_bad']}")
    note("\n".join(lines))
