"""Making a data folder: rows to files, what was written, and all of it or nothing.

Owns: the folder's place (never over anything but data), the bytes of a row, the tallies that a
summary shows, and the proof that no two splits share what they must not. Does not know tasks.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kmerge_mlx.data.fingerprint import fingerprint
from kmerge_mlx.data.sources import SPLITS
from kmerge_mlx.errors import DataError, first_line
from kmerge_mlx.files import check_destination, replacing_folder, write_json

SUMMARY = "summary.json"

Progress = Callable[[int, int], None]
"""Called now and then with (work done, work in all)."""


class SplitWriter:
    """One split's file, written row by row.

    Args:
        folder: Where to write ``{split}.jsonl``.
        split: The split's name.
    """

    def __init__(self, folder: Path, split: str):
        self.path = folder / f"{split}.jsonl"
        self.rows = 0
        self.units = array("Q")
        self._tallies: dict[str, Counter[Any]] = {}
        self._digest = hashlib.sha256()
        self._file = self.path.open("wb")

    def write(self, prompt: str, answer: str, unit: str, **tallies: Any) -> None:
        """Writes a row.

        Args:
            prompt: What is read.
            answer: What is to be answered.
            unit: What no other split may hold: the tree, or the prompt.
            tallies: What to count, by name (``label="true"``); None counts nothing.
        """
        data = row_bytes(prompt, answer)
        self._file.write(data)
        self._digest.update(data)
        self.rows += 1
        self.units.append(fingerprint(unit))
        for name, value in tallies.items():
            if value is not None:
                self._tallies.setdefault(name, Counter())[value] += 1

    def distinct_units(self) -> np.ndarray:
        """The sorted fingerprints of what was written, each once: uint64."""
        return np.unique(np.frombuffer(self.units, np.uint64))

    def summary(self, unit_name: str) -> dict[str, Any]:
        """Rows, distinct units, tallies (numbers in order, names by count) and the SHA-256."""
        tallies = {
            name: {str(value): n for value, n in sorted(counts.items(), key=_rank)}
            for name, counts in self._tallies.items()
        }
        distinct = {f"distinct_{unit_name}": len(self.distinct_units())}
        return {"rows": self.rows, **distinct, **tallies, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file as file:
            if kind is None:
                file.flush()
                os.fsync(file.fileno())


def row_bytes(prompt: str, answer: str) -> bytes:
    """A line of a data file, in mlx-lm's ``prompt``/``completion`` format."""
    row = {"prompt": prompt, "completion": answer}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def splits_summary(writers: Mapping[str, SplitWriter], unit_name: str) -> dict[str, Any]:
    """What was written to all splits.

    Args:
        writers: By split.
        unit_name: What the splits must not share: ``trees`` or ``prompts``.

    Returns:
        ``splits`` (see :meth:`SplitWriter.summary`), and ``shared_{unit_name}``: how many any two
        splits have in common.
    """
    units = [writer.distinct_units() for writer in writers.values()]
    shared = sum(len(np.intersect1d(a, b, True)) for a, b in combinations(units, 2))
    splits = {split: writer.summary(unit_name) for split, writer in writers.items()}
    return {"splits": splits, f"shared_{unit_name}": shared}


@contextmanager
def data_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an error.

    Raises:
        DataError: The disk is full, or the place is not writable. Nothing is left there then.
    """
    try:
        with replacing_folder(Path(path)) as folder:
            yield folder
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or first_line(error)}") from error


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Leaves the summary beside the data, where mlx-lm does not look."""
    write_json(folder / SUMMARY, summary)


def check_data_destination(path: str | Path, force: bool) -> None:
    """Refuses to write data over something else (see :func:`files.check_destination`).

    Raises:
        DataError: Something is there and ``force`` is off, or it is not just a data folder.
    """
    names = {SUMMARY, *(f"{split}{end}" for split in SPLITS for end in (".jsonl", ".jsonl.gz"))}
    check_destination(path, force, "data", names, DataError)


def _rank(item: tuple[Any, int]) -> tuple[int, str]:
    value, count = item
    return (value, "") if isinstance(value, int) else (-count, value)
