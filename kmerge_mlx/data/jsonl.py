"""Reads JSONL files line by line, plain or gzipped, and names the lines that are bad.

Source: https://jsonlines.org; blank lines and a byte-order mark (editors add them) are skipped.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kmerge_mlx.errors import DataError, first_line, short
from kmerge_mlx.formats import not_text

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read: some 16 million tokens, more than any model's context."""
MAX_UNPACKED_BYTES = 4 << 30
"""Most bytes that a ``.gz`` may unpack to: a small one could fill the memory."""

Row = dict[str, Any]
T = TypeVar("T")

_CHUNK = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Line(NamedTuple):
    """A line of a file."""

    number: int  # from 1
    data: bytes | None  # None: it is longer than MAX_LINE_BYTES
    position: int  # bytes of the file read so far


@dataclass
class BadLines:
    """Counts bad lines where ``skip`` is set; the first one is an error otherwise."""

    skip: bool = False
    count: int = 0
    first: str | None = None

    def add(self, problem: str) -> None:
        """Takes note of a bad line."""
        if not self.skip:
            raise DataError(problem)
        self.count += 1
        self.first = self.first or problem


def read_rows(
    path: Path,
    convert: Callable[[Row], T],
    bad: BadLines,
    wanted: Container[int] | None = None,
) -> Iterator[tuple[Line, T]]:
    """Yields each good line of a ``.jsonl`` (or ``.gz``) file, and what its row is converted to.

    ``convert`` raises DataError for a bad row; lines whose number is not ``wanted`` are not parsed.
    Raises DataError if the file cannot be read, or a line is bad and ``bad`` does not skip it.
    """
    for line in raw_lines(path):
        skipped = wanted is not None and line.number not in wanted
        if skipped or (line.data is not None and not line.data.strip()):
            continue
        try:
            value = convert(parse_row(line.data))
        except DataError as error:
            bad.add(f"{path} line {line.number}: {error}")
        else:
            yield line, value


def raw_lines(path: Path) -> Iterator[Line]:
    """Yields the lines of a file, unparsed; at most one of them is in memory.

    DataError: it is missing, unreadable, not a file, or a ``.gz`` that is torn or too large.
    """
    if not path.is_file():  # a pipe or a device may never end
        reason = "it is not a file" if path.exists() else "there is no such file"
        raise DataError(f"cannot read {path}: {reason}")
    packed = path.suffix == ".gz"
    try:
        with path.open("rb") as raw:
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
            lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
            for number, data in enumerate(lines, 1):
                if number == 1 and (kind := not_text(data[:8])):
                    raise DataError(f"{path} is {kind}: expected JSON, one example a line")
                whole, rest = len(data) <= MAX_LINE_BYTES, data
                while not whole and rest and not rest.endswith(b"\n"):
                    rest = file.readline(_CHUNK)
                if packed and file.tell() > MAX_UNPACKED_BYTES:
                    raise DataError(f"{path} holds over {MAX_UNPACKED_BYTES >> 30} GiB: unpack it")
                yield Line(number, data if whole else None, raw.tell())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is torn or not a gzip file ({first_line(error)})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or first_line(error)}") from None


def parse_row(data: bytes | None) -> Row:
    """Parses a line; DataError if it is too long, not UTF-8, or not a JSON object.

    Or if it holds half of a surrogate pair, which no tokenizer takes.
    """
    if data is None:
        raise DataError(f"longer than {MAX_LINE_BYTES >> 20} MiB, expected one example a line")
    try:
        row = json.loads(data.decode("utf-8-sig").strip())
        if _SURROGATE.search(data):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {first_line(error)}") from None
    except UnicodeEncodeError:
        raise DataError("found half of a surrogate pair (\\ud800-\\udfff), expected text") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        raise DataError(f"not JSON: {reason}, expected one object a line") from None
    except (ValueError, RecursionError):
        raise DataError("not JSON that can be read: too deep, or a number too long") from None
    if not isinstance(row, dict):
        raise DataError(f"found {short(row)}, expected one object a line")
    return row
