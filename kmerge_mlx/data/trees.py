"""Trees written as text: how they are drawn, and how their nodes are related.

Owns: the paper's generator (its six stages, the order in which it draws) and the kinds of ordered
pairs of nodes. Does not know questions, prompts or files.

Source: arXiv 2604.15153 (textualized tree); DESIGN section 9. Randomness comes from
``random.Random.random`` alone, whose sequence Python guarantees for a seed: the same trees on every
machine and Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from random import Random
from types import MappingProxyType
from typing import TypeVar

from kmerge_mlx.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES = tuple(a + b for a in LETTERS for b in LETTERS)

EDGE = "edge"
REVERSED = "reversed"  # asked the wrong way round
GRANDPARENT = "grandparent"
SIBLING = "sibling"
UNCLE = "uncle"  # on the parent's level, but not the parent
OTHER = "other"
NEGATIVES = (REVERSED, GRANDPARENT, SIBLING, UNCLE, OTHER)

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """How large the trees of a curriculum stage grow.

    Args:
        max_depth: Depth below which no node has children; the root's is 0.
        max_nodes: Most nodes of a tree.
        min_children: Fewest children of a node that has room for them; else it has none.
        max_children: Most children of a node.
        batch_size: Rows a device in the paper, K = 2 and 3; None for stages of one's own.
        batch_size_k4: The same for K = 4.

    Raises:
        DataError: No tree of two nodes can grow, or there are not enough names.
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
            raise DataError(f"{self}: no tree of two nodes can grow")
        if self.max_nodes > len(NAMES):
            raise DataError(f"max_nodes is {self.max_nodes:,}: there are only {len(NAMES)} names")


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "small": Stage(2, 3, 0, 2, 282, 320),
        "xsmall": Stage(3, 5, 0, 2, 192, 320),
        "medium": Stage(3, 10, 0, 3, 144, 192),
        "xmedium": Stage(4, 15, 1, 3, 96, 128),
        "large": Stage(4, 30, 1, 3, 48, 48),
        "x3large": Stage(4, 150, 3, 5, 16, 16),
    }
)


@dataclass(frozen=True)
class Tree:
    """A tree, its nodes depth first.

    Args:
        names: Each node's name.
        parents: Each node's parent, by index; -1 for the root, which comes first.
    """

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
        return [(parent, child) for child, parent in enumerate(self.parents) if parent >= 0]

    def pairs(self, kind: str) -> list[tuple[int, int]]:
        """Every ordered pair of a kind that is reversed, grandparent or sibling."""
        edges = self.edges()
        if kind == REVERSED:
            return [(child, parent) for parent, child in edges]
        if kind == GRANDPARENT:
            return [(self.parents[p], c) for p, c in edges if self.parents[p] >= 0]
        families: dict[int, list[int]] = {}
        for parent, child in edges:
            families.setdefault(parent, []).append(child)
        return [pair for family in families.values() for pair in permutations(family, 2)]

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


def draw_tree(rng: Random, stage: Stage) -> Tree:
    """Draws a tree as the paper's code does, depth first.

    A node is named and counted when it is visited. Above ``max_depth``, if there is room for
    ``min_children``, the number of its children is uniform up to ``max_children`` or the room; of
    those, each is left out if its elder siblings' offspring have taken the room meanwhile.
    """
    names, parents = _unused_names(rng), []

    def visit(parent: int, depth: int) -> None:
        node = len(parents)
        parents.append(parent)
        drawn.append(next(names))
        most = min(stage.max_children, stage.max_nodes - len(parents))
        if depth >= stage.max_depth or most < stage.min_children:
            return
        for _ in range(stage.min_children + below(rng, most - stage.min_children + 1)):
            if len(parents) < stage.max_nodes:
                visit(node, depth + 1)

    drawn: list[str] = []
    visit(-1, 0)
    return Tree(tuple(drawn), tuple(parents))


def below(rng: Random, n: int) -> int:
    """A whole number from 0 to n - 1."""
    return int(rng.random() * n)


def take(rng: Random, items: Sequence[T], count: int | None = None) -> list[T]:
    """Some of the items (all of them by default) in random order, none twice."""
    left, taken = list(items), []
    for _ in range(len(left) if count is None else min(count, len(left))):
        i = below(rng, len(left))
        left[i], left[-1] = left[-1], left[i]
        taken.append(left.pop())
    return taken


def _unused_names(rng: Random) -> Iterator[str]:
    left = list(NAMES)
    while left:
        i = below(rng, len(left))
        left[i], left[-1] = left[-1], left[i]
        yield left.pop()
