"""What an evaluation asks: examples, in groups that are scored together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.config import TASKS
from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.data.tasks import load_task
from kmerge_mlx.data.textualized_tree import FIND_PARENT, TreeTask, draw_split
from kmerge_mlx.errors import EvaluateError, short
from kmerge_mlx.evaluation.settings import EvaluateSettings

Bar = Callable[[str], Callable[[int, int], None]]
"""From a label to what is called with (work done, work in all)."""

RELATIONSHIP = "relationship"
MOST_LABELS = 20
"""Answers of up to this many kinds, each twice on average, count as labels."""


@dataclass(frozen=True)
class Question:
    """A prompt with the right answer, and the name of the group that it is scored in."""

    example: Example
    group: str

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
    """Questions that are scored together.

    Args:
        name: Its name.
        labels: The answers, where they are classes: the first is the positive one; or none.
        anywhere: Whether an answer that contains the right one is right.
        place: Length in tokens of a recall prompt, and the needle's depth from 0 to 1; or None.
    """

    name: str
    labels: tuple[str, ...] = ()
    anywhere: bool = False
    place: tuple[int, float] | None = None

    def is_right(self, prediction: str, answer: str) -> bool:
        """Whether a prediction is right; both without white space around them."""
        return answer in prediction if self.anywhere else answer == prediction


@dataclass(frozen=True)
class Questions:
    """Everything that is asked.

    Args:
        items: The questions, at least one of each group.
        groups: Their groups, in the order in which they are shown.
        bad: How many rows were left out.
        where: From a question's index to its place, to name it in an error.
    """

    items: Sequence[Question]
    groups: tuple[Group, ...]
    bad: int = 0
    where: Callable[[int], str] = lambda index: f"question {index + 1}"

    def sizes(self) -> dict[str, int]:
        """How many questions each group has."""
        return Counter(question.group for question in self.items)


def load_questions(settings: EvaluateSettings, bar: Bar) -> Questions:
    """Reads, draws or fetches the questions of all tasks but recall.

    Raises:
        DataError: A bad row (named), or data that cannot be had.
        EvaluateError: Answers that are not labels, though labels were given.
    """
    if settings.task == TASKS[0]:
        return _tree_questions(settings)
    splits = (settings.split,)
    if settings.data is not None:
        found = load_examples(settings.data, RowFormat(), settings.skip_bad, splits)
    else:
        part = settings.category if settings.task == TASKS[1] else settings.language
        drawn = (settings.task, part, settings.file, settings.data_seed, settings.skip_bad)
        found = load_task(*drawn, splits, bar("Reading"))
    examples, name = found[settings.split], settings.task or "data"
    items = [Question(example, name) for example in examples[: settings.limit]]
    # The files that a task was drawn into are gone.
    where = examples.where if settings.data is not None else Questions.where
    return Questions(items, (Group(name, _labels(settings, items, where)),), examples.bad, where)


def _tree_questions(settings: EvaluateSettings) -> Questions:
    task = TreeTask(
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
            FIND_PARENT if question.kind == FIND_PARENT else RELATIONSHIP,
        )
        for _, questions in draw_split(task, settings.split)
        for question in questions
    ]
    groups = (Group(RELATIONSHIP, _positive_first(settings, ["true", "false"])), Group(FIND_PARENT))
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
