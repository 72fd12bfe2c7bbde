"""What a task is: it writes splits that share no unit (a tree, a prompt, a file, an article)."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.jsonl import BadLines, Row, read_rows
from kmerge_mlx.data.sources import SPLITS, ExampleList
from kmerge_mlx.errors import DataError, SettingsError, first_line

SUMMARY = "summary.json"
_REPORT_EVERY = 1000

Progress = Callable[[int, int], None]
"""Called now and then with (work done, work in all)."""
Bar = Callable[[str], Progress]
"""Begins a piece of work, by its label."""


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def fingerprint(text: str, seed: int | None = None) -> int:
    """Hashes a text to 64 bits, the same on every machine (BLAKE2b); each seed is another hash."""
    key = b"" if seed is None else str(seed).encode()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


class Task(ABC):
    """A task knows how to write its data; a subclass is a dataclass of what can be chosen."""

    name: ClassVar[str]
    left_out: ClassVar[str] = "without an answer"  # what rows are that are read and not written

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The settings of a command that are this task's own, by name."""
        return tuple(f.name for f in fields(cls) if f.name not in ("seed", "sizes", "splits"))

    @classmethod
    def of(cls, settings: Any, **more: Any) -> Self:
        """Makes a task of a command's settings; ``more`` are the fields that are not options."""
        given = {name: getattr(settings, name) for name in cls.options()}
        return cls(**{n: v for n, v in given.items() if v is not None}, **more)

    def write(
        self, path: str | Path, force: bool = False, progress: Progress = silent
    ) -> dict[str, Any]:
        """Draws the splits and writes them as a data folder, whole or not at all.

        ``force`` replaces a data folder that is there, and nothing else. Returns the summary, which
        is also left in the folder. Raises DataError for a bad line, too little to draw from, or a
        place that cannot be written.
        """
        from kmerge_mlx.files import check_destination, replacing_folder, write_json

        names = {SUMMARY, *(f"{split}{end}" for split in SPLITS for end in (".jsonl", ".jsonl.gz"))}
        check_destination(path, force, "data", names, DataError)
        try:
            with replacing_folder(Path(path)) as folder:
                summary = self._write(folder, progress)
                write_json(folder / SUMMARY, summary)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise DataError(f"cannot write {path}: {reason}") from error
        return summary

    @abstractmethod
    def _write(self, folder: Path, progress: Progress) -> dict[str, Any]: ...


class Item(NamedTuple):
    """A row as it is written, in a form that RowFormat reads."""

    row: Mapping[str, Any]
    unit: str  # what no other split may hold: the tree, the prompt, the file
    counted: Mapping[str, Any]  # what the summary counts, by name
    key: str | None = None  # of rows with one key the first counts; the unit if None


def pair(prompt: str, answer: str, unit: str, counted: Mapping[str, Any]) -> Item:
    """A row in mlx-lm's ``prompt``/``completion`` format."""
    return Item({"prompt": prompt, "completion": answer}, unit, counted)


def write_splits(
    folder: Path, splits: Iterable[str], rows: Callable[[str, set[int]], Iterable[Item]], unit: str
) -> dict[str, Any]:
    """Writes splits in turn.

    ``rows`` is called with a split and the fingerprints of the units of those before it. Returns
    each split's rows, tallies and SHA-256, and how many units any two splits share.
    """
    from kmerge_mlx.files import flush

    found: dict[str, dict[str, Any]] = {}
    units: dict[str, set[int]] = {}
    for split in splits:
        count, tallies, own, digest = 0, defaultdict(Counter), set(), hashlib.sha256()
        path = folder / f"{split}.jsonl"
        with path.open("wb") as file:
            for item in rows(split, set().union(*units.values())):
                data = json.dumps(item.row, ensure_ascii=False).encode() + b"\n"
                file.write(data)
                digest.update(data)
                count += 1
                own.add(fingerprint(item.unit))
                for name, value in item.counted.items():
                    tallies[name][value] += 1
        flush(path)
        units[split] = own
        found[split] = {"rows": count, f"distinct_{unit}": len(own)}
        for name, counts in tallies.items():  # numbers in order, names by count
            ranked = sorted(counts, key=lambda v: v if isinstance(v, int) else (-counts[v], v))
            found[split][name] = {str(value): counts[value] for value in ranked}
        found[split]["sha256"] = digest.hexdigest()
    shared = sum(len(a & b) for a, b in combinations(units.values(), 2))
    ordered = {split: found[split] for split in SPLITS if split in found}
    return {"splits": ordered, f"shared_{unit}": shared}


