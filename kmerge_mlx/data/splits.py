"""Draws the splits of a task so that they share nothing, and writes them as a data folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.jsonl import BadLines, Row, parse_row, raw_lines, read_rows
from kmerge_mlx.data.sources import SPLITS, ExampleList
from kmerge_mlx.errors import DataError, SettingsError, first_line, short
from kmerge_mlx.hub import DATASET, fetch_file

SUMMARY = "summary.json"

Progress = Callable[[int, int], None]
"""Called now and then with (work done, work in all)."""
_REPORT_EVERY = 1000


def fingerprint(text: str, seed: int | None = None) -> int:
    """Hashes a text to 64 bits, the same on every machine (BLAKE2b); each seed is another hash."""
    key = b"" if seed is None else str(seed).encode()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


class Task:
    """One of the paper's tasks: it knows how to write its data."""

    name: ClassVar[str]

    def write(
        self, path: str | Path, force: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Draws the splits and writes them as a data folder, whole or not at all.

        ``force`` replaces a data folder that is there, and nothing else.

        Returns:
            The summary, which is also left in the folder, where mlx-lm does not look.

        Raises:
            DataError: A bad line, too little to draw from, or a place that cannot be written.
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

    def _write(self, folder: Path, progress: Progress | None) -> dict[str, Any]:
        raise NotImplementedError


class Pair(NamedTuple):
    """A prompt, its answer (a row without one is left out) and what the summary counts it as."""

    prompt: str
    answer: str
    label: str | None = None


@dataclass(frozen=True)
class HubTask(Task):
    """A task whose rows are in one large JSONL file of the hub; a subclass says what a row means.

    Each distinct prompt stands for one row (its first), and the rows in the order of a hash of
    their prompts are the test, validation and training set. So no prompt is in two splits, the
    order of the file does not matter, and a larger set holds the smaller ones.

    Args:
        part: Category or language of the dataset; None is the paper's.
        file: A local file in the dataset's schema instead of the hub's.
        seed: The same one gives the same splits.
        skip_bad: Count bad lines and go on, instead of stopping at the first.
        sizes: Rows by split, for those that should not be as in the paper.
    """

    part: str | None = None
    file: str | None = None
    seed: int = DATA_SEED
    skip_bad: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)

    repo: ClassVar[str]
    path: ClassVar[str]
    """Path in the repo, with ``{}`` for the part."""
    part_name: ClassVar[str]
    """The setting that chooses the part."""
    default_part: ClassVar[str]
    part_pattern: ClassVar[str]
    test: ClassVar[int]
    valid: ClassVar[int]
    train_share: ClassVar[float] = 1.0
    """What the training set gets of the rows that are in neither of the others."""

    @staticmethod
    def pair(row: Row) -> Pair:
        """Makes a prompt and its answer of a row; raises DataError for a bad row."""
        raise NotImplementedError

    def fetch(self) -> Path:
        """The local file, or the hub's; raises DataError if there is none by the part's name."""
        if self.file is not None:
            return Path(self.file)
        part = self.part or self.default_part
        if not re.fullmatch(self.part_pattern, part, re.ASCII):
            raise DataError(
                f"`{self.part_name}` is {short(part)}, expected a name such as {self.default_part}"
            )
        return fetch_file(self.repo, self.path.format(part), DataError, repo_type=DATASET)

    def examples(
        self, splits: Sequence[str] = SPLITS, progress: Progress | None = None
    ) -> dict[str, ExampleList]:
        """Draws splits into memory; raises as :meth:`write` does."""
        drawn, read = self._draw(progress)
        found = {}
        for split in splits:
            if pairs := drawn.get(split):
                items = [Example(pair.prompt, None, pair.answer) for pair in pairs]
                places = [(f"{self.name} {split} row", i + 1) for i in range(len(pairs))]
                found[split] = ExampleList(items, places, 0 if found else read["bad_lines"])
        return found

    def _write(self, folder: Path, progress: Progress | None) -> dict[str, Any]:
        drawn, read = self._draw(progress)
        written = {}
        for split, pairs in drawn.items():
            rows = (
                (p.prompt, p.answer, p.prompt, {"labels": p.label} if p.label else {})
                for p in pairs
            )
            written[split] = write_split(folder, split, rows)
        source = self.file or f"{self.repo} {self.part or self.default_part}"
        head = {"task": self.name, "source": source, "seed": self.seed}
        return head | read | splits_summary(written, "prompts")

    def _draw(self, progress: Progress | None) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
        """The pairs of each split, and what was read.

        The file is read twice: for 16 bytes a row, and for the rows that were drawn.
        """
        import numpy as np

        source, bad = self.fetch(), BadLines(self.skip_bad)
        total = 2 * source.stat().st_size if source.is_file() else 0

        def report(line: int, read: int) -> None:
            if progress is not None and line % _REPORT_EVERY == 0:
                progress(read, total)

        numbers, hashes, unanswered = array("Q"), array("Q"), 0
        for line, pair in read_rows(source, self.pair, bad):
            report(line.number, line.position)
            if pair.answer:
                numbers.append(line.number)
                hashes.append(fingerprint(pair.prompt, self.seed))
            else:
                unanswered += 1
        distinct, first = np.unique(np.array(hashes, np.uint64), return_index=True)
        counts = self._counts(len(distinct), source)
        rows = {numbers[i]: None for i in first[: sum(counts.values())].tolist()}
        for line in raw_lines(source):
            report(line.number, total // 2 + line.position)
            if line.number in rows:
                rows[line.number] = self.pair(parse_row(line.data))
        report(0, total)
        pairs = iter(rows.values())
        drawn = {split: [next(pairs) for _ in range(count)] for split, count in counts.items()}
        return {split: drawn[split] for split in SPLITS if drawn[split]}, {
            "rows_read": len(numbers) + unanswered,
            "bad_lines": bad.count,
            "first_bad": bad.first,
            "rows_without_answer": unanswered,
            "repeated_prompts": len(numbers) - len(distinct),
        }

    def _counts(self, rows: int, source: Path) -> dict[str, int]:
        """Rows of each split, in the order of the draw, of so many distinct prompts."""
        sizes = {"test": self.test, "valid": self.valid, **self.sizes}
        left = rows - sizes["test"] - sizes["valid"]
        train = sizes.setdefault("train", int(left * self.train_share))
        if left < train or ("train" not in self.sizes and train < 1):
            named = [f"`{s}` {n}" for s, n in sizes.items() if s != "train" or s in self.sizes]
            problem = f"found {rows} distinct prompts, expected more than {' and '.join(named)}"
            if self.sizes:
                raise DataError(f"{source} is too small: {problem}")
            raise DataError(
                f"{source} is too small for the paper's splits ({problem}): `kmerge-mlx data "
                f"{self.name} --file {source} --test N --valid N` draws others, for `data`"
            )
        if not any(sizes.values()):
            raise SettingsError("`train`, `valid` and `test` are all 0: nothing to write")
        return sizes


def write_split(
    folder: Path, split: str, rows: Iterable[tuple[str, str, str, Mapping[str, Any]]]
) -> tuple[dict[str, Any], set[int]]:
    """Writes ``{split}.jsonl`` in mlx-lm's ``prompt``/``completion`` format.

    Args:
        folder: Where to.
        split: The split's name.
        rows: Prompt, answer, what no other split may hold (the tree, or the prompt), and what to
            count, by name (``{"labels": "true"}``).

    Returns:
        Rows, tallies (numbers in order, names by count) and SHA-256; and the fingerprints of what
        no other split may hold.
    """
    count, tallies, units, digest = 0, {}, set(), hashlib.sha256()
    with (folder / f"{split}.jsonl").open("wb") as file:
        for prompt, answer, unit, counted in rows:
            row = {"prompt": prompt, "completion": answer}
            data = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            file.write(data)
            digest.update(data)
            count += 1
            units.add(fingerprint(unit))
            for name, value in counted.items():
                tallies.setdefault(name, Counter())[value] += 1
        file.flush()
        os.fsync(file.fileno())
    ranked = {
        name: {str(value): n for value, n in sorted(counts.items(), key=_rank)}
        for name, counts in tallies.items()
    }
    return {"rows": count, **ranked, "sha256": digest.hexdigest()}, units


def _rank(item: tuple[Any, int]) -> tuple[int, str]:
    value, count = item
    return (value, "") if isinstance(value, int) else (-count, value)


def splits_summary(
    written: Mapping[str, tuple[Mapping[str, Any], set[int]]], unit: str
) -> dict[str, Any]:
    """What :func:`write_split` returned, by split, and how many units any two splits share."""
    splits = {
        split: {"rows": found["rows"], f"distinct_{unit}": len(units), **found}
        for split, (found, units) in written.items()
    }
    shared = sum(len(a & b) for (_, a), (_, b) in combinations(written.values(), 2))
    return {"splits": splits, f"shared_{unit}": shared}
