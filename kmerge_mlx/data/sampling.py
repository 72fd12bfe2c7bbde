"""One large JSONL file to three small ones that share no prompt.

Owns: the draw of rows, by a hash of their prompts. The file is read twice, line by line; what is
kept meanwhile is 16 bytes a row (40 MB for the 2.5 million of Amazon_Fashion). Does not know what a
row means.

Each distinct prompt stands for one row (its first), gets a 64-bit hash under the seed, and the rows
in the order of their hashes are the test, validation and training set. So no two splits can share a
prompt, the draw does not depend on the order of the file, and a larger set holds the smaller ones.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from kmerge_mlx.config import DATA_SEED, is_int, is_number
from kmerge_mlx.data.fingerprint import fingerprint
from kmerge_mlx.data.jsonl import JsonLines, Row, parse_row, raw_lines
from kmerge_mlx.data.sources import SPLITS
from kmerge_mlx.data.writing import Progress, SplitWriter, splits_summary
from kmerge_mlx.errors import DataError

_REPORT_EVERY = 1000


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer.

    Args:
        prompt: What is read.
        answer: What is to be answered; empty for a row that has none and is left out.
        label: What to count it as in the summary, or None.
    """

    prompt: str
    answer: str
    label: str | None = None


@dataclass(frozen=True)
class SplitSizes:
    """How many rows each split gets.

    Args:
        test: Rows of the test set.
        valid: Rows of the validation set.
        train: Rows of the training set, or None for a share of what is left.
        train_share: That share, above 0 and at most 1.

    Raises:
        DataError: Anything else.
    """

    test: int
    valid: int
    train: int | None = None
    train_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("test", "valid", "train"):
            value = getattr(self, name)
            if not is_int(value) and not (name == "train" and value is None):
                raise DataError(f"{name} is {value!r}, expected a number of rows")
        if not (is_number(self.train_share) and 0 < self.train_share <= 1):
            raise DataError(f"train_share is {self.train_share!r}, expected above 0 and at most 1")

    def of(self, rows: int) -> dict[str, int]:
        """The sizes for a file.

        Args:
            rows: How many rows it has, those with the same prompt counted once.

        Raises:
            DataError: Too few.
        """
        left = rows - self.test - self.valid
        train = int(left * self.train_share) if self.train is None else self.train
        if left < train or (self.train is None and train < 1):
            raise DataError(
                f"found {rows} distinct prompts, expected more than --test {self.test} and --valid "
                f"{self.valid}" + ("" if self.train is None else f" and --train {self.train}")
            )
        if not self.test + self.valid + train:
            raise DataError("--train, --valid and --test are all 0: nothing to write")
        return {"test": self.test, "valid": self.valid, "train": train}


def write_splits(
    source: Path,
    convert: Callable[[Row], Pair],
    sizes: SplitSizes,
    folder: Path,
    seed: int = DATA_SEED,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draws the splits of a file, and writes them into a folder in the order of the draw.

    Args:
        source: A ``.jsonl`` or ``.jsonl.gz`` file.
        convert: A row to a prompt and its answer; raises DataError for a row that is not one.
        sizes: How many rows each split gets.
        folder: An empty folder.
        seed: The same one gives the same bytes.
        skip_bad: Count bad lines and go on, instead of stopping at the first.
        progress: Called with (bytes read, bytes to read).

    Returns:
        What was read and written.

    Raises:
        DataError: A bad line, or too few rows.
    """
    lines = JsonLines(source, convert, skip_bad)
    size = source.stat().st_size if source.is_file() else 0

    def report(read: int) -> None:
        if progress is not None:
            progress(read, 2 * size)

    numbers, hashes, unanswered = _read_hashes(lines, seed, report)
    drawn, first = np.unique(hashes, return_index=True)
    counts = sizes.of(len(drawn))
    wanted = numbers[first[: sum(counts.values())]]
    with tempfile.TemporaryFile(dir=folder) as draft:
        spans = _copy_lines(source, wanted, draft, lambda read: report(size + read))
        writers, start = {}, 0
        for split, count in counts.items():
            if count:
                with SplitWriter(folder, split) as writers[split]:
                    for offset, length in spans[start : start + count].tolist():
                        draft.seek(offset)
                        pair = convert(parse_row(draft.read(length)))
                        prompt = pair.prompt
                        writers[split].write(prompt, pair.answer, prompt, labels=pair.label)
            start += count
    report(2 * size)
    return {
        "seed": seed,
        "rows_read": len(numbers) + unanswered,
        "bad_lines": lines.bad,
        "first_bad": lines.first_bad,
        "rows_without_answer": unanswered,
        "repeated_prompts": len(numbers) - len(drawn),
        **splits_summary(
            {split: writers[split] for split in SPLITS if split in writers}, "prompts"
        ),
    }


def _read_hashes(
    lines: JsonLines[Pair], seed: int, report: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, int]:
    """The first reading: line numbers and prompt hashes (uint64) of the rows that have an answer.

    Returns:
        The numbers, the hashes, and how many rows have no answer.
    """
    numbers, hashes, unanswered = array("Q"), array("Q"), 0
    for line, pair in lines:
        if pair.answer:
            numbers.append(line.number)
            hashes.append(fingerprint(pair.prompt, seed))
        else:
            unanswered += 1
        if line.number % _REPORT_EVERY == 0:
            report(line.position)
    return np.frombuffer(numbers, np.uint64), np.frombuffer(hashes, np.uint64), unanswered


def _copy_lines(
    source: Path, wanted: np.ndarray, draft: IO[bytes], report: Callable[[int], None]
) -> np.ndarray:
    """The second reading: copies lines as they come.

    Args:
        source: The file.
        wanted: Numbers of the lines, in any order.
        draft: The file to copy them to.
        report: Called with the bytes read by now.

    Returns:
        Offset and length of each wanted line in the draft, in the order of ``wanted``: int64.
    """
    spans = np.zeros((len(wanted), 2), np.int64)
    places = np.argsort(wanted)
    left = iter(zip(wanted[places].tolist(), places.tolist(), strict=True))
    number, place = next(left)
    for line in raw_lines(source):
        if line.number % _REPORT_EVERY == 0:
            report(line.position)
        if line.number == number:
            spans[place] = draft.tell(), draft.write(line.data or b"")
            number, place = next(left, (0, 0))
            if not number:
                return spans
    raise DataError(f"{source} was changed while it was read")
