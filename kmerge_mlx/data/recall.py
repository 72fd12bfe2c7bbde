"""Exact strings in documents of plain sentences: a code, an amount, an identifier is asked for.

Randomness comes from ``random.Random.random`` alone, as that of the trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NamedTuple

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.sources import SPLITS, ExampleList
from kmerge_mlx.data.tasks import Item, Progress, Task, silent, write_splits
from kmerge_mlx.data.textualized_tree import below
from kmerge_mlx.errors import SettingsError

_PLACES = (
    *("Harlow", "Benfield", "Marston", "Oakley", "Tilbury", "Wexcombe", "Ardley", "Kinross"),
    *("Selby", "Thornton", "Ravenna", "Lindale", "Corby", "Easton", "Dunmore", "Hallam"),
    *("Pembury", "Norwick", "Ashdown", "Verley", "Stanmore", "Galway", "Brenton", "Milford"),
    *("Ostrava", "Culver", "Redmoor", "Fairlie", "Holbeck", "Juniper", "Upton", "Zelham"),
)
_THINGS = (
    *("depot", "archive", "clinic", "school", "ferry", "museum", "bakery", "library", "station"),
    *("warehouse", "garage", "theatre", "hotel", "workshop", "laboratory", "office"),
)
_WHO = (
    *("The baker", "A sailor", "My neighbour", "The old teacher", "A young painter", "The guard"),
    *("The driver", "An engineer", "The gardener", "A visitor", "The clerk", "One of the cooks"),
    *("The librarian", "A student", "The plumber", "Her brother", "The twins", "Nobody"),
    *("A quiet man", "The new doctor", "Somebody", "The caretaker", "A farmer", "His aunt"),
)
_DOES = (
    *("carried", "described", "forgot", "repaired", "sold", "counted", "cleaned", "painted"),
    *("borrowed", "ordered", "hid", "found", "measured", "packed", "returned", "admired"),
    *("drew", "lost", "opened", "wrapped", "weighed", "moved", "kept", "inspected"),
)
_WHAT = (
    *("three chairs", "a wooden boat", "the blue lamp", "some letters", "a long map", "two bells"),
    *("the red bicycle", "a box of nails", "an old clock", "the spare keys", "a basket of pears"),
    *("the broken window", "four blankets", "a sack of flour", "the piano", "a pair of boots"),
    *("the garden hose", "a silver spoon", "several books", "the last ticket", "a tall ladder"),
    *("the green door", "a jar of honey", "the heavy curtain"),
)
_WHERE = (
    *("by the river", "behind the station", "in the market", "near the mill", "on the hill"),
    *("under the bridge", "at the harbour", "beside the church", "in the cellar", "on the roof"),
    *("along the canal", "next to the fountain", "in the yard", "across the street"),
)
_WHEN = (
    *("", " before noon", " last week", " after the rain", " in the evening", " at the weekend"),
    *(" without a word", " in great haste", " as usual", " for a friend"),
)
_VERBS = ("retry", "cache", "upload", "session", "queue", "batch", "index", "token", "login")
_NOUNS = ("limit", "delay", "size", "timeout", "window", "count", "depth", "rate", "budget", "age")
_UNITS = ("ms", "kb", "max", "min", "sec", "total", "per_day", "v2")
_ROLES, _REGIONS = ("srv", "db", "web", "job", "log"), ("eu", "us", "ap", "sa", "af")
_EVERY = 4  # sentences, of which one states what is not asked for
_MOST = 500  # of these: there are 512 different ones of a kind


class Fact(NamedTuple):
    """An exact string, where a document states it, and the question for it."""

    kind: str
    about: str
    answer: str

    @property
    def sentence(self) -> str:
        """What the document states."""
        return _FACTS[self.kind][0].format(self.about, self.answer)

    def example(self, document: str) -> Example:
        """The question about a document that states it; the document merges."""
        return RowFormat().read(self.row(document))

    def row(self, document: str) -> dict[str, str]:
        """The same as a row of data."""
        question = f"Question: {_FACTS[self.kind][1].format(self.about)}\nAnswer:"
        return {"context": document, "prompt": question, "completion": f" {self.answer}"}


def _pick(rng: Random, words: Sequence[str]) -> str:
    return words[below(rng, len(words))]


def _digits(rng: Random, count: int, digits: str = "0123456789") -> str:
    return "".join(_pick(rng, digits) for _ in range(count))


def _amount(rng: Random) -> str:
    return f"${100 + below(rng, 99_900):,}.{_digits(rng, 2)}"


def _setting(rng: Random) -> str:
    return "_".join(_pick(rng, words) for words in (_VERBS, _NOUNS, _UNITS))


def _server(rng: Random) -> str:
    code = _digits(rng, 1) + _digits(rng, 3, "0123456789abcdef")
    return f"{_pick(rng, _ROLES)}-{_pick(rng, _REGIONS)}-{code}"


_FACTS: dict[str, tuple[str, str, Callable[[Random], str]]] = {
    "code": (
        "The access code of the {} is {}.",
        "What is the access code of the {}?",
        lambda rng: _digits(rng, 5),
    ),
    "amount": (
        "The last invoice of the {} was {}.",
        "How much was the last invoice of the {}?",
        _amount,
    ),
    "phone": (
        "The phone number of the {} is {}.",
        "What is the phone number of the {}?",
        lambda rng: f"555-{_digits(rng, 4)}",
    ),
    "setting": (
        "The computer of the {} reads the setting {}.",
        "Which setting does the computer of the {} read?",
        _setting,
    ),
    "server": (
        "The backup of the {} is on {}.",
        "Where is the backup of the {}?",
        _server,
    ),
}
"""By kind: what states it, what asks for it, and how it is drawn."""


def draw_fact(rng: Random, taken: set[tuple[str, str]], kind: str | None = None) -> Fact:
    """Draws an exact string of something of which none of its kind is ``taken``, and adds that."""
    kind = kind or _pick(rng, [*_FACTS])
    while True:
        about = f"{_pick(rng, _PLACES)} {_pick(rng, _THINGS)}"
        if (kind, about) not in taken:
            taken.add((kind, about))
            return Fact(kind, about, _FACTS[kind][2](rng))


def sentences(rng: Random, taken: set[tuple[str, str]], asked: str) -> Iterator[str]:
    """Sentences without end; every fourth states an exact string of something not ``taken``.

    Every second of those is of the kind ``asked``, so that the kind alone does not tell the answer.
    """
    for kind in cycle((asked, None)):
        for _ in range(_EVERY - 1):
            parts = [_pick(rng, words) for words in (_WHO, _DOES, _WHAT, _WHERE)]
            yield f"{' '.join(parts)}{_pick(rng, _WHEN)}."
        if len(taken) < _MOST:
            yield draw_fact(rng, taken, kind).sentence


@dataclass(frozen=True)
class RecallTask(Task):
    """Documents that state exact strings, each asked for one of them; none is in two splits."""

    words: int = 200  # of a document, about: some 300 tokens
    seed: int = DATA_SEED
    sizes: Mapping[str, int] = field(default_factory=dict)  # rows by split, where not the default

    name: ClassVar[str] = "recall"
    rows: ClassVar[Mapping[str, int]] = {"train": 5_000, "valid": 200, "test": 500}

    def draw(self, split: str, index: int) -> tuple[Fact, str]:
        """Draws one document of a split, whatever was drawn before, and what is asked of it."""
        rng, taken = Random(f"{self.name} {self.words} {split} {self.seed} {index}"), set()
        asked, written = draw_fact(rng, taken), []
        left = self.words - len(asked.sentence.split())
        for sentence in sentences(rng, taken, asked.kind):
            if (left := left - len(sentence.split())) < 0:
                break
            written.append(sentence)
        written.insert(below(rng, len(written) + 1), asked.sentence)
        return asked, " ".join(written)

    def examples(
        self, splits: Sequence[str] = SPLITS, progress: Progress = silent
    ) -> dict[str, ExampleList]:
        """Draws splits into memory."""
        found: dict[str, ExampleList] = {}
        for split in splits:
            items = [fact.example(document) for fact, document in self._drawn(split, progress)]
            places = [(f"{self.name} {split} row", i + 1) for i in range(len(items))]
            found[split] = ExampleList(items, places)
        return found

    @property
    def _sizes(self) -> dict[str, int]:
        return {**self.rows, **self.sizes}

    def _drawn(self, split: str, progress: Progress) -> Iterator[tuple[Fact, str]]:
        total = self._sizes[split]
        for index in range(total):
            yield self.draw(split, index)
            if index % 100 == 99 or index + 1 == total:
                progress(index + 1, total)

    def _write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        def rows(split: str, earlier: set[int]) -> Iterator[Item]:
            for fact, document in self._drawn(split, progress):
                yield Item(fact.row(document), document, {"kinds": fact.kind})

        splits = [split for split in SPLITS if self._sizes[split]]
        if not splits:
            raise SettingsError("`train`, `valid` and `test` are all 0: nothing to write")
        head = {"task": self.name, "source": f"{self.words} words", "seed": self.seed}
        return head | write_splits(folder, splits, rows, "documents")
