"""The paper's tasks on reviews and commits.

Source: arXiv 2604.15153; the hub datasets McAuley-Lab/Amazon-Reviews-2023 (rows with ``text`` and
``rating``, 1.0 to 5.0; ``reviewText`` and ``overall`` in the five-core files of 2018) and
bigcode/commitpackft (``old_contents``, ``new_contents``, ``subject``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kmerge_mlx.config import is_number
from kmerge_mlx.data.examples import EDIT, texts_of
from kmerge_mlx.data.jsonl import Row
from kmerge_mlx.data.tasks import FileTask, Item, pair
from kmerge_mlx.errors import DataError, short
from kmerge_mlx.hub import DATASET, fetch_file

POSITIVE_FROM = 3.5


@dataclass(frozen=True)
class HubTask(FileTask):
    """A task whose rows are in one large JSONL file of the hub, or a local one in its schema.

    The subclass's own field, named by ``part_name``, chooses a part of the dataset; None is the
    paper's.
    """

    repo: ClassVar[str]
    path: ClassVar[str]  # in the repo, with {} for the part
    part_name: ClassVar[str]
    default_part: ClassVar[str]
    part_pattern: ClassVar[str]

    @property
    def part(self) -> str:
        """The category or language."""
        return getattr(self, self.part_name) or self.default_part

    @property
    def source(self) -> str:
        """The file, or the dataset and its part."""
        return self.file or f"{self.repo} {self.part}"

    def fetch(self) -> Path:
        """The local file, or the hub's; raises DataError if there is none by the part's name."""
        if self.file is not None:
            return Path(self.file)
        if not re.fullmatch(self.part_pattern, self.part, re.ASCII):
            raise DataError(
                f"`{self.part_name}` is {short(self.part)}, expected a name such as "
                f"{self.default_part}"
            )
        return fetch_file(self.repo, self.path.format(self.part), DataError, repo_type=DATASET)


@dataclass(frozen=True)
class AmazonReviews(HubTask):
    """The paper's second task: is a review of a category ``positive`` or ``negative``?

    The paper has no validation set, and trains on a tenth of what is not in the test set.
    """

    category: str | None = None

    name = "amazon-reviews"
    repo = "McAuley-Lab/Amazon-Reviews-2023"
    path = "raw/review_categories/{}.jsonl"
    part_name, default_part, part_pattern = "category", "Amazon_Fashion", r"\w+"
    test, valid = 50_000, 1_000
    train_share = 0.1

    @staticmethod
    def item(row: Row) -> Item | None:
        """Raises a DataError for a review without text or rating."""
        text, label = review(row)
        prompt = f"Review: {text}, Label:"
        return pair(prompt, label, prompt, {"labels": label})


def review(row: Row) -> tuple[str, str]:
    """A review's text, and its label by its rating; raises a DataError where one is not there."""
    text, rating = row.get("text", row.get("reviewText")), row.get("rating", row.get("overall"))
    if not isinstance(text, str):
        raise DataError(f"text (or reviewText) is {short(text)}, expected that of a review")
    if not is_number(rating) or not 1 <= rating <= 5:
        raise DataError(f"rating (or overall) is {short(rating)}, expected a number from 1 to 5")
    return text, "positive" if rating >= POSITIVE_FROM else "negative"


@dataclass(frozen=True)
class CommitPackFT(HubTask):
    """The paper's third task: a file after a commit, from the file before and the commit's subject.

    The prompt is the paper's to the letter: "instrutions", and "python" whatever the language. The
    paper has no validation set. A commit that leaves its file empty has no answer.
    """

    language: str | None = None

    name = "commitpackft"
    repo = "bigcode/commitpackft"
    path = "data/{}/data.jsonl"
    part_name, default_part, part_pattern = "language", "python", r"[\w+#.-]*\w[\w+#.-]*"
    test, valid = 5_600, 500

    @staticmethod
    def item(row: Row) -> Item | None:
        """Raises a DataError for a commit that lacks a text."""
        old, subject, new = texts_of(row, EDIT)
        prompt = (
            "Update the old python code content based on the instrutions.\n"
            f"Old Content: {old}\n"
            f"Instructions: {subject}\n"
            "New Content:\n"
        )
        return pair(prompt, new, prompt, {}) if new else None
