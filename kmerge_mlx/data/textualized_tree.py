"""The paper's first task: is X the parent of Y in a tree written as text?

Owns: the prompts, which questions a tree is asked, the splits by tree, and the task's defaults.
Does not know how trees grow (``trees``) or where rows go (``writing``).

Source: arXiv 2604.15153 (textualized tree); DESIGN sections 8 and 9. The paper asks every ordered
pair of nodes, so that always saying "false" scores 1 - 1/n; by default we ask as many true as false
ones, and the false ones are mostly near misses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from kmerge_mlx.config import DATA_SEED, is_int
from kmerge_mlx.data.fingerprint import fingerprint
from kmerge_mlx.data.sources import SPLITS
from kmerge_mlx.data.trees import (
    EDGE,
    GRANDPARENT,
    NEGATIVES,
    OTHER,
    REVERSED,
    SIBLING,
    STAGES,
    UNCLE,
    Stage,
    Tree,
    below,
    draw_tree,
    take,
)
from kmerge_mlx.errors import DataError, findings

if TYPE_CHECKING:
    from kmerge_mlx.data.writing import Progress, SplitWriter

FIND_PARENT = "find_parent"

# The smallest space of trees, `small`, holds 600 million that can be asked about.
_MOST_DRAWS = 10_000


@dataclass(frozen=True)
class TreeTask:
    """What to draw.

    Args:
        stage: Name of one of the six stages, or a stage of one's own.
        num_trees: Trees in all splits together; each can be asked something.
        seed: The same one gives the same bytes.
        questions_per_tree: Most true/false questions of a tree, half of each; trees with fewer
            edges get fewer.
        find_parent: Most questions of the other kind that a tree gets as well.
        reference_sampling: Ask every ordered pair of distinct nodes, as the paper's code does.
        splits: Trees by split, for those that should not follow from ``num_trees``: a hundredth
            each for ``valid`` and ``test``, the rest for ``train``.
        max_nodes: Most nodes of a tree, in place of the stage's.

    Raises:
        DataError: What cannot be drawn, all of it.
    """

    stage: str | Stage = "medium"
    num_trees: int = 10_000
    seed: int = DATA_SEED
    questions_per_tree: int = 8
    find_parent: int = 0
    reference_sampling: bool = False
    splits: Mapping[str, int] = field(default_factory=dict)
    max_nodes: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, expected a whole number of at least {low}"
            for name, low in (("num_trees", 0), ("find_parent", 0))
            if not is_int(getattr(self, name), low)
        ]
        if not isinstance(self.stage, Stage) and self.stage not in STAGES:
            problems.append(f"stage is {self.stage!r}, expected one of {', '.join(STAGES)}")
        if not is_int(self.questions_per_tree, 2) or self.questions_per_tree % 2:
            problems.append(
                f"questions_per_tree is {self.questions_per_tree!r}, expected an even number: "
                "half of the questions are true"
            )
        if self.max_nodes is not None and not is_int(self.max_nodes, 2):
            problems.append(f"max_nodes is {self.max_nodes!r}, expected at least 2")
        for split, trees in self.splits.items():
            if split not in SPLITS or not is_int(trees):
                problems.append(f"splits: {split} is {trees!r}, expected train, valid, test >= 0")
        if problems:
            raise DataError(findings("textualized-tree", problems))
        trees, _ = self.trees(), self.limits  # a stage cut too small is refused
        if trees["train"] < 0 or not any(trees.values()):
            raise DataError(
                f"textualized-tree: {self.num_trees} trees, expected more than "
                f"{trees['valid']} for validation and {trees['test']} to test"
            )

    @property
    def limits(self) -> Stage:
        """The stage itself, cut to ``max_nodes``."""
        stage = self.stage if isinstance(self.stage, Stage) else STAGES[self.stage]
        return stage if self.max_nodes is None else replace(stage, max_nodes=self.max_nodes)

    def trees(self) -> dict[str, int]:
        """How many trees each split holds."""
        share = max(1, self.num_trees // 100)
        valid, test = (self.splits.get(split, share) for split in ("valid", "test"))
        return {
            "train": self.splits.get("train", self.num_trees - valid - test),
            "valid": valid,
            "test": test,
        }


@dataclass(frozen=True)
class Question:
    """A prompt about a tree, and its answer.

    Args:
        prompt: The tree and the question, as the paper's code writes them.
        answer: ``true`` or ``false``, or the parent's name.
        kind: How the two nodes are related (``trees.Tree.kind``), or ``find_parent``.
        depth: The asked child's distance from the root.
    """

    prompt: str
    answer: str
    kind: str
    depth: int


def draw(
    task: TreeTask, split: str, index: int, earlier: set[int] | None = None
) -> tuple[Tree, list[Question]]:
    """Draws one tree of a split and its questions, whatever was drawn before.

    Args:
        task: What to draw.
        split: The split's name; each has trees of its own.
        index: Which tree of the split, from 0.
        earlier: Fingerprints of trees that it must not be (see :func:`draw_split`).

    Returns:
        The tree and its questions. A tree of one node, of which nothing can be asked, is drawn
        again, and so is one of an earlier split.

    Raises:
        DataError: The stage has no tree left that is in no earlier split.
    """
    tree, rng = draw_alone(task, split, index, earlier)
    return tree, [_question(tree, *pair) for pair in _asked(task, tree, rng)]


def draw_question(
    task: TreeTask, split: str, index: int, number: int, earlier: set[int] | None = None
) -> Question:
    """One of the questions that :func:`draw` gives, counted around; the others are not written."""
    tree, rng = draw_alone(task, split, index, earlier)
    asked = _asked(task, tree, rng)
    return _question(tree, *asked[number % len(asked)])


def draw_alone(
    task: TreeTask, split: str, index: int, earlier: set[int] | None = None
) -> tuple[Tree, Random]:
    """The tree of :func:`draw`, and the generator that its questions are drawn with."""
    stage = task.limits
    limits = f"{stage.max_depth} {stage.max_nodes} {stage.min_children} {stage.max_children}"
    rng = Random(f"textualized-tree {limits} {split} {task.seed} {index}")
    for _ in range(_MOST_DRAWS):
        tree = draw_tree(rng, stage)
        if len(tree) > 1 and not (earlier and fingerprint(tree.text) in earlier):
            return tree, rng
    raise DataError(f"textualized-tree: {stage} has too few distinct trees for so large splits")


def draw_split(
    task: TreeTask, split: str, earlier: set[int] | None = None
) -> Iterator[tuple[Tree, list[Question]]]:
    """Draws all trees of a split.

    Args:
        task: What to draw.
        split: The split's name.
        earlier: Fingerprints of the trees of earlier splits (the test trees come first, then the
            validation trees), none of which is drawn again.
    """
    for index in range(task.trees()[split]):
        yield draw(task, split, index, earlier)


def write(task: TreeTask, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Writes the splits into a folder.

    Args:
        task: What to draw.
        folder: An empty folder.
        progress: Called with (trees drawn, trees in all).

    Returns:
        What was written: rows, distinct trees, labels, kinds and depths of each split.
    """
    # Brings numpy and mlx, which this module's defaults, shown by --help, must not.
    from kmerge_mlx.data.writing import SplitWriter, splits_summary

    trees, writers, done = task.trees(), {}, 0
    earlier: set[int] = set()
    for split in reversed(SPLITS):
        if not trees[split]:
            continue
        with SplitWriter(folder, split) as writer:
            for tree, questions in draw_split(task, split, earlier):
                _write_tree(writer, tree, questions)
                done += 1
                if progress is not None and done % 100 == 0:
                    progress(done, sum(trees.values()))
        writers[split] = writer
        if split != "train":
            earlier |= set(writer.units)
    if progress is not None:
        progress(done, sum(trees.values()))
    named = {split: writers[split] for split in SPLITS if split in writers}
    return {
        "task": "textualized-tree",
        "stage": task.stage if isinstance(task.stage, str) else vars(task.stage),
        **({} if task.max_nodes is None else {"max_nodes": task.max_nodes}),
        "seed": task.seed,
        "reference_sampling": task.reference_sampling,
        "questions_per_tree": None if task.reference_sampling else task.questions_per_tree,
        FIND_PARENT: task.find_parent,
        "trees": {split: trees[split] for split in named},
        **splits_summary(named, "trees"),
    }


