"""The paper's tasks on reviews and commits, what a task is, and splits that share nothing.

Source: arXiv 2604.15153; the hub datasets McAuley-Lab/Amazon-Reviews-2023 (rows with ``text`` and
``rating``, 1.0 to 5.0) and bigcode/commitpackft (``old_contents``, ``new_contents``, ``subject``).
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from kmerge_mlx.config import DATA_SEED, is_number
from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.jsonl import BadLines, Row, parse_row, raw_lines, read_rows
from kmerge_mlx.data.sources import SPLITS, ExampleList
from kmerge_mlx.errors import DataError, SettingsError, first_line, short
from kmerge_mlx.hub import DATASET, fetch_file

SUMMARY = "summary.json"
POSITIVE_FROM = 3.5
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


class Task:
    """One of the paper's tasks: it knows how to write its data."""

    name: ClassVar[str]

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

    def _write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        raise NotImplementedError


class Pair(NamedTuple):
    """A prompt and its answer; a row without one is left out.

    ``unit`` is what no other split may hold (the tree, or the prompt), and ``counted`` what the
    summary counts, by name.
    """

    prompt: str
    answer: str
    unit: str
    counted: Mapping[str, Any]


def write_splits(
    folder: Path, splits: Iterable[str], rows: Callable[[str, set[int]], Iterable[Pair]], unit: str
) -> dict[str, Any]:
    """Writes splits in turn, in mlx-lm's ``prompt``/``completion`` format.

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
            for row in rows(split, set().union(*units.values())):
                pair = {"prompt": row.prompt, "completion": row.answer}
                data = json.dumps(pair, ensure_ascii=False).encode() + b"\n"
                file.write(data)
                digest.update(data)
                count += 1
                own.add(fingerprint(row.unit))
                for name, value in row.counted.items():
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
class HubTask(Task):
    """A task whose rows are in one large JSONL file of the hub; a subclass says what a row means.

    Each distinct prompt stands for one row (its first), and the rows in the order of a hash of
    their prompts are the test, validation and training set. So no prompt is in two splits, the
    order of the file does not matter, and a larger set holds the smaller ones.
    """

    part: str | None = None  # category or language of the dataset; None is the paper's
    file: str | None = None  # a local one in the dataset's schema instead of the hub's
    seed: int = DATA_SEED
    skip_bad: bool = False  # count bad lines and go on, instead of stopping at the first
    sizes: Mapping[str, int] = field(default_factory=dict)  # by split, where not the paper's

    repo: ClassVar[str]
    path: ClassVar[str]  # in the repo, with {} for the part
    part_name: ClassVar[str]  # the setting that chooses the part
    default_part: ClassVar[str]
    part_pattern: ClassVar[str]
    test: ClassVar[int]
    valid: ClassVar[int]
    train_share: ClassVar[float] = 1.0  # of the rows that are in neither of the others

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
        self, splits: Sequence[str] = SPLITS, progress: Progress = silent
    ) -> dict[str, ExampleList]:
        """Draws splits into memory; raises as :meth:`write` does."""
        drawn, read = self._draw(progress)
        found: dict[str, ExampleList] = {}
        for split in splits:
            if pairs := drawn.get(split):
                items = [Example(pair.prompt, None, pair.answer) for pair in pairs]
                places = [(f"{self.name} {split} row", i + 1) for i in range(len(pairs))]
                found[split] = ExampleList(items, places, 0 if found else read["bad_lines"])
        return found

    def _write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        drawn, read = self._draw(progress)
        source = self.file or f"{self.repo} {self.part or self.default_part}"
        head = {"task": self.name, "source": source, "seed": self.seed}
        return head | read | write_splits(folder, drawn, lambda split, _: drawn[split], "prompts")

    def _draw(self, progress: Progress) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
        """The pairs of each split that has any, and what was read.

        The file is read twice: for 16 bytes a row, and for the rows that were drawn.
        """
        import numpy as np

        source, bad = self.fetch(), BadLines(self.skip_bad)
        total = 2 * source.stat().st_size if source.is_file() else 0
        numbers, hashes, unanswered = array("Q"), array("Q"), 0
        for line, pair in read_rows(source, self.pair, bad):
            if line.number % _REPORT_EVERY == 0:
                progress(line.position, total)
            if pair.answer:
                numbers.append(line.number)
                hashes.append(fingerprint(pair.prompt, self.seed))
            else:
                unanswered += 1
        distinct, first = np.unique(np.array(hashes, np.uint64), return_index=True)
        counts = self._counts(len(distinct), source)
        rows = {numbers[i]: None for i in first[: sum(counts.values())].tolist()}
        for line in raw_lines(source):
            if line.number % _REPORT_EVERY == 0:
                progress(total // 2 + line.position, total)
            if line.number in rows:
                rows[line.number] = self.pair(parse_row(line.data))
        progress(total, total)
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
        named = " and ".join(f"`{split}` {size}" for split, size in sizes.items())
        train = sizes.setdefault("train", int(left * self.train_share))
        if left < train or ("train" not in self.sizes and train < 1):
            raise DataError(
                f"{source} is too small: found {rows} distinct prompts, expected more than {named} "
                f"(`kmerge-mlx data {self.name} --file {source} --test N --valid N` draws fewer)"
            )
        if not any(sizes.values()):
            raise SettingsError("`train`, `valid` and `test` are all 0: nothing to write")
        return sizes


class AmazonReviews(HubTask):
    """The paper's second task: is a review of a category ``positive`` or ``negative``?

    The paper has no validation set, and trains on a tenth of what is not in the test set.
    """

    name = "amazon-reviews"
    repo = "McAuley-Lab/Amazon-Reviews-2023"
    path = "raw/review_categories/{}.jsonl"
    part_name, default_part, part_pattern = "category", "Amazon_Fashion", r"\w+"
    test, valid = 50_000, 1_000
    train_share = 0.1

    @staticmethod
    def pair(row: Row) -> Pair:
        """Raises a DataError for a review without text or rating."""
        text, rating = row.get("text"), row.get("rating")
        if not isinstance(text, str):
            raise DataError(f"text is {short(text)}, expected the text of a review")
        if not is_number(rating):
            raise DataError(f"rating is {short(rating)}, expected a number")
        label = "positive" if rating >= POSITIVE_FROM else "negative"
        prompt = f"Review: {text}, Label:"
        return Pair(prompt, label, prompt, {"labels": label})


class CommitPackFT(HubTask):
    """The paper's third task: a file after a commit, from the file before and the commit's subject.

    The prompt is the paper's to the letter: "instrutions", and "python" whatever the language. The
    paper has no validation set. A commit that leaves its file empty has no answer.
    """

    name = "commitpackft"
    repo = "bigcode/commitpackft"
    path = "data/{}/data.jsonl"
    part_name, default_part, part_pattern = "language", "python", r"[\w+#.-]*\w[\w+#.-]*"
    test, valid = 5_600, 500

    @staticmethod
    def pair(row: Row) -> Pair:
        """Raises a DataError for a commit that lacks a text."""
        for name in ("old_contents", "subject", "new_contents"):
            if not isinstance(row.get(name), str):
                raise DataError(f"{name} is {short(row.get(name))}, expected text")
        prompt = (
            "Update the old python code content based on the instrutions.\n"
            f"Old Content: {row['old_contents']}\n"
            f"Instructions: {row['subject']}\n"
            "New Content:\n"
        )
        return Pair(prompt, row["new_contents"], prompt, {})
