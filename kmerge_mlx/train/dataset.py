"""What a run trains on: tokenized examples by index, checked before the first step.

Owns: the checks that a row fits K and the longest row, and trees that are drawn when they are asked
for. Does not know batches or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.layout import TokenizedExample, tokenize
from kmerge_mlx.data.sources import SPLITS, ExampleList
from kmerge_mlx.data.splits import fingerprint
from kmerge_mlx.data.textualized_tree import TreeTask
from kmerge_mlx.errors import DataError, KMergeError
from kmerge_mlx.prompts.policy import DEFAULT_LAYOUT, Layout
from kmerge_mlx.prompts.segments import Segment

Progress = Callable[[int, int], None]

REFERENCE_QUESTIONS = 8
"""Pairs that each tree is asked about when all of them might be."""

PROMPTS_SEEN = 200
"""Prompts that say how far those of a set are compressed."""


@dataclass(frozen=True)
class Limits:
    """What a row must keep to.

    Args:
        merge_factor: K.
        max_seq_length: Most positions, merged prompt and answer together.
        layout: What merges where nothing is said, and whether a chat template applies.
    """

    merge_factor: int
    max_seq_length: int
    layout: Layout = DEFAULT_LAYOUT

    def tokenize(self, tokenizer: Any, example: Example) -> TokenizedExample:
        """Turns an example into ids that keep to the limits.

        Raises:
            DataError: A row that is too long, or a prompt shorter than a block.
            PromptError: As for ``data.layout.tokenize``.
        """
        row = tokenize(tokenizer, example, self.layout)
        merged = sum(len(segment.ids) for segment in row.segments if segment.merge)
        if 0 < merged < self.merge_factor:
            raise DataError(
                f"found {merged} tokens to merge, expected at least --k {self.merge_factor}: "
                "leave the row out (--skip-bad), or use a smaller K"
            )
        length = num_positions(row, self.merge_factor)
        if length > self.max_seq_length:
            raise DataError(
                f"found {length:,} positions ({row.num_tokens:,} tokens), expected at most "
                f"--max-seq-length {self.max_seq_length:,}"
            )
        return row


def num_positions(row: TokenizedExample, merge_factor: int) -> int:
    """How many positions a row takes: its merged prompt and its answer."""
    blocks = [-(-len(s.ids) // merge_factor) if s.merge else len(s.ids) for s in row.segments]
    return sum(blocks) + len(row.answer_ids)


def prompt_compression(rows: Sequence[TokenizedExample], merge_factor: int) -> float:
    """Compression ratio of the prompts of a set, of up to 200 evenly spread ones."""
    tokens = positions = 0
    for i in range(0, len(rows), -(-len(rows) // PROMPTS_SEEN)):
        prompt = replace(rows[i], answer_ids=[])
        tokens += prompt.num_tokens
        positions += num_positions(prompt, merge_factor)
    return tokens / positions


class TokenizedSet(Sequence[TokenizedExample]):
    """The examples of a split as ids, all tokenized and checked at once, 4 bytes a token.

    Args:
        examples: Where they come from.
        tokenizer: mlx-lm's tokenizer wrapper.
        limits: What each of them must keep to.
        skip_bad: Count rows that do not and go on, instead of stopping at the first.
        progress: Called with (rows done, rows in all).

    Attributes:
        bad: How many rows were left out, unreadable lines included.

    Raises:
        DataError: A bad row, named with its file and line; or no row is left.
    """

    def __init__(
        self,
        examples: ExampleList,
        tokenizer: Any,
        limits: Limits,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ):
        self.bad = examples.bad
        self._rows: list[tuple[list[tuple[np.ndarray, bool]], np.ndarray]] = []
        problem = ""
        for i in range(len(examples)):
            try:
                row = limits.tokenize(tokenizer, examples[i])
            except KMergeError as error:
                problem = f"{examples.where(i)}: {error}"
                if not skip_bad:
                    raise DataError(problem) from None
                self.bad += 1
            else:
                self._append(row)
            if progress is not None and (i % 100 == 99 or i + 1 == len(examples)):
                progress(i + 1, len(examples))
        if not self._rows:
            raise DataError(f"no row is left to train on: {problem or 'the split is empty'}")

    def _append(self, row: TokenizedExample) -> None:
        segments = [(np.array(s.ids, np.int32), s.merge) for s in row.segments]
        self._rows.append((segments, np.array(row.answer_ids, np.int32)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        """An example's ids."""
        segments, answer = self._rows[index]
        return TokenizedExample(
            [Segment(ids.tolist(), merge) for ids, merge in segments], answer.tolist()
        )

    @property
    def digest(self) -> str:
        """SHA-256 of all ids, by which a resumed run knows its data, tokenizer and template."""
        digest = hashlib.sha256()
        for segments, answer in self._rows:
            for ids, merge in segments:
                digest.update(f"{len(ids)} {merge} ".encode() + ids.tobytes())
            digest.update(f"{len(answer)}\n".encode() + answer.tobytes())
        return digest.hexdigest()

    def num_answer_tokens(self, index: int) -> int:
        """How many tokens an example's answer has."""
        return len(self._rows[index][1])

    def set_answer(self, index: int, answer_ids: Sequence[int], limits: Limits) -> None:
        """Gives an example the answer it lacks, cut to the longest row if need be."""
        segments, _ = self._rows[index]
        row = replace(self[index], answer_ids=[])
        room = limits.max_seq_length - num_positions(row, limits.merge_factor)
        self._rows[index] = (segments, np.array(answer_ids[: max(room, 1)], np.int32))


