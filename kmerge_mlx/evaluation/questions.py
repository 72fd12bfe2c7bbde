"""What an evaluation asks: examples in groups that are scored together, and hidden needles.

Source: the "needle in a haystack" test of long contexts (G. Kamradt, 2023), with generated text
that no model has seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

from kmerge_mlx.data import FILE_TASKS
from kmerge_mlx.data import textualized_tree as trees
from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.data.recall import draw_fact, sentences
from kmerge_mlx.data.sources import data_name, load_examples
from kmerge_mlx.data.tasks import Bar
from kmerge_mlx.errors import EvaluateError, short
from kmerge_mlx.evaluation.settings import LENGTHS, TREE, EvaluateSettings

Count = Callable[[Example], int]
Haystack = Callable[[int], list[Example]]
"""From a number of sentences or rows to prompts of that size, one with the needle at each depth."""

RELATIONSHIP = "relationship"
MOST_LABELS = 20
"""Answers of up to this many kinds, each twice on average, count as labels."""


@dataclass(frozen=True)
class Question:
    """A prompt with the right answer, and the group in which it is scored."""

    example: Example
    group: str
    row: TokenizedExample | None = None  # its ids, once it is tokenized

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, :attr:`answer` first."""
        return self.example.answers or (self.answer,)

    @property
    def answer(self) -> str:
        """The right answer's text."""
        if not self.example.messages:
            return self.example.answer or ""
        content = self.example.messages[-1].get("content") or ""
        if isinstance(content, str):
            return content
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


@dataclass(frozen=True)
class Group:
    """Questions that are scored together."""

    name: str
    labels: tuple[str, ...] = ()  # answers that are classes, the positive one first
    anywhere: bool = False  # an answer that contains the right one is right
    place: tuple[int, float] | None = None  # recall: tokens of the prompt, depth from 0 to 1
    squad: bool = False  # several answers may be right, and are compared as SQuAD does


@dataclass(frozen=True)
class Questions:
    """Everything that is asked, at least one question of each group."""

    items: Sequence[Question]
    groups: tuple[Group, ...]
    bad: int = 0  # rows that were left out
    where: Callable[[int], str] = lambda index: f"question {index + 1}"  # its name in an error
    limits: Mapping[str, int] = field(default_factory=dict)  # most tokens of an answer, by group

    def sizes(self) -> dict[str, int]:
        """How many questions each group has."""
        return Counter(question.group for question in self.items)


def load_questions(settings: EvaluateSettings, bar: Bar) -> Questions:
    """Reads, draws or fetches the questions of all tasks but recall."""
    if settings.task == trees.TreeTask.name:
        return _tree_questions(settings)
    splits = (settings.split,)
    if settings.data is not None:
        found = load_examples(settings.data, RowFormat(), settings.skip_bad, splits)
    else:
        task = FILE_TASKS[settings.task].of(settings, seed=settings.data_seed)
        found = task.examples(splits, bar("Reading"))
    examples, name = found[settings.split], settings.task or data_name(settings.data)
    items = [Question(example, name) for example in examples[: settings.limit]]
    labels = _labels(settings, items, examples.where)
    squad = not labels and any(example.answers for example in examples)
    group = Group(name, labels, squad=squad)
    return Questions(items, (group,), examples.bad, examples.where)


def _tree_questions(settings: EvaluateSettings) -> Questions:
    task = trees.TreeTask(
        settings.stage,
        seed=settings.data_seed,
        questions_per_tree=2,
        find_parent=settings.find_parent,
        reference_sampling=settings.reference_sampling,
        splits={"train": 0, "valid": 0, "test": 0} | {settings.split: settings.num_trees},
        max_nodes=settings.max_nodes,
    )
    items = [
        Question(
            Example(question.prompt, None, question.answer),
            trees.FIND_PARENT if question.kind == trees.FIND_PARENT else RELATIONSHIP,
        )
        for index in range(settings.num_trees)
        for question in task.draw(settings.split, index)[1]
    ]
    pairs = Group(RELATIONSHIP, _positive_first(settings, ["true", "false"]))
    groups = (pairs, Group(trees.FIND_PARENT))
    return Questions(items, groups if settings.find_parent else groups[:1])


def _labels(
    settings: EvaluateSettings, items: Sequence[Question], where: Callable[[int], str]
) -> tuple[str, ...]:
    """The answers that are classes: those that were given, or few answers that come often."""
    answers = [question.answer.strip() for question in items]
    found = Counter(answers)
    if settings.labels:
        for i, answer in enumerate(answers):
            if answer not in settings.labels:
                raise EvaluateError(
                    f"{where(i)}: the answer is {short(answer)}, expected one of `labels` "
                    f"({', '.join(settings.labels)})"
                )
        return _positive_first(settings, settings.labels)
    if any(question.example.answers for question in items):
        return ()
    if len(found) <= MOST_LABELS and 2 * len(found) <= len(items):
        return _positive_first(settings, sorted(found, key=lambda label: (-found[label], label)))
    if settings.positive is not None:
        raise EvaluateError(
            f"`positive` is given, but the {len(items):,} questions have {len(found):,} different "
            "answers, which are too many to be labels: give `labels`, or leave it out"
        )
    return ()


def _positive_first(settings: EvaluateSettings, labels: Sequence[Any]) -> tuple[str, ...]:
    positive = labels[0] if settings.positive is None else settings.positive
    if positive not in labels:
        raise EvaluateError(f"`positive` is {positive}, expected one of {', '.join(labels)}")
    return (positive, *(label for label in labels if label != positive))


def recall_questions(settings: EvaluateSettings, count: Count, bar: Bar) -> Questions:
    """Writes prompts of every length with a needle at every depth, a group for each.

    A prompt has as many sentences or rows as fit into its length; they are the same at every depth.
    A text's question stays raw, and its answer may stand among other words; a tree merges with its
    question, as in training. Raises EvaluateError for a length for which there is no prompt.
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
    """Sentences, one of which states what is asked, as in the rows that ``RecallTask`` draws."""
    taken: set[tuple[str, str]] = set()
    asked, written = draw_fact(rng, taken), []
    more = sentences(rng, taken, asked.kind)

    def haystack(size: int) -> list[Example]:
        written.extend(islice(more, max(0, size - len(written))))
        places = [round(depth * size) for depth in depths]
        texts = [[*written[:at], asked.sentence, *written[at:size]] for at in places]
        return [asked.example(" ".join(text)) for text in texts]

    return haystack(_most(haystack, length, count))


def _tree(rng: Random, length: int, depths: Sequence[float], count: Count) -> list[Example]:
    """A tree, and a node whose parent is asked at each depth of its rows."""

    def haystack(tree: trees.Tree, size: int) -> list[Example]:
        # The first rows of a tree are a tree.
        tree = trees.Tree(tree.names[: size + 2], tree.parents[: size + 2])
        children = [1 + round(depth * (len(tree) - 2)) for depth in depths]
        return [
            Example(
                f"Tree: {tree.text}, Task: Find Parent, Child: {tree.names[child]}, Answer: ",
                None,
                tree.names[tree.parents[child]],
            )
            for child in children
        ]

    for most in (3, 4, 5, 6, 7):  # children of a node, as few as will do
        for _ in range(10):
            tree = trees.draw_tree(rng, trees.Stage(4, len(trees.NAMES), most - 2, most))
            if max(map(count, haystack(tree, len(tree)))) > length:
                return haystack(tree, _most(lambda n, tree=tree: haystack(tree, n), length, count))
    raise EvaluateError(
        f"`length` is {length:,}, and a tree of all {len(trees.NAMES)} names has fewer tokens: use "
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
