"""Questions about a text, in SQuAD's own JSON or as rows of context, question and answers.

Source: Rajpurkar et al., arXiv 1606.05250 and 1806.03822 (SQuAD 1.1 and 2.0, whose files differ in
questions without an answer).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx.data.examples import QUESTION, right_answers, texts_of
from kmerge_mlx.data.jsonl import MAX_LINE_BYTES, BadLines, Row, parse_row, raw_lines
from kmerge_mlx.data.tasks import FileTask, Item, Progress
from kmerge_mlx.errors import DataError, short


@dataclass(frozen=True)
class QuestionTask(FileTask):
    """Questions to answer with words of a text, no article of which is in two splits.

    A row without a ``title`` is an article of its own text. A ``.json`` (or ``.json.gz``) file is
    SQuAD's, any other is read as JSONL.
    """

    name = "qa"
    unit = "articles"

    @staticmethod
    def item(row: Row) -> Item | None:
        """Raises a DataError for a row without context, question or answers."""
        context, question = texts_of(row, QUESTION[:2])
        answers, title = right_answers(row.get("answers")), row.get("title")
        if not isinstance(title, str | None):
            raise DataError(f"title is {short(title)}, expected text")
        kept = {"context": context, "question": question, "answers": list(answers)}
        kept = {"title": title} | kept if title else kept
        return Item(kept, title or context, {}, f"{context}\0{question}") if answers else None

    def rows(
        self, bad: BadLines, progress: Progress, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, Item | None]]:
        """Reads the questions, or those of the ``wanted`` numbers."""
        path = self.fetch()
        if not path.name.endswith((".json", ".json.gz")):
            yield from super().rows(bad, progress, wanted)
            return
        for number, row in enumerate(_squad(path), 1):
            if wanted is None or number in wanted:
                try:
                    yield number, self.item(row)
                except DataError as error:
                    bad.add(f"{path} question {number}: {error}")


def _squad(path: Path) -> Iterator[Row]:
    """The questions of a file of SQuAD."""
    data = bytearray()
    for line in raw_lines(path):
        data += line.data or b""
        if line.data is None or len(data) > MAX_LINE_BYTES:
            raise DataError(
                f"{path} is over {MAX_LINE_BYTES >> 20} MiB: write its questions as JSONL"
            )
    try:
        for article in _list(parse_row(bytes(data)), "data"):
            for paragraph in _list(article, "paragraphs"):
                questions = _list(paragraph, "qas")
                about = {"title": article.get("title"), "context": paragraph.get("context")}
                for asked in questions:
                    yield (asked if isinstance(asked, dict) else {}) | about
    except DataError as error:
        raise DataError(
            f"{path} is not a file of SQuAD ({error}); rows of context, question and answers are "
            "read from a .jsonl"
        ) from None


def _list(of: Any, key: str) -> list[Any]:
    found = of.get(key) if isinstance(of, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{key} is {short(found)}, expected a list")
    return found