@dataclass(frozen=True)
class DrawnTask(Task):
    """A task that deals rows which are there to splits; a subclass says which rows.

    The units (prompts, files, articles), in the order of a hash, are those of the test, validation
    and training set, each as many as it needs for its rows. So no unit is in two splits, the order
    of the rows does not matter, and a larger set holds the smaller ones. A split is in the order of
    a hash of its rows, and what is more than the size that was given is left out.
    """

    seed: int = DATA_SEED
    sizes: Mapping[str, int] = field(default_factory=dict)  # rows by split, where not the default

    unit: ClassVar[str] = "prompts"  # what no two splits share
    skip_bad: ClassVar[bool] = False
    test: ClassVar[float] = 0.1  # rows, or their share
    valid: ClassVar[float] = 0.05
    train_share: ClassVar[float] = 1.0  # of the rows that are in neither of the others

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the rows come from."""

    @abstractmethod
    def rows(
        self, bad: BadLines, progress: Progress, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, Item | None]]:
        """Reads the rows, or the ``wanted`` ones, each by its number; None for one left out."""

    def examples(
        self, splits: Sequence[str] = SPLITS, progress: Progress = silent
    ) -> dict[str, ExampleList]:
        """Draws splits into memory; raises as :meth:`write` does."""
        drawn, read = self._draw(progress)
        found: dict[str, ExampleList] = {}
        for split in splits:
            if items := drawn.get(split):
                examples = [RowFormat().read(item.row) for item in items]
                places = [(f"{self.name} {split} row", i + 1) for i in range(len(items))]
                found[split] = ExampleList(examples, places, 0 if found else read["bad_lines"])
        return found

    def _write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        drawn, read = self._draw(progress)
        head = {"task": self.name, "source": self.source, "seed": self.seed} | read
        return head | write_splits(folder, drawn, lambda split, _: drawn[split], self.unit)

    def _draw(self, progress: Progress) -> tuple[dict[str, list[Item]], dict[str, Any]]:
        """The items of each split that has any, and what was read.

        All is read twice: for 24 bytes a row, and for the rows that were drawn.
        """
        bad = BadLines(self.skip_bad)
        numbers, keys, units, unanswered = array("Q"), array("Q"), array("Q"), 0
        for number, item in self.rows(bad, lambda done, total: progress(done, 2 * total)):
            if item is None:
                unanswered += 1
                continue
            numbers.append(number)
            units.append(fingerprint(item.unit, self.seed))
            keys.append(units[-1] if item.key is None else fingerprint(item.key, self.seed))
        left_out = {self.left_out: unanswered, "bad": bad.count}
        dealt, distinct = self._deal(keys, units, left_out)
        of_split = {split: [numbers[i] for i in indices] for split, indices in dealt.items()}
        wanted = {number for found in of_split.values() for number in found}
        items: dict[int, Item] = {}
        again = BadLines(True), lambda done, total: progress(total + done, 2 * total), wanted
        for number, item in self.rows(*again):
            items.setdefault(number, item)  # a commit may be in two repositories
        drawn = {split: [items[n] for n in found] for split, found in of_split.items()}
        return {split: drawn[split] for split in SPLITS if drawn[split]}, {
            "rows_read": len(numbers) + unanswered,
            "bad_lines": bad.count,
            "first_bad": bad.first,
            "rows_without_answer": unanswered,
            "repeated_prompts": len(numbers) - distinct,
        }

    def _deal(
        self, keys: array, units: array, left_out: Mapping[str, int]
    ) -> tuple[dict[str, list[int]], int]:
        """Which rows each split gets, by their hashed keys and units; how many are distinct.

        ``left_out`` counts the rows that are not among them, by why.
        """
        import numpy as np

        _, first = np.unique(np.array(keys, np.uint64), return_index=True)
        of_rows = np.array(units, np.uint64)[first]
        _, unit, counts = np.unique(of_rows, return_inverse=True, return_counts=True)
        before = np.concatenate([[0], np.cumsum(counts)])  # rows of the units before each
        rows, dealt, start = len(first), {}, 0
        shares = {"test": self.test, "valid": self.valid}
        sizes = {s: n if isinstance(n, int) else max(1, round(n * rows)) for s, n in shares.items()}
        sizes |= self.sizes
        if not any(sizes.values()) and "train" in sizes:
            raise SettingsError("`train`, `valid` and `test` are all 0: nothing to write")
        for split in reversed(SPLITS):
            left = rows - int(before[start])
            size = sizes.get(split, max(int(left * self.train_share), min(left, 1)))
            if size > left or (split not in sizes and size < 1):
                named = " and ".join(f"`{name}` {n}" for name, n in sizes.items())
                fewer = f" (`kmerge-mlx data {self.name} ... --test N --valid N` draws fewer)"
                raise DataError(
                    f"{self.source} is too small: found {len(counts):,} distinct {self.unit}"
                    + (f" with {rows:,} rows" if rows > len(counts) else "")
                    + "".join(f" ({n:,} rows were {why})" for why, n in left_out.items() if n)
                    + f", expected more than {named}{fewer if rows else ''}"
                )
            end = int(np.searchsorted(before, before[start] + size))
            mine = first[(start <= unit) & (unit < end)]
            dealt[split], start = mine[: self.sizes.get(split)].tolist(), end
        return dealt, rows


@dataclass(frozen=True)
class FileTask(DrawnTask):
    """A task whose rows are the lines of a JSONL file; a subclass says what a line means."""

    file: str | None = None
    skip_bad: bool = False  # count bad lines and go on, instead of stopping at the first

    @property
    def source(self) -> str:
        """The file's name."""
        return str(self.file)

    @staticmethod
    @abstractmethod
    def item(row: Row) -> Item | None:
        """Makes an item of a line, None if it has no answer; raises DataError for a bad one."""

    def fetch(self) -> Path:
        """The file."""
        if self.file is None:
            raise SettingsError(f"{self.name} needs a `file` to read rows from")
        return Path(self.file)

    def rows(
        self, bad: BadLines, progress: Progress, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, Item | None]]:
        """Reads the lines, or those of the ``wanted`` numbers."""
        path = self.fetch()
        total = path.stat().st_size if path.is_file() else 0
        for count, (line, item) in enumerate(read_rows(path, self.item, bad, wanted)):
            if count % _REPORT_EVERY == 0:
                progress(line.position, total)
            yield line.number, item
        progress(total, total)
