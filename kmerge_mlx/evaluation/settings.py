"""Every setting of an evaluation, checked before anything is loaded.

Owns :class:`EvaluateConfig`, the names of tasks, methods and baselines, and their defaults. Knows
nothing of arrays: ``kmerge-mlx evaluate --help`` imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kmerge_mlx.config import DATA_SEED, is_int, is_number
from kmerge_mlx.data import TASKS
from kmerge_mlx.data.textualized_tree import STAGES
from kmerge_mlx.errors import EvaluateError, findings
from kmerge_mlx.prompts.policy import MERGES

RECALL = "recall"
EVALUATED = (*TASKS, RECALL)
SPLITS = ("test", "valid")
TEXT, TREE = "text", "tree"
HAYSTACKS = (TEXT, TREE)

MERGED, UNCOMPRESSED = "merged", "uncompressed"
MEAN, TRUNCATE, STRIDE = "mean", "truncate", "stride"
ALL = "all"
BASELINES = (UNCOMPRESSED, MEAN, TRUNCATE, STRIDE)
"""K=1; the mean of K without the encoder; the last tokens; every K-th token."""

LENGTHS = {TEXT: (512, 2048), TREE: (32, 52)}
"""Tokens of a prompt with a needle, by what it lies in: the bundled model knows 12 nodes."""

MOST_LABELS = 20
"""Answers that are no more than so many different ones are taken for labels."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and on what.

    Args:
        model: Base model, a folder or a hub repo id.
        adapter_path: Adapter folder, or one that holds several; None measures the base alone.
        ks: Merge factors; none: all that the adapter folder holds.
        baselines: Which others to measure, of :data:`BASELINES`.
        data: Folder with the split, or a hub dataset of it; None where there is a task.
        task: One of :data:`EVALUATED`, or None.
        split: Which split of ``data`` or of a task from the hub.
        limit: Most examples of ``data`` or of a task from the hub, the first ones; None for all.
        stage: Trees: how large they grow.
        max_nodes: Trees: most nodes of one; None is the stage's.
        num_trees: Trees: how many, each asked one true and one false question.
        find_parent: Trees: how many of each are to be answered by the name of a parent.
        reference_sampling: Trees: ask every pair, as the paper's code does.
        data_seed: Of whatever is drawn.
        category: Of the reviews; None is the paper's.
        language: Of the commits; None is the paper's.
        file: Reviews, commits: a local file in the dataset's schema.
        haystack: Recall: what the needle lies in.
        lengths: Recall: tokens of the prompts; none: :data:`LENGTHS` of the haystack.
        depths: Recall: where the needle lies, from 0 (first) to 1 (last).
        num_needles: Recall: prompts of every length and depth.
        labels: The answers that are classes; none: found among the answers.
        positive: Label whose F1 is taken; None is the first of the labels, or the most frequent.
        max_tokens: Most tokens of an answer; None: as many as the longest right one has.
        batch_size: Questions answered at once.
        predictions: JSONL file of answers, which a run that was killed goes on with; or None.
        skip_bad: Count bad rows of data and go on.
        merges: What merges where nothing is said; None is as the adapter was trained.
        merge_threshold: Fewest tokens of a context that merges; None likewise.
        chat_template: Whether the tokenizer's template is applied; None likewise.
        trust_remote_code: Let the base model's own Python files run.

    Raises:
        EvaluateError: Settings that are out of range or exclude each other, all of them listed.
    """

    model: str
    adapter_path: str | None = None
    ks: tuple[int, ...] = ()
    baselines: tuple[str, ...] = ()
    data: str | None = None
    task: str | None = None
    split: str = SPLITS[0]
    limit: int | None = None
    stage: str = "medium"
    max_nodes: int | None = None
    num_trees: int = 1000
    find_parent: int = 1
    reference_sampling: bool = False
    data_seed: int = DATA_SEED
    category: str | None = None
    language: str | None = None
    file: str | None = None
    haystack: str = TEXT
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_needles: int = 20
    labels: tuple[str, ...] = ()
    positive: str | None = None
    max_tokens: int | None = None
    batch_size: int = 32
    predictions: str | None = None
    skip_bad: bool = False
    merges: str | None = None
    merge_threshold: int | None = None
    chat_template: bool | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if problems := [*self._out_of_range(), *self._rules()]:
            raise EvaluateError(findings("evaluate", problems))

    def _out_of_range(self) -> Iterator[str]:
        """Values that are none of those there are."""
        least = {"num_trees": 1, "find_parent": 0, "num_needles": 1, "batch_size": 1}
        least |= {
            n: 1 for n in ("limit", "max_tokens", "merge_threshold") if getattr(self, n) is not None
        }
        least |= {"max_nodes": 2} if self.max_nodes is not None else {}
        for name, low in least.items():
            if not is_int(value := getattr(self, name), low):
                flag = f"--{name.replace('_', '-')}"
                yield f"{flag} is {value!r}, expected a whole number of at least {low}"
        for flag, values in {"--k": self.ks, "--length": self.lengths}.items():
            bad = [value for value in values if not is_int(value, 1)]
            yield from (f"{flag} is {value!r}, expected at least 1" for value in bad)
        for depth in self.depths:
            if not (is_number(depth) and 0 <= depth <= 1):
                yield f"--depth is {depth!r}, expected 0 (first) to 1 (last)"
        choices = {
            "--task": ([self.task] if self.task else [], EVALUATED),
            "--baseline": (self.baselines, BASELINES),
            "--split": ([self.split], SPLITS),
            "--stage": ([self.stage], STAGES),
            "--haystack": ([self.haystack], HAYSTACKS),
            "--merges": ([self.merges] if self.merges else [], MERGES),
        }
        for flag, (values, known) in choices.items():
            for value in values:
                if value not in known:
                    yield f"{flag} is {value}, expected one of {', '.join(known)}"

    def _rules(self) -> Iterator[str]:
        """Settings that exclude each other, or miss one another."""
        if self.data and self.task:
            yield "found both --data and --task, expected one of them"
        if not self.data and not self.task:
            yield f"no data: give --data, or --task ({', '.join(EVALUATED)})"
        if not self.depths:
            yield "found no --depth, expected at least one"
        if self.adapter_path is None and any(k != 1 for k in self.ks):
            yield "--k above 1 needs --adapter-path"
        if self.file is not None and not (self.category is self.language is None):
            yield (
                "--category and --language name data of the hub, and there is a --file: "
                "leave them out, or it"
            )
        if len(set(self.labels)) < len(self.labels):
            yield f"--labels are {', '.join(self.labels)}, expected each of them once"
        if self.labels and self.positive not in (None, *self.labels):
            yield f"--positive is {self.positive}, expected one of --labels"
