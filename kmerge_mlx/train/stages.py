"""What a config names as data, tokenized: one stage, or those of a curriculum.

Owns the way from ``--data``, ``--task`` and ``hf_dataset`` to training and validation sets. Does
not know what a set holds (``dataset``) or how it is read (``order``).

Source: DESIGN section 1 (a stage of the curriculum ends at 85% accuracy, the last at 95%).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.data import HUB_TASKS, TASKS
from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.data.sources import ExampleList, load_examples, load_hub_datasets
from kmerge_mlx.data.textualized_tree import Stage as TreeStage
from kmerge_mlx.data.textualized_tree import TreeTask
from kmerge_mlx.errors import DataError, TrainError, short
from kmerge_mlx.train.dataset import Limits, TokenizedSet, tree_sets
from kmerge_mlx.train.order import batches_of
from kmerge_mlx.train.settings import TrainSettings

TRAIN_SPLITS = ("train", "valid")
HELD_OUT_TREES = 1000
"""Trees each of the validation and the test split."""

Bar = Callable[[str], Callable[[int, int], None]]
"""A label to what is called with (work done, work in all)."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: What to call it.
        train: What is trained on.
        valid: What is validated on, or None.
        threshold: Accuracy at which the stage ends, or None: it lasts as long as the run.
    """

    name: str
    train: Sequence[TokenizedExample]
    valid: Sequence[TokenizedExample] | None
    threshold: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 by which a resumed run knows its data."""
        parts = [part.digest for part in (self.train, self.valid) if part is not None]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load_stages(config: TrainSettings, tokenizer: Any, bar: Bar) -> list[Stage]:
    """Reads, draws or fetches what a config trains on, and checks all of it.

    Args:
        config: The run's.
        tokenizer: mlx-lm's tokenizer wrapper.
        bar: Shows how far it is.

    Raises:
        DataError: No data, a bad row (named), or data that cannot be had.
        TrainError: A curriculum that is none.
    """
    trees = config.task == TreeTask.name
    stages = _tree_stages(config, tokenizer) if trees else [_only_stage(config, tokenizer, bar)]
    for stage in stages:
        batches_of(len(stage.train), config.batch_size)
    return stages


def limits_of(config: TrainSettings) -> Limits:
    """What the rows of a run must keep to."""
    return Limits(config.k, config.max_seq_length, config.layout())


def _only_stage(config: TrainSettings, tokenizer: Any, bar: Bar) -> Stage:
    splits = _examples(config, bar)
    if "train" not in splits:
        raise DataError(f"{config.data or 'hf_dataset'} holds no training split (train.jsonl)")
    limits, skip = limits_of(config), config.skip_bad
    sets = {
        name: TokenizedSet(examples, tokenizer, limits, skip, bar(f"Tokenizing {name}"))
        for name, examples in splits.items()
    }
    return Stage(config.task or "data", sets["train"], sets.get("valid"))


def _examples(config: TrainSettings, bar: Bar) -> dict[str, ExampleList]:
    names = [f.name for f in fields(RowFormat) if f.name != "answers"]
    given = {name: getattr(config, name) for name in names}
    rows = RowFormat(**given, answers=not config.teacher_answers)
    if config.task is not None:
        task = HUB_TASKS[config.task]
        part = getattr(config, task.part_name)
        drawn = task(part, config.file, config.data_seed, config.skip_bad)
        return drawn.examples(TRAIN_SPLITS, bar("Reading"))
    if config.hf_dataset is not None:
        return load_hub_datasets(config.hf_dataset, rows, config.skip_bad, TRAIN_SPLITS)
    if config.data is None:
        raise DataError(f"no data: give --data, or --task ({', '.join(TASKS)})")
    return load_examples(config.data, rows, config.skip_bad, TRAIN_SPLITS)


def _tree_stages(config: TrainSettings, tokenizer: Any) -> list[Stage]:
    entries = [*(config.curriculum or [config.stage])]
    found = []
    for number, entry in enumerate(entries, 1):
        last = number == len(entries)
        limit = config.last_threshold if last else config.stage_threshold
        name, stage, limit = _tree_stage(entry, limit)
        task = TreeTask(
            stage,
            seed=config.data_seed,
            questions_per_tree=2,
            find_parent=config.find_parent,
            reference_sampling=config.reference_sampling,
            splits={"train": config.num_trees, "valid": HELD_OUT_TREES, "test": HELD_OUT_TREES},
        )
        sets = tree_sets(task, tokenizer, limits_of(config))
        found.append(
            Stage(name, sets["train"], sets["valid"], limit if config.curriculum else None)
        )
    return found


def _tree_stage(entry: Any, threshold: float) -> tuple[str, str | TreeStage, float]:
    """A stage's name, its limits and its threshold."""
    if isinstance(entry, str):
        return entry, entry, threshold
    sizes = ("max_depth", "max_nodes", "min_children", "max_children")
    known = {*sizes, "stage", "threshold"}
    if not isinstance(entry, Mapping) or set(entry) - known:
        raise TrainError(f"curriculum holds {short(entry)}, expected a stage or {sorted(known)}")
    threshold = entry.get("threshold", threshold)
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise TrainError(
            f"curriculum: the threshold is {short(threshold)}, expected an accuracy from 0 to 1"
        )
    if isinstance(entry.get("stage"), str) and not set(entry) & set(sizes):
        return entry["stage"], entry["stage"], threshold
    if "stage" in entry or not all(is_int(entry.get(name)) for name in sizes):
        raise TrainError(
            f"curriculum holds {short(entry)}, expected the name of a stage, or {', '.join(sizes)}"
        )
    stage = TreeStage(*(entry[name] for name in sizes))
    return f"{stage.max_nodes} nodes", stage, threshold
