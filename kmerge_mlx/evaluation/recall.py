"""A needle at a chosen depth of a long prompt: is it still read after merging?

Owns the prompts: a fact among sentences of no interest, or a node of a tree whose parent is asked.
Does not know models.

Source: the "needle in a haystack" test of long contexts (G. Kamradt, 2023), with generated text:
nothing of it is anyone's, and no model has seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.textualized_tree import NAMES, Stage, Tree, below, draw_tree
from kmerge_mlx.errors import EvaluateError
from kmerge_mlx.evaluation.questions import Bar, Group, Question, Questions
from kmerge_mlx.evaluation.settings import LENGTHS, TREE, EvaluateConfig

_WHO = ("The baker", "A sailor", "My neighbour", "The old teacher", "A young painter", "The guard")
_DOES = ("carried", "described", "forgot", "repaired", "sold", "counted", "cleaned", "painted")
_WHAT = (
    "three chairs",
    "a wooden boat",
    "the blue lamp",
    "some letters",
    "a long map",
    "two bells",
)
_WHERE = ("by the river", "behind the station", "in the market", "near the mill", "on the hill")
_CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Cairo", "Perth", "Dakar", "Turin", "Kyoto", "Lima")
_DIGITS = 5
_DEEPEST = 4
_CHILDREN = (3, 4, 5, 6, 7)
"""The most children of a node, as few as will do; the fewest are two less."""
_DRAWS = 10
_EACH = 8.0  # tokens of a sentence or a row, before one was counted

Count = Callable[[Example], int]
Haystack = Callable[[int], list[Example]]
"""So many sentences or rows, with the needle at each depth."""


def recall_questions(config: EvaluateConfig, count: Count, bar: Bar) -> Questions:
    """Prompts of every length with a needle at every depth.

    A prompt has as many sentences, or rows, as there is room for: no token more than its length.
    The haystack is the same one at every depth.

    Args:
        config: Lengths in tokens, depths, how many prompts of each, and what the haystack is.
        count: The tokens of a prompt, as the model is to read it.
        bar: Shows how far it is.

    Returns:
        The questions, a group for each length and depth. A text's question stays raw, and its
        answer may stand among other words; a tree merges with its question, as in training.

    Raises:
        EvaluateError: A length for which there is no prompt.
    """
    lengths = sorted(set(config.lengths or LENGTHS[config.haystack]))
    depths = sorted(set(config.depths))
    make = _tree if config.haystack == TREE else _text
    items, groups = [], []
    progress, total = bar("Writing prompts"), len(lengths) * config.num_needles
    for length in lengths:
        of_length = [
            Group(
                f"{length:,} tokens, depth {100 * depth:.12g}%", (), make is _text, (length, depth)
            )
            for depth in depths
        ]
        groups += of_length
        for number in range(config.num_needles):
            rng = Random(f"recall {config.haystack} {config.data_seed} {length} {number}")
            examples = make(rng, length, depths, count)
            items += [Question(e, g.name) for e, g in zip(examples, of_length, strict=True)]
            progress(len(items) // len(depths), total)
    return Questions(items, tuple(groups))


def _text(rng: Random, length: int, depths: Sequence[float], count: Count) -> list[Example]:
    """Sentences, between which a city's secret number is told."""
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
        children = [1 + round(depth * size) for depth in depths]
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
            whole = len(tree) - 2
            if max(map(count, haystack(tree, whole))) > length:
                size = _most(lambda n, tree=tree: haystack(tree, n), length, count, whole)
                return haystack(tree, size)
    raise EvaluateError(
        f"--length is {length:,}, and a tree of all {len(NAMES)} names has no more tokens: use "
        "--haystack text"
    )


def _most(haystack: Haystack, length: int, count: Count, too_large: int | None = None) -> int:
    """How large a haystack may be for its longest prompt to keep to a length.

    Args:
        haystack: Its prompts; they grow about evenly.
        length: Most tokens of a prompt.
        count: Counts them.
        too_large: A size that is known to be too large, or None.

    Raises:
        EvaluateError: The needle and its question are longer than that.
    """
    low, tokens = 0, max(map(count, haystack(0)))
    if tokens > length:
        raise EvaluateError(
            f"--length is {length:,}, and a needle and its question alone have {tokens:,} tokens"
        )
    bare, each = tokens, _EACH
    while too_large is None or low + 1 < too_large:
        size = low + max(1, int((length - tokens) / each))
        size = size if too_large is None else min(size, too_large - 1)
        found = max(map(count, haystack(size)))
        each = max((found - bare) / size, 1e-3)
        if found <= length:
            low, tokens = size, found
        else:
            too_large = size
    return low


def _pick(rng: Random, words: Sequence[str]) -> str:
    return words[below(rng, len(words))]
