"""The paper's first task: is X the parent of Y in a tree written as text?

The paper asks every ordered pair of nodes, so that always saying "false" scores 1 - 1/n; by default
we ask as many true as false ones, and the false ones are mostly near misses.

Source: arXiv 2604.15153 (textualized tree). Randomness comes from ``random.Random.random`` alone,
whose sequence Python guarantees for a seed: the same trees on every machine and Python.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle, permutations
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import Any, ClassVar, TypeVar

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data.tasks import Item, Progress, Task, fingerprint, pair, write_splits
from kmerge_mlx.errors import DataError, SettingsError

NAMES = tuple(a + b for a in ascii_uppercase for b in ascii_uppercase)

EDGE = "edge"
REVERSED = "reversed"  # asked the wrong way round
GRANDPARENT = "grandparent"
SIBLING = "sibling"
UNCLE = "uncle"  # on the parent's level, but not the parent
OTHER = "other"
NEGATIVES = (REVERSED, GRANDPARENT, SIBLING, UNCLE, OTHER)
FIND_PARENT = "find_parent"
_MOST_DRAWS = 10_000  # the smallest space of trees, `small`, holds 600 million

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """How large the trees of a curriculum stage grow; SettingsError where none of two nodes can.

    The root's depth is 0, and a node without room for ``min_children`` has none. The batch sizes
    are the paper's rows a device, for K = 2 and 3, and for K = 4.
    """

    max_depth: int
    max_nodes: int
    min_children: int
    max_children: int
    batch_size: int | None = None
    batch_size_k4: int | None = None

    def __post_init__(self) -> None:
        most = min(self.max_children, self.max_nodes - 1)
        if self.max_depth < 1 or not max(1, self.min_children) <= most:
            raise SettingsError(f"{self}: no tree of two nodes can grow")
        if self.max_nodes > len(NAMES):
            raise SettingsError(f"`max_nodes` is {self.max_nodes:,} of only {len(NAMES)} names")


STAGES = {
    "small": Stage(2, 3, 0, 2, 282, 320),
    "xsmall": Stage(3, 5, 0, 2, 192, 320),
    "medium": Stage(3, 10, 0, 3, 144, 192),
    "xmedium": Stage(4, 15, 1, 3, 96, 128),
    "large": Stage(4, 30, 1, 3, 48, 48),
    "x3large": Stage(4, 150, 3, 5, 16, 16),
}


@dataclass(frozen=True)
class Tree:
    """A tree, its nodes depth first: names, and parents by index (the root's is -1)."""

    names: tuple[str, ...]
    parents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Each node's distance from the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def text(self) -> str:
        """One row a node: ``+`` times its depth, then its name."""
        rows = zip(self.depths, self.names, strict=True)
        return "\n".join("+" * depth + name for depth, name in rows)

    def edges(self) -> list[tuple[int, int]]:
        """Every (parent, child), children depth first."""
        return [(parent, child) for child, parent in enumerate(self.parents) if child]

    def pairs(self) -> dict[str, list[tuple[int, int]]]:
        """Every ordered pair that is reversed, grandparent or sibling, by kind."""
        edges, families = self.edges(), defaultdict(list)
        for parent, child in edges:
            families[parent].append(child)
        return {
            REVERSED: [(child, parent) for parent, child in edges],
            GRANDPARENT: [(self.parents[p], c) for p, c in edges if p],
            SIBLING: [pair for family in families.values() for pair in permutations(family, 2)],
        }

    def kind(self, parent: int, child: int) -> str:
        """How two different nodes are related."""
        above = self.parents[child]
        if above == parent:
            return EDGE
        if self.parents[parent] == child:
            return REVERSED
        if above >= 0 and self.parents[above] == parent:
            return GRANDPARENT
        if above >= 0 and self.parents[parent] == above:
            return SIBLING
        return UNCLE if self.depths[parent] + 1 == self.depths[child] else OTHER

    def uncles(self) -> int:
        """How many ordered pairs are of the kind uncle."""
        levels = Counter(self.depths)
        return sum(levels[d - 1] * n for d, n in levels.items() if d) - len(self) + 1


@dataclass(frozen=True)
class Question:
    """A question about a tree."""

    prompt: str
    answer: str  # true or false, or the parent's name
    kind: str  # how the nodes are related, or find_parent
    depth: int  # of the child


@dataclass(frozen=True)
class TreeTask(Task):
    """Trees of a stage and the questions about them.

    A training run knows its data by this class's ``repr``: a field more, and it cannot be resumed.
    By default ``valid`` and ``test`` get a hundredth of the trees each, and ``train`` the rest.
    """

    stage: str | Stage = "medium"  # one of the six by name, or a stage of one's own
    num_trees: int = 10_000  # in all splits together
    seed: int = DATA_SEED
    questions_per_tree: int = 8  # most true/false questions of a tree, half of each
    find_parent: int = 0  # most questions for a parent's name that a tree gets as well
    reference_sampling: bool = False  # ask every ordered pair of nodes, as the paper's code does
    splits: Mapping[str, int] = field(default_factory=dict)  # trees of those not as by default
    max_nodes: int | None = None  # of a tree, in place of the stage's

    name: ClassVar[str] = "textualized-tree"

    def __post_init__(self) -> None:
        if not isinstance(self.stage, Stage) and self.stage not in STAGES:
            raise DataError(f"stage is {self.stage!r}, expected one of {', '.join(STAGES)}")
        if self.questions_per_tree % 2:
            raise SettingsError(
                f"`questions_per_tree` is {self.questions_per_tree}, expected an even number: "
                "half of the questions are true"
            )
        trees, _ = self.trees(), self.limits  # a stage cut too small is refused
        if trees["train"] < 0 or not any(trees.values()):
            raise SettingsError(
                f"{self.name}: {self.num_trees} trees, expected more than {trees['valid']} for "
                f"validation and {trees['test']} to test"
            )

    @property
    def limits(self) -> Stage:
        """The stage, cut to ``max_nodes``."""
        stage = self.stage if isinstance(self.stage, Stage) else STAGES[self.stage]
        return stage if self.max_nodes is None else replace(stage, max_nodes=self.max_nodes)

    def trees(self) -> dict[str, int]:
        """How many trees each split holds."""
        share = max(1, self.num_trees // 100)
        valid, test = (self.splits.get(split, share) for split in ("valid", "test"))
        train = self.splits.get("train", self.num_trees - valid - test)
        return {"train": train, "valid": valid, "test": test}

    def tree(self, split: str, index: int, earlier: set[int] | None = None) -> tuple[Tree, Random]:
        """Draws one tree of a split, whatever was drawn before, to be asked with its generator.

        A tree of a single node is drawn again, and so is one whose fingerprint is in ``earlier``,
        those of earlier splits (test first, then validation). Raises DataError when the stage has
        no other trees.
        """
        stage = self.limits
        limits = f"{stage.max_depth} {stage.max_nodes} {stage.min_children} {stage.max_children}"
        rng = Random(f"{self.name} {limits} {split} {self.seed} {index}")
        for _ in range(_MOST_DRAWS):
            tree = draw_tree(rng, stage)
            if len(tree) > 1 and not (earlier and fingerprint(tree.text) in earlier):
                return tree, rng
        raise DataError(f"{self.name}: {stage} has too few distinct trees for so large splits")

    def draw(
        self, split: str, index: int, earlier: set[int] | None = None
    ) -> tuple[Tree, list[Question]]:
        """Draws one tree and its questions; arguments and errors are those of :meth:`tree`."""
        tree, rng = self.tree(split, index, earlier)
        return tree, [_question(tree, *pair) for pair in self._asked(tree, rng)]

    def question(
        self, split: str, index: int, number: int, earlier: set[int] | None = None
    ) -> Question:
        """Draws one of :meth:`draw`'s questions, counted around; the others are not written."""
        tree, rng = self.tree(split, index, earlier)
        asked = self._asked(tree, rng)
        return _question(tree, *asked[number % len(asked)])

    def _write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        trees = {split: size for split, size in self.trees().items() if size}
        done, total = 0, sum(trees.values())

        def rows(split: str, earlier: set[int]) -> Iterator[Item]:
            nonlocal done
            for index in range(trees[split]):
                tree, questions = self.draw(split, index, earlier)
                for asked in questions:
                    label = FIND_PARENT if asked.kind == FIND_PARENT else asked.answer
                    false = {"negatives": asked.kind} if asked.answer == "false" else {}
                    counted = {"labels": label, **false, "depths": asked.depth}
                    yield pair(asked.prompt, asked.answer, tree.text, counted)
                done += 1
                if done % 100 == 0 or done == total:
                    progress(done, total)

        return {
            "task": self.name,
            "stage": self.stage if isinstance(self.stage, str) else vars(self.stage),
            **({} if self.max_nodes is None else {"max_nodes": self.max_nodes}),
            "seed": self.seed,
            "reference_sampling": self.reference_sampling,
            "questions_per_tree": None if self.reference_sampling else self.questions_per_tree,
            FIND_PARENT: self.find_parent,
            "trees": trees,
            **write_splits(folder, reversed(trees), rows, "trees"),
        }

    def _asked(self, tree: Tree, rng: Random) -> list[tuple[int | None, int]]:
        """What a tree is asked, in random order: parent and child, or None and a child."""
        asked: list[tuple[int | None, int]]
        if self.reference_sampling:
            nodes = range(len(tree))
            asked = [(p, c) for p in nodes for c in nodes if p != c]
        else:
            true = take(rng, tree.edges(), self.questions_per_tree // 2)
            asked = [*true, *_negatives(tree, rng, len(true))]
        children = take(rng, range(1, len(tree)), self.find_parent)
        return take(rng, asked + [(None, child) for child in children])


def _negatives(tree: Tree, rng: Random, count: int) -> list[tuple[int, int]]:
    """False pairs: every second one an uncle, between them the other kinds by turns.

    An uncle lies one level above the child, as its parent does: with fewer of them, comparing two
    depths would answer 98% of the questions without reading the tree; so it is 76%.
    """
    listed = tree.pairs()
    known = len(tree.edges()) + tree.uncles() + sum(map(len, listed.values()))
    sizes = {UNCLE: tree.uncles(), OTHER: len(tree) * (len(tree) - 1) - known}
    left = {kind: take(rng, pairs, count) for kind, pairs in listed.items()}
    for kind, n in sizes.items():
        found: dict[tuple[int, int], None] = {}  # as many different pairs as there are, or asked
        while len(found) < min(count, n):
            parent, child = below(rng, len(tree)), below(rng, len(tree))
            if parent != child and tree.kind(parent, child) == kind:
                found[parent, child] = None
        left[kind] = list(found)
    turns = [kind for other in take(rng, NEGATIVES) if other != UNCLE for kind in (UNCLE, other)]
    chosen: list[tuple[int, int]] = []
    for kind in cycle(turns):
        if len(chosen) == count:
            break
        if left[kind]:
            chosen.append(left[kind].pop())
    return chosen


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


def draw_tree(rng: Random, stage: Stage) -> Tree:
    """Draws a tree as the paper's code does, depth first.

    A node is named and counted when it is visited. Above ``max_depth``, if there is room for
    ``min_children``, the number of its children is uniform up to ``max_children`` or the room; of
    those, each is left out if its elder siblings' offspring have taken the room meanwhile.
    """
    left, names, parents = list(NAMES), [], []

    def visit(parent: int, depth: int) -> None:
        node = len(parents)
        parents.append(parent)
        names.append(_pop(rng, left))
        most = min(stage.max_children, stage.max_nodes - len(parents))
        if depth >= stage.max_depth or most < stage.min_children:
            return
        for _ in range(stage.min_children + below(rng, most - stage.min_children + 1)):
            if len(parents) < stage.max_nodes:
                visit(node, depth + 1)

    visit(-1, 0)
    return Tree(tuple(names), tuple(parents))


def below(rng: Random, n: int) -> int:
    """A whole number from 0 to n - 1."""
    return int(rng.random() * n)


def take(rng: Random, items: Sequence[T], count: int | None = None) -> list[T]:
    """Some of the items (all of them by default) in random order, none twice."""
    left = list(items)
    return [_pop(rng, left) for _ in range(len(left) if count is None else min(count, len(left)))]


def _pop(rng: Random, left: list[T]) -> T:
    i = below(rng, len(left))
    left[i], left[-1] = left[-1], left[i]
    return left.pop()
