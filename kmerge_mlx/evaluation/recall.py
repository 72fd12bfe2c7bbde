"""Questions for `--task recall`: a needle at a chosen depth of a long prompt.

Source: the "needle in a haystack" test of long contexts (G. Kamradt, 2023), with generated text
that no model has seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from random import Random

from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.trees import NAMES, Stage, Tree, below, draw_tree
from kmerge_mlx.errors import EvaluateError
from kmerge_mlx.evaluation.questions import Bar, Group, Question, Questions
from kmerge_mlx.evaluation.settings import LENGTHS, TREE, EvaluateSettings

_WHO = ("The baker", "A sailor", "My neighbour", "The old teacher", "A young painter", "The guard")
_DOES = ("carried", "described", "forgot", "repaired", "sold", "counted", "cleaned", "painted")
_WHAT = (
    "three chairs",
    "a wooden boat",
    "the blue lamp",
    "some letters",
    *("a long map", "two bells"),
)
_WHERE = ("by the river", "behind the station", "in the market", "near the mill", "on the hill")
_CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Cairo", "Perth", "Dakar", "Turin", "Kyoto", "Lima")
_DIGITS = 5
_DEEPEST = 4
_CHILDREN = (3, 4, 5, 6, 7)
"""The most children of a node, as few as will do; the fewest are two less."""
_DRAWS = 10

Count = Callable[[Example], int]
Haystack = Callable[[int], list[Example]]
"""From a number of sentences or rows to prompts of that size, one with the needle at each depth."""


def recall_questions(settings: EvaluateSettings, count: Count, bar: Bar) -> Questions:
    """Writes prompts of every length with a needle at every depth, a group for each.

    A prompt has as many sentences or rows as fit into its length; they are the same at every depth.
    A text's question stays raw, and its answer may stand among other words; a tree merges with its
    question, as in training.

    Raises:
        EvaluateError: A length for which there is no prompt.
    """
    lengths = sorted(set(settings.length or LENGTHS[settings.haystack]))
    depths = sorted(set(settings.depth))
    make = _tree if settings.haystack == TREE else _text
    items, groups = [], []
    progress, total = bar("Writing prompts"), len(lengths) * settings.num_needles
    for length in lengths:
        names = [f"{length:,} tokens, depth {100 * depth:.12g}%" for depth in depths]
        places = [(length, depth) for depth in depths]
        groups += [Group(n, (), make is _text, p) for n, p in zip(names, places, strict=True)]
        for number in range(settings.num_needles):
            rng = Random(f"recall {settings.haystack} {settings.data_seed} {length} {number}")
            examples = make(rng, length, depths, count)
            items += [Question(e, name) for e, name in zip(examples, names, strict=True)]
            progress(len(items) // len(depths), total)
    return Questions(items, tuple(groups))


def _text(rng: Random, length: int, depths: Sequence[float], count: Count) -> list[Example]:
    """Sentences, one of which tells a city's secret number."""
    city, number = _pick(rng, _CITIES), "".join(str(below(rng, 10)) for _ in range(_DIGITS))
    needle = f"The secret number of {city} is {number}."
    question = f"Question: What is the secret number of {city}?\nAnswer:"
    sentences: list[str] = []

    def haystack(size: int) -> list[Example]:
        while len(sentences) < size:
            parts = [_pick(rng, words) for words in (_WHO, _DOES, _WHAT, _WHERE)]
            sentences.append(f"{' '.join(parts)}.")
        texts = []
        for depth in depths:
            at = round(depth * size)
            texts.append(" ".join([*sentences[:at], needle, *sentences[at:size]]))
        return [Example(text, question, f" {number}") for text in texts]

    return haystack(_most(haystack, length, count))


def _tree(rng: Random, length: int, depths: Sequence[float], count: Count) -> list[Example]:
    """A tree, and a node whose parent is asked at each depth of its rows."""

    def haystack(tree: Tree, size: int) -> list[Example]:
        # The first rows of a tree are a tree.
        tree = Tree(tree.names[: size + 2], tree.parents[: size + 2])
        children = [1 + round(depth * (len(tree) - 2)) for depth in depths]
        return [
            Example(
                f"Tree: {tree.text}, Task: Find Parent, Child: {tree.names[child]}, Answer: ",
                None,
                tree.names[tree.parents[child]],
            )
            for child in children
        ]

    for most in _CHILDREN:
        for _ in range(_DRAWS):
            tree = draw_tree(rng, Stage(_DEEPEST, len(NAMES), most - 2, most))
            if max(map(count, haystack(tree, len(tree)))) > length:
                return haystack(tree, _most(lambda n, tree=tree: haystack(tree, n), length, count))
    raise EvaluateError(
        f"`length` is {length:,}, and a tree of all {len(NAMES)} names has fewer tokens: use "
        "`haystack` text"
    )


def _most(haystack: Haystack, length: int, count: Count) -> int:
    """The most sentences or rows with which every prompt keeps to a length in tokens."""

    def tokens(size: int) -> int:
        return max(map(count, haystack(size)))

    if (bare := tokens(0)) > length:
        raise EvaluateError(
            f"`length` is {length:,}, and a needle and its question alone have {bare:,} tokens"
        )
    size = 1
    while tokens(size) <= length:
        size *= 2
    return bisect_right(range(size), length, lo=size // 2, key=tokens) - 1


def _pick(rng: Random, words: Sequence[str]) -> str:
    return words[below(rng, len(words))]
