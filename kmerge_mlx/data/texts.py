"""Plain texts as rows that teach reading merged text: go on from it, or repeat it.

Source: Ge et al., arXiv 2307.06945 (ICAE: a memory is pretrained by continuing a text from it, and
by repeating the text).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from random import Random

from kmerge_mlx.data.examples import space_before
from kmerge_mlx.data.jsonl import BadLines, Row
from kmerge_mlx.data.tasks import FileTask, Item, Progress, fingerprint
from kmerge_mlx.errors import DataError, SettingsError, short
from kmerge_mlx.prompts.tags import escape

KEYS = ("text", "context")
REPEAT = "Repeat the text above."
KINDS = "go on", "repeat"
SHORTEST = 220  # characters of a piece
LEAST = 160  # of them that merge: some 40 tokens
GO_ON = 200  # most characters to go on with: the first words tell most about what was read


@dataclass(frozen=True)
class TextTask(FileTask):
    """Pieces of texts, none of which is in two splits, whose beginnings merge.

    A row goes on from a piece's beginning (``text`` and ``split``), or, as a share
    ``reconstruction`` of them does, repeats a piece of half the length. Pieces are of many lengths,
    up to ``max_chars``; a shorter rest of a text is in no row.
    """

    max_chars: int = 800
    reconstruction: float = 0.2

    def __post_init__(self) -> None:
        if self.max_chars < (least := 2 * SHORTEST):
            raise SettingsError(f"`max_chars` is {self.max_chars}, expected at least {least}")

    name = "text"
    unit = "texts"
    test = 0

    @staticmethod
    def item(row: Row) -> Item | None:
        """The whole text; raises a DataError for a row without one."""
        key = next((key for key in KEYS if key in row), KEYS[0])
        if not isinstance(text := row.get(key), str):
            raise DataError(f"{key} is {short(text)}, expected text")
        return Item({KEYS[0]: text}, text, {})

    def rows(
        self, bad: BadLines, progress: Progress, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, Item | None]]:
        """Cuts the texts; a piece's number is its text's, and its own."""
        for line, whole in super().rows(bad, progress):
            for part, item in enumerate(self._pieces(whole.unit)):
                number = (line << 32) + part
                if wanted is None or number in wanted:
                    yield number, item

    def _pieces(self, text: str) -> Iterator[Item]:
        """Rows of one text, as its own hash draws them."""
        drawn, start = Random(fingerprint(text, self.seed)), 0
        while len(text) - start >= SHORTEST:
            repeats = drawn.random() < self.reconstruction
            size = drawn.randint(SHORTEST, self.max_chars // 2 if repeats else self.max_chars)
            piece = text[start : _end(text, start, start + size)]
            row = {"context": escape(piece), "prompt": REPEAT, "completion": piece}
            if not repeats:
                merges = piece[: _end(piece, 0, max(LEAST, len(piece) - GO_ON))]
                begun = escape(merges)
                row = {"text": begun + piece[len(merges) :], "split": len(begun)}
            yield Item(row, text, {"kinds": KINDS[repeats]}, f"{start}\0{piece}")
            start += len(piece)


def _end(text: str, start: int, end: int) -> int:
    return len(text) if end >= len(text) else space_before(text, start, end)