class TreeSet(Sequence[TokenizedExample]):
    """Questions about trees, drawn when they are asked for: any number of them, none stored.

    Every tree is asked one true and one false question, and where the task says so for the name of
    a node's parent.

    Args:
        task: What to draw.
        split: Which split.
        earlier: Fingerprints of trees of earlier splits, none of which is drawn.
        tokenizer: mlx-lm's tokenizer wrapper.
        limits: What each row must keep to.

    Attributes:
        digest: SHA-256 by which a resumed run knows its data.
        bad: 0.
    """

    def __init__(
        self, task: TreeTask, split: str, earlier: set[int], tokenizer: Any, limits: Limits
    ):
        self._task, self._split, self._earlier = task, split, earlier
        self._tokenizer, self._limits = tokenizer, limits
        self._questions = 2 + task.find_parent
        if task.reference_sampling:
            self._questions = REFERENCE_QUESTIONS + task.find_parent
        self.bad = 0
        first = self[0] if len(self) else None  # stands for the tokenizer and its template
        self.digest = hashlib.sha256(f"{task} {split} {first}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._task.trees()[self._split] * self._questions

    def __getitem__(self, index: int) -> TokenizedExample:
        """Draws a question.

        Raises:
            DataError: It does not keep to the limits.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        tree, number = divmod(index, self._questions)
        question = self._task.question(self._split, tree, number, self._earlier)
        example = Example(question.prompt, None, question.answer)
        try:
            return self._limits.tokenize(self._tokenizer, example)
        except KMergeError as error:
            where = f"textualized-tree, {self._split} tree {tree}"
            raise DataError(f"{where}: {error}") from None


def tree_sets(task: TreeTask, tokenizer: Any, limits: Limits) -> dict[str, TreeSet]:
    """The splits of a tree task, with no tree in two of them."""
    sets: dict[str, TreeSet] = {}
    earlier: set[int] = set()
    for split in reversed(SPLITS):
        sets[split] = TreeSet(task, split, earlier, tokenizer, limits)
        if split != "train":
            trees = (task.tree(split, i, earlier)[0] for i in range(task.trees()[split]))
            earlier = earlier | {fingerprint(tree.text) for tree in trees}
    return sets