def _write_tree(writer: SplitWriter, tree: Tree, questions: list[Question]) -> None:
    for question in questions:
        named = question.kind == FIND_PARENT
        writer.write(
            question.prompt,
            question.answer,
            tree.text,
            labels=FIND_PARENT if named else question.answer,
            negatives=question.kind if question.answer == "false" else None,
            depths=question.depth,
        )


def _asked(task: TreeTask, tree: Tree, rng: Random) -> list[tuple[int | None, int]]:
    """What a tree is asked, in random order: parent and child, or None and a child to find it."""
    asked: list[tuple[int | None, int]]
    if task.reference_sampling:
        nodes = range(len(tree))
        asked = [(p, c) for p in nodes for c in nodes if p != c]
    else:
        true = take(rng, tree.edges(), task.questions_per_tree // 2)
        asked = [*true, *_negatives(tree, rng, len(true))]
    children = take(rng, range(1, len(tree)), task.find_parent)
    return take(rng, asked + [(None, child) for child in children])


def _negatives(tree: Tree, rng: Random, count: int) -> list[tuple[int, int]]:
    """False pairs: every second one an uncle, between them the other kinds by turns.

    Only an uncle lies one level above the child, as its parent does. If all kinds took turns alike,
    comparing two depths would answer 98% of the questions without reading the tree; so it is 76%.
    """
    listed = {kind: tree.pairs(kind) for kind in (REVERSED, GRANDPARENT, SIBLING)}
    known = len(tree.edges()) + tree.uncles() + sum(map(len, listed.values()))
    sizes = {UNCLE: tree.uncles(), OTHER: len(tree) * (len(tree) - 1) - known}
    left = {kind: take(rng, pairs, count) for kind, pairs in listed.items()}
    left |= {kind: _pairs_of(tree, rng, kind, min(count, n)) for kind, n in sizes.items()}
    turns = [kind for other in take(rng, NEGATIVES) if other != UNCLE for kind in (UNCLE, other)]
    chosen: list[tuple[int, int]] = []
    for kind in cycle(turns):
        if len(chosen) == count:
            break
        if left[kind]:
            chosen.append(left[kind].pop())
    return chosen


def _pairs_of(tree: Tree, rng: Random, kind: str, count: int) -> list[tuple[int, int]]:
    """Pairs of a kind, none twice; ``count`` of them must exist."""
    chosen: dict[tuple[int, int], None] = {}
    while len(chosen) < count:
        parent, child = below(rng, len(tree)), below(rng, len(tree))
        if parent != child and tree.kind(parent, child) == kind:
            chosen[parent, child] = None
    return list(chosen)


def _question(tree: Tree, parent: int | None, child: int) -> Question:
    name, depth = tree.names[child], tree.depths[child]
    if parent is None:
        prompt = f"Tree: {tree.text}, Task: Find Parent, Child: {name}, Answer: "
        return Question(prompt, tree.names[tree.parents[child]], FIND_PARENT, depth)
    prompt = (
        f"Tree: {tree.text}, Task: Parent/Child Relationship, "
        f"Parent: {tree.names[parent]}, Child: {name}, Answer: "
    )
    kind = tree.kind(parent, child)
    return Question(prompt, "true" if kind == EDGE else "false", kind, depth)
