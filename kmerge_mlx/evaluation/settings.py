"""The options of `kmerge-mlx evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data import FILE_TASKS, TASKS
from kmerge_mlx.data.recall import RecallTask
from kmerge_mlx.data.textualized_tree import STAGES, TreeTask
from kmerge_mlx.errors import short
from kmerge_mlx.evaluation.baselines import BASELINES, METHODS
from kmerge_mlx.settings import LayoutSettings, ModelSettings, option
from kmerge_mlx.train.settings import TrainSettings

RECALL = RecallTask.name
SPLITS = ("test", "valid")
TEXT, TREE = "text", "tree"
HAYSTACKS = (TEXT, TREE)
ALL = "all"
BALANCED, PERPLEXITY = "balanced_accuracy", "perplexity"
BUDGET = 2.0  # points
JUDGED = (BALANCED, "accuracy", "token_f1", "exact_match", "edit_similarity", "recall", PERPLEXITY)
"""Scores that a K may be recommended by."""

LENGTHS = {TEXT: (512, 2048), TREE: (32, 52)}
"""Tokens of a recall prompt by its haystack: the bundled model knows trees of 12 nodes."""

FILE_CLASH = (
    "`category` and `language` name data of the hub, and there is a `file`: leave them out, or it"
)
DATA = "`data`"
_ROWS = ("split", "limit", "labels", "positive", "skip_bad")
OWN_OPTIONS = {
    DATA: _ROWS,
    TreeTask.name: (
        *("split", "stage", "max_nodes", "num_trees", "find_parent", "reference_sampling"),
        *("data_seed", "positive"),
    ),
    **{name: (*_ROWS, "data_seed", *task.options()) for name, task in FILE_TASKS.items()},
    RECALL: ("haystack", "length", "depth", "num_needles", "data_seed"),
}
"""Options that not all tasks have, by task; they are refused beside another one."""


@dataclass(frozen=True)
class EvaluateSettings(LayoutSettings, ModelSettings):
    """What to measure, and on what."""

    NAME = "evaluate"

    k: tuple[int, ...] = ModelSettings.setting(
        "k",
        default=(),
        many=True,
        help="Merge factor K, or several such as 2,4,8. 1 is uncompressed. Default: all that "
        "--adapter-path holds.",
    )
    baseline: tuple[str, ...] = option(
        (),
        str,
        "Measure this as well; give it again for another. "
        + "; ".join(f"{name}: {METHODS[name].about}" for name in BASELINES)
        + "; all: each of them.",
        many=True,
        choices=(*BASELINES, ALL),
    )
    data: str | None = option(None, str, "Folder with test.jsonl, or a hub dataset of it.")
    task: str | None = option(
        None,
        str,
        "One of the paper's tasks or `qa` instead, or `recall`: a needle in long prompts.",
        choices=tuple(TASKS),
    )
    split: str = option(SPLITS[0], str, "Which split of --data or --task.", choices=SPLITS)
    limit: int | None = option(None, int, "Most rows, the first ones. Default: all.", low=1)
    stage: str = TrainSettings.setting("stage", choices=tuple(STAGES))
    max_nodes: int | None = option(None, int, "Trees: most nodes. Default: the stage's.", low=2)
    num_trees: int = option(1000, int, "Trees, each asked a true and a false question.", low=1)
    find_parent: int = option(1, int, "Trees: more questions, for a parent's name.", low=0)
    reference_sampling: bool = TrainSettings.setting("reference_sampling")
    data_seed: int = option(DATA_SEED, int, "Seed of the tasks' draws and splits.")
    category: str | None = TrainSettings.setting("category")
    language: str | None = TrainSettings.setting("language")
    file: str | None = TrainSettings.setting("file")
    haystack: str | None = option(
        None,
        str,
        "Recall: an exact string in a text, or a node of a tree (the bundled model's default).",
        choices=HAYSTACKS,
    )
    length: tuple[int, ...] = option(
        (),
        int,
        "Recall: most tokens of a prompt; may be given again.",
        many=True,
        low=1,
        shown="; ".join(f"{' and '.join(map(str, LENGTHS[name]))} ({name})" for name in HAYSTACKS),
    )
    depth: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        float,
        "Recall: where the needle lies, 0 is first and 1 last; may be given again.",
        many=True,
        low=0,
        high=1,
    )
    num_needles: int = option(20, int, "Recall: prompts of each length and depth.", low=1)
    labels: list[str] = option(
        [], list, "The answers that are classes, such as true,false. Default: found in the data."
    )
    positive: str | None = option(
        None, str, "Label that F1 is of. Default: the first of --labels, or the most frequent."
    )
    max_tokens: int | None = option(
        None,
        int,
        "Most tokens of an answer; 0: none is written, and perplexity is the only score. Default: "
        "those of the longest right one; more for recall.",
        low=0,
        flags=("--max-tokens", "-m"),
    )
    batch_size: int = option(32, int, "Questions answered at once.", low=1)
    timed: int = option(
        5, int, "Prompts of each kind whose time to first token is measured, one by one.", low=0
    )
    predictions: str | None = option(
        None, str, "Write every answer into this JSONL file, and go on from it after a stop."
    )
    skip_bad: bool = option(False, bool, "Count bad lines and go on, instead of stopping.")
    recommend: bool = option(
        False, bool, "Recommend the largest K that is as good as K = 1, within the --budget."
    )
    budget: float | None = option(
        None,
        float,
        "Points of the score that a recommended K may lose against K = 1, with 95% confidence; of "
        f"perplexity, percent that it may grow. Default: {BUDGET:g}.",
        low=0,
    )
    recommend_by: str | None = option(
        None,
        str,
        "The score that --recommend goes by. Default: the table's first; of several groups, the "
        "mean.",
        choices=JUDGED,
    )
    json: bool = option(False, bool, "Print one JSON object on stdout.")
    plot: str | None = option(None, str, "Draw a picture into this file (.png, .svg, .pdf).")

    def clashes(self) -> list[str]:
        """What is wrong with settings that are good alone, one line each."""
        texts = all(isinstance(label, str) for label in self.labels)
        drawn = self.plot and self.predictions
        rules = {
            "found both `data` and `task`, expected one of them": bool(self.data and self.task),
            f"no data: give `data`, or `task` ({', '.join(TASKS)})": (
                not self.data and not self.task
            ),
            FILE_CLASH: self.file is not None and (self.category or self.language) is not None,
            f"`labels` is {short(self.labels)}, expected different texts": (
                not texts or len(set(self.labels)) < len(self.labels)
            ),
            f"`positive` is {self.positive}, expected one of `labels`": (
                self.labels and self.positive not in (None, *self.labels)
            ),
            "`budget` and `recommend_by` are of `recommend`: give it, or leave them out": (
                not self.recommend and (self.budget, self.recommend_by) != (None, None)
            ),
            "`max_tokens` is 0, so no answer is written, and recall is scored by answers": (
                self.max_tokens == 0 and self.task == RECALL
            ),
            f"`max_tokens` is 0, so no answer is written: give `recommend_by` {PERPLEXITY}": (
                self.max_tokens == 0 and self.recommend and self.recommend_by != PERPLEXITY
            ),
            "`plot` and `predictions` are the same file": (
                drawn and Path(self.plot).resolve() == Path(self.predictions).resolve()
            ),
        }
        return [text for text, broken in rules.items() if broken]

    @property
    def baselines(self) -> tuple[str, ...]:
        """The baselines to measure, in the order in which they are shown."""
        return tuple(name for name in BASELINES if {name, ALL} & {*self.baseline})
