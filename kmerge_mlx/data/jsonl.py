"""JSONL files, one line at a time, and what to do with a line that is not one.

Owns: opening ``.jsonl`` and ``.jsonl.gz``, the limit on a line's length, JSON and UTF-8, and the
choice between stopping at a bad line and counting it. Does not know what a row means: whoever reads
passes the function that does.

Source: https://jsonlines.org; blank lines and a byte-order mark (editors add them) are passed over.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from kmerge_mlx.errors import DataError, first_line, short

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read: some 16 million tokens, past any model's context."""

Row = dict[str, Any]
T = TypeVar("T")

_CHUNK = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Line:
    """A line as it stands in the file.

    Args:
        number: From 1.
        data: Its bytes, line break included; None if there are more than ``MAX_LINE_BYTES``.
        position: Bytes of the file read by now, compressed ones where it is compressed.
    """

    number: int
    data: bytes | None
    position: int


class JsonLines(Generic[T]):
    """The rows of a file, read as they are asked for.

    Args:
        path: A ``.jsonl`` file, or a ``.gz`` of one.
        convert: Turns a row into what is wanted, or raises DataError saying what is wrong with it.
        skip_bad: Count bad lines and go on, instead of stopping at the first.

    Attributes:
        bad: How many lines were left out so far.
        first_bad: What was wrong with the first of them, or None.
    """

    def __init__(self, path: Path, convert: Callable[[Row], T], skip_bad: bool = False):
        self.path = path
        self.bad = 0
        self.first_bad: str | None = None
        self._convert = convert
        self._skip_bad = skip_bad

    def __iter__(self) -> Iterator[tuple[Line, T]]:
        """Reads the file from its beginning.

        Yields:
            Each good line, and what it was converted to.

        Raises:
            DataError: The file cannot be read, or a line is bad and bad lines are not skipped.
        """
        self.bad, self.first_bad = 0, None
        for line in raw_lines(self.path):
            if line.data is not None and not line.data.strip():
                continue
            try:
                value = self._convert(parse_row(line.data))
            except DataError as error:
                problem = f"{self.path} line {line.number}: {error}"
                if not self._skip_bad:
                    raise DataError(problem) from None
                self.bad += 1
                self.first_bad = self.first_bad or problem
            else:
                yield line, value


def raw_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, unparsed; at most one of them is in memory.

    Raises:
        DataError: Missing, unreadable, not a file, or a torn ``.gz``.
    """
    check_file(path)
    try:
        with path.open("rb") as raw:
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if is_gzip(path) else raw
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                whole = len(data) <= MAX_LINE_BYTES
                if not whole and not data.endswith(b"\n"):
                    _pass_over_line(file)
                yield Line(number, data if whole else None, raw.tell())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is torn or not a gzip file ({first_line(error)})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or first_line(error)}") from None


def check_file(path: Path) -> None:
    """Refuses folders, and pipes and devices, which may never end.

    Raises:
        DataError: Something else than a file, or nothing, is there.
    """
    if not path.is_file():
        reason = "it is not a file" if path.exists() else "there is no such file"
        raise DataError(f"cannot read {path}: {reason}")


def parse_row(data: bytes | None) -> Row:
    """A line's bytes to the object they hold.

    Args:
        data: The line, or None for one that was too long to keep.

    Raises:
        DataError: Too long, not UTF-8, not JSON, not an object, or with text that is none (one half
            of a surrogate pair, which no tokenizer takes).
    """
    if data is None:
        raise DataError(f"longer than {MAX_LINE_BYTES >> 20} MiB, expected one example a line")
    try:
        row = json.loads(data.decode("utf-8-sig").strip())
        if _SURROGATE.search(data):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        raise DataError(f"not UTF-8: {byte}") from None
    except UnicodeEncodeError:
        raise DataError("found half of a surrogate pair (\\ud800-\\udfff), expected text") from None
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise DataError(f"not JSON: {reason} at character {error.colno}") from None
    except (ValueError, RecursionError):
        raise DataError("not JSON that can be read: too deep, or a number too long") from None
    if not isinstance(row, dict):
        raise DataError(f"found {short(row)}, expected an object")
    return row


def is_gzip(path: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.suffix == ".gz"


def _pass_over_line(file: io.BufferedReader) -> None:
    """Reads to the end of a line without keeping it."""
    while (data := file.readline(_CHUNK)) and not data.endswith(b"\n"):
        pass
