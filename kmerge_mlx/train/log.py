"""A run's log: one JSON object a line, written as it happens.

Owns: ``log.jsonl``, which holds only what a repeated run repeats to the bit, and ``timing.jsonl``
beside it, which holds speed and memory. Does not know what is logged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kmerge_mlx.data.jsonl import parse_row, raw_lines
from kmerge_mlx.errors import DataError

LOG, TIMING = "log.jsonl", "timing.jsonl"


class RunLog:
    """Appends to the logs in a folder.

    Args:
        folder: Where they are; it may be replaced by a newer one of its name between two calls.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, record: dict[str, Any], timing: dict[str, Any] | None = None) -> None:
        """Appends a record, and its timing.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        _append(self._folder / LOG, record)
        if timing is not None:
            _append(self._folder / TIMING, {"iteration": record["iteration"], **timing})

    def sizes(self) -> dict[str, int]:
        """Bytes written so far: what a save remembers."""
        return {name: _size(self._folder / name) for name in (LOG, TIMING)}

    def cut(self, sizes: dict[str, int]) -> None:
        """Drops what was written after a save.

        Raises:
            OSError: The logs cannot be written.
        """
        for name, size in sizes.items():
            path = self._folder / name
            if _size(path) > size:
                os.truncate(path, size)


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a log.

    Raises:
        DataError: It cannot be read.
    """
    for line in raw_lines(folder / LOG):
        try:
            yield parse_row(line.data)
        except DataError as error:
            raise DataError(f"{folder / LOG} line {line.number}: {error}") from None


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
