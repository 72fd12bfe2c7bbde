"""Reads and tokenizes what a run trains on, and checks all of it before the first step.

Source: arXiv 2604.15153 (a stage of the curriculum ends at 85% accuracy, the last one at 95%).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kmerge_mlx.config import is_number
from kmerge_mlx.data import TASKS
from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.layout import TokenizedExample, tokenize
from kmerge_mlx.data.sources import (
    SPLITS,
    ExampleList,
    data_name,
    load_examples,
    load_hub_datasets,
)
from kmerge_mlx.data.tasks import Bar, Progress, fingerprint, silent
from kmerge_mlx.data.textualized_tree import Stage as TreeStage
from kmerge_mlx.data.textualized_tree import TreeTask
from kmerge_mlx.errors import DataError, KMergeError, TrainError, short
from kmerge_mlx.train.settings import TrainSettings

TRAIN_SPLITS = ("train", "valid")
HELD_OUT_TREES = 1000  # trees of the validation split, and of the test split
REFERENCE_QUESTIONS = 8  # about each tree when all pairs of its nodes might be asked
STAGE_SIZES = ("max_depth", "max_nodes", "min_children", "max_children")


def _row(settings: TrainSettings, tokenizer: Any, example: Example) -> TokenizedExample:
    """An example as ids; raises KMergeError if it is too long, or shorter than a block."""
    row = tokenize(tokenizer, example, settings.layout())
    merged = sum(len(segment.ids) for segment in row.segments if segment.merge)
    least, most = settings.ks[0], settings.ks[-1]  # what holds for these holds between them
    if 0 < merged < most and not settings.layout().keep:
        raise DataError(
            f"found {merged} tokens to merge, expected at least `k` = {most}: leave the row "
            "out (`skip_bad`), or use a smaller K"
        )
    length = num_positions(row, least)
    if length > settings.max_seq_length:
        raise DataError(
            f"found {length:,} positions ({row.num_tokens:,} tokens), expected at most "
            f"`max_seq_length` = {settings.max_seq_length:,}"
        )
    return row


def num_positions(row: TokenizedExample, merge_factor: int) -> int:
    """How many positions a row takes: its merged prompt and its answer."""
    blocks = [-(-len(s.ids) // merge_factor) if s.merge else len(s.ids) for s in row.segments]
    return sum(blocks) + len(row.answer_ids)


def prompt_compression(rows: Sequence[TokenizedExample], merge_factor: int) -> float:
    """Compression ratio of the prompts of a set, measured on up to 200 of them."""
    seen = [rows[i] for i in range(0, len(rows), -(-len(rows) // 200))]
    prompts = [replace(row, answer_ids=[]) for row in seen]
    return sum(p.num_tokens for p in prompts) / sum(num_positions(p, merge_factor) for p in prompts)


class TokenizedSet(Sequence[TokenizedExample]):
    """The examples of a split as ids, all tokenized and checked at once, 4 bytes a token.

    Raises DataError for a bad row, named with its file and line, or if no row is left.
    """

    def __init__(
        self,
        examples: ExampleList,
        tokenizer: Any,
        settings: TrainSettings,
        progress: Progress = silent,
    ):
        self._settings = settings
        self.bad = examples.bad  # rows that were left out, unreadable lines included
        self._rows: list[TokenizedExample] = []
        problem = "the split is empty"
        for i in range(len(examples)):
            try:
                self._rows.append(_row(settings, tokenizer, examples[i]).packed())
            except KMergeError as error:
                problem = f"{examples.where(i)}: {error}"
                if not settings.skip_bad:
                    raise DataError(problem) from None
                self.bad += 1
            if i % 100 == 99 or i + 1 == len(examples):
                progress(i + 1, len(examples))
        if not self._rows:
            raise DataError(f"no row is left to train on: {problem}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self._rows[index]

    @property
    def digest(self) -> str:
        """SHA-256 of all ids, by which a resumed run knows its data, tokenizer and template."""
        digest = hashlib.sha256()
        for row in self._rows:
            for part in row.segments:
                digest.update(f"{len(part.ids)} {part.merge} ".encode() + part.ids.tobytes())
            digest.update(f"{len(row.answer_ids)}\n".encode() + row.answer_ids.tobytes())
        return digest.hexdigest()

    def set_answer(self, index: int, answer_ids: Sequence[int]) -> None:
        """Gives an example the answer it lacks, cut to the longest row."""
        row = self._rows[index]
        room = max(self._settings.max_seq_length - num_positions(row, self._settings.ks[0]), 1)
        self._rows[index] = TokenizedExample(row.segments, answer_ids[:room]).packed()


class TreeSet(Sequence[TokenizedExample]):
    """Questions about trees, drawn when they are read, so that none is stored.

    The trees of earlier splits, of which there are fingerprints, are not drawn again.
    """

    bad = 0

    def __init__(
        self, task: TreeTask, split: str, earlier: set[int], tokenizer: Any, settings: TrainSettings
    ):
        self._task, self._split, self._earlier = task, split, earlier
        self._tokenizer, self._settings = tokenizer, settings
        pairs = REFERENCE_QUESTIONS if task.reference_sampling else 2
        self._questions = pairs + task.find_parent
        first = self[0] if len(self) else None  # stands for the tokenizer and its template
        self.digest = hashlib.sha256(f"{task} {split} {first}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._task.trees()[self._split] * self._questions

    def __getitem__(self, index: int) -> TokenizedExample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tree, number = divmod(index, self._questions)
        question = self._task.question(self._split, tree, number, self._earlier)
        try:
            example = Example(question.prompt, None, question.answer)
            return _row(self._settings, self._tokenizer, example)
        except KMergeError as error:
            where = f"textualized-tree, {self._split} tree {tree}"
            raise DataError(f"{where}: {error}") from None


def tree_sets(task: TreeTask, tokenizer: Any, settings: TrainSettings) -> dict[str, TreeSet]:
    """The splits of a tree task; a tree is in one of them alone."""
    sets: dict[str, TreeSet] = {}
    earlier: set[int] = set()
    for split in reversed(SPLITS):
        sets[split] = TreeSet(task, split, earlier, tokenizer, settings)
        size = 0 if split == "train" else task.trees()[split]
        trees = (task.tree(split, i, earlier)[0] for i in range(size))
        earlier = earlier | {fingerprint(tree.text) for tree in trees}
    return sets


@dataclass(frozen=True)
class Stage:
    """The data of a run, or of a stage of its curriculum, which ends at an accuracy."""

    name: str
    train: TokenizedSet | TreeSet
    valid: TokenizedSet | TreeSet | None
    threshold: float | None = None

    @property
    def sets(self) -> dict[str, TokenizedSet | TreeSet]:
        """The data by split; without ``valid`` where there is none."""
        return {"train": self.train} | ({} if self.valid is None else {"valid": self.valid})

    @property
    def digest(self) -> str:
        """SHA-256 by which a resumed run knows its data."""
        return hashlib.sha256(" ".join(s.digest for s in self.sets.values()).encode()).hexdigest()


def load_stages(settings: TrainSettings, tokenizer: Any, bar: Bar) -> list[Stage]:
    """Reads, draws or fetches what a run trains on, and checks all of it."""
    trees = settings.task == TreeTask.name
    stages = _tree_stages(settings, tokenizer) if trees else [_data(settings, tokenizer, bar)]
    for stage in stages:
        if len(stage.train) < settings.batch_size:
            found = f"found {len(stage.train)} examples to train on"
            raise DataError(f"{found}, expected at least `batch_size` = {settings.batch_size}")
    return stages


def _data(settings: TrainSettings, tokenizer: Any, bar: Bar) -> Stage:
    """The data of a run without trees."""
    names = [f.name for f in fields(RowFormat) if f.name != "answers"]
    given = {name: getattr(settings, name) for name in names}
    rows, skip = RowFormat(**given, answers=not settings.teacher_answers), settings.skip_bad
    if settings.task is not None:
        task = TASKS[settings.task].of(settings, seed=settings.data_seed)
        splits = task.examples(TRAIN_SPLITS, bar("Reading"))
    elif settings.hf_dataset is not None:
        splits = load_hub_datasets(settings.hf_dataset, rows, skip, TRAIN_SPLITS)
    elif settings.data is not None:
        splits = load_examples(settings.data, rows, skip, TRAIN_SPLITS)
    else:
        raise DataError(f"found no data: give `data`, or `task` ({', '.join(TASKS)})")
    if "train" not in splits:
        raise DataError(f"{settings.data or 'hf_dataset'} holds no training split (train.jsonl)")
    sets = {
        name: TokenizedSet(examples, tokenizer, settings, bar(f"Tokenizing {name}"))
        for name, examples in splits.items()
    }
    paths = [settings.data] if settings.data else [e["path"] for e in settings.hf_dataset or ()]
    name = settings.task or ", ".join(data_name(path) for path in paths)
    return Stage(name, sets["train"], sets.get("valid"))


def _tree_stages(settings: TrainSettings, tokenizer: Any) -> list[Stage]:
    """The stages of a curriculum of trees, or the only one."""
    found, entries = [], [*(settings.curriculum or [settings.stage])]
    for entry in entries:
        last = len(found) + 1 == len(entries)
        limit = settings.last_threshold if last else settings.stage_threshold
        name, stage, limit = _tree_stage(entry, limit)
        task = TreeTask(
            stage,
            seed=settings.data_seed,
            questions_per_tree=2,
            find_parent=settings.find_parent,
            reference_sampling=settings.reference_sampling,
            splits={"train": settings.num_trees, "valid": HELD_OUT_TREES, "test": HELD_OUT_TREES},
        )
        sets = tree_sets(task, tokenizer, settings)
        threshold = limit if settings.curriculum else None
        found.append(Stage(name, sets["train"], sets["valid"], threshold))
    return found


def _tree_stage(entry: Any, threshold: float) -> tuple[str, str | TreeStage, float]:
    """A stage's name, its sizes and its threshold, from an entry of the curriculum."""
    entry = {"stage": entry} if isinstance(entry, str) else entry
    given = dict(entry) if isinstance(entry, Mapping) else {}
    threshold = given.pop("threshold", threshold)
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise TrainError(
            f"curriculum: the threshold is {short(threshold)}, expected an accuracy from 0 to 1"
        )
    if set(given) == {"stage"} and isinstance(given["stage"], str):
        return given["stage"], given["stage"], threshold
    if set(given) == set(STAGE_SIZES) and all(type(size) is int for size in given.values()):
        return f"{given['max_nodes']} nodes", TreeStage(**given), threshold
    raise TrainError(
        f"curriculum holds {short(entry)}, expected the name of a stage, or a mapping of stage (or "
        f"{', '.join(STAGE_SIZES)}) and, if wanted, threshold"
    )
