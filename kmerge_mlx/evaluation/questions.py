"""What an evaluation asks: examples in groups that are scored alike.

Owns the way from a config's data or task to questions, and which answers are labels. Does not know
models or tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.data import HUB_TASKS
from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.data.textualized_tree import FIND_PARENT, TreeTask
from kmerge_mlx.errors import EvaluateError, short
from kmerge_mlx.evaluation.settings import MOST_LABELS, EvaluateConfig

Bar = Callable[[str], Callable[[int, int], None]]
"""A label to what is called with (work done, work in all)."""
Where = Callable[[int], str]
"""A question's index to where it comes from, to name it in an error."""

RELATIONSHIP = "relationship"
TRUE, FALSE = "true", "false"


def numbered(index: int) -> str:
    """Names a question that stands in no file."""
    return f"question {index + 1}"


@dataclass(frozen=True)
class Question:
    """One prompt and the answer that is right.

    Args:
        example: Prompt and answer.
        group: Name of the group that it is scored in.
    """

    example: Example
    group: str

    @property
    def answer(self) -> str:
        """The right answer."""
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
        name: What to call them.
        labels: The answers, where they are classes: the first is the positive one; or none.
        anywhere: Whether an answer that says more is right as well.
        place: Of needles, the prompt's length in tokens and the depth they lie at; or None.
    """

    name: str
    labels: tuple[str, ...] = ()
    anywhere: bool = False
    place: tuple[int, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """What it has, by name: its labels, or its place."""
        named: dict[str, Any] = {"labels": list(self.labels)} if self.labels else {}
        if self.place is not None:
            named |= dict(zip(("length", "depth"), self.place, strict=True))
        return named

    def is_right(self, prediction: str, answer: str) -> bool:
        """Whether a prediction is right, white space around it aside."""
        wanted, found = answer.strip(), prediction.strip()
        return wanted in found if self.anywhere else wanted == found


@dataclass(frozen=True)
class Questions:
    """Everything that is asked.

    Args:
        items: The questions, at least one of each group.
        groups: Their groups, in the order in which they are shown.
        bad: Rows that were left out.
        where: Where a question comes from.
    """

    items: Sequence[Question]
    groups: tuple[Group, ...]
    bad: int = 0
    where: Where = numbered

    def sizes(self) -> dict[str, int]:
        """How many questions each group has."""
        return Counter(question.group for question in self.items)


def load_questions(config: EvaluateConfig, bar: Bar) -> Questions:
    """Reads, draws or fetches what a config asks; all but recall, which needs a tokenizer.

    Args:
        config: What is asked.
        bar: Shows how far it is.

    Raises:
        DataError: A bad row (named), or data that cannot be had.
        EvaluateError: Answers that are no labels, though labels were given.
    """
    if config.task == TreeTask.name:
        return _tree_questions(config)
    splits = (config.split,)
    if config.data is not None:
        found = load_examples(config.data, RowFormat(), config.skip_bad, splits)
    else:
        task = HUB_TASKS[config.task]
        part = getattr(config, task.part_name)
        drawn = task(part, config.file, config.data_seed, config.skip_bad)
        found = drawn.examples(splits, bar("Reading"))
    examples = found[config.split]
    name = config.task or "data"
    items = [Question(example, name) for example in examples[: config.limit]]
    # What a task drew stands in no file any more.
    where = examples.where if config.data is not None else numbered
    return Questions(items, (Group(name, _labels(config, items, where)),), examples.bad, where)


def _tree_questions(config: EvaluateConfig) -> Questions:
    task = TreeTask(
        config.stage,
        seed=config.data_seed,
        questions_per_tree=2,
        find_parent=config.find_parent,
        reference_sampling=config.reference_sampling,
        splits={"train": 0, "valid": 0, "test": 0} | {config.split: config.num_trees},
        max_nodes=config.max_nodes,
    )
    items = [
        Question(
            Example(question.prompt, None, question.answer),
            FIND_PARENT if question.kind == FIND_PARENT else RELATIONSHIP,
        )
        for _, questions in task.draw_split(config.split)
        for question in questions
    ]
    groups = (Group(RELATIONSHIP, _positive_first(config, (TRUE, FALSE))), Group(FIND_PARENT))
    return Questions(items, groups if config.find_parent else groups[:1])


def _labels(config: EvaluateConfig, items: Sequence[Question], where: Where) -> tuple[str, ...]:
    """The answers that are classes: those that were given, or few answers that come often."""
    answers = [question.answer.strip() for question in items]
    found = Counter(answers)
    if config.labels:
        for i, answer in enumerate(answers):
            if answer not in config.labels:
                raise EvaluateError(
                    f"{where(i)}: the answer is {short(answer)}, expected one of --labels "
                    f"({', '.join(config.labels)})"
                )
        return _positive_first(config, config.labels)
    if len(found) <= MOST_LABELS and 2 * len(found) <= len(items):
        labels = sorted(found, key=lambda label: (-found[label], label))
        return _positive_first(config, tuple(labels))
    if config.positive is not None:
        raise EvaluateError(
            f"found --positive, but {len(found):,} different answers to {len(items):,} questions "
            "are no labels: give --labels, or leave it out"
        )
    return ()


def _positive_first(config: EvaluateConfig, labels: tuple[str, ...]) -> tuple[str, ...]:
    positive = labels[0] if config.positive is None else config.positive
    if positive not in labels:
        raise EvaluateError(f"--positive is {positive}, expected one of {', '.join(labels)}")
    return (positive, *(label for label in labels if label != positive))
