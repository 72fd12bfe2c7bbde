"""Reads examples from a folder, a hub dataset, or several hub datasets by mlx-lm's config keys.

Source: mlx_lm/LORA.md and ``mlx_lm.tuner.datasets`` (keys, default slices); the ``datasets``
library's documentation (rounding of percentages).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.jsonl import BadLines, read_rows
from kmerge_mlx.errors import DataError, short
from kmerge_mlx.hub import DATASET, fetch

SPLITS = ("train", "valid", "test")

# mlx-lm's: without a slice of its own, a validation set is the end of the training file.
_DEFAULT_SLICES = {"train": "train[:80%]", "valid": "train[-10%:]", "test": None}
_SLICE = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class ExampleList(Sequence[Example]):
    """The examples of a split, in memory."""

    items: Sequence[Example]
    places: Sequence[tuple[str, int]]  # where each comes from: a file or task, a number from 1
    bad: int = 0  # lines that were left out

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | slice) -> Any:
        return self.items[index]

    def where(self, index: int) -> str:
        """Names an example in an error: its file and line."""
        return "{} {}".format(*self.places[index])


def read_examples(
    path: str | Path, row_format: RowFormat | None = None, skip_bad: bool = False
) -> ExampleList:
    """Reads a ``.jsonl`` or ``.jsonl.gz`` file; ``skip_bad`` counts bad lines and goes on.

    DataError: a bad line (named), not a single good one, or a file that cannot be read.
    """
    path, bad = Path(path), BadLines(skip_bad)
    items, places, place = [], [], f"{path} line"
    for line, example in read_rows(path, (row_format or RowFormat()).read, bad):
        items.append(example)
        places.append((place, line.number))
    if not items:
        reason = f": every line is bad, {bad.first}" if bad.count else ""
        raise DataError(f"{path} holds no example{reason}")
    return ExampleList(items, places, bad.count)


def load_examples(
    data: str | Path,
    row_format: RowFormat | None = None,
    skip_bad: bool = False,
    splits: Sequence[str] = SPLITS,
) -> dict[str, ExampleList]:
    """Reads those of some splits that a folder has, or a hub dataset (``user/name@revision``).

    They are in ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` (or ``.jsonl.gz``). Raises
    DataError for no such folder or dataset, none of the splits in it, or a bad line.
    """
    folder = _folder(data, splits)
    files = {split: path for split in splits if (path := _split_file(folder, split))}
    if not files:
        wanted = " or ".join(f"{split}.jsonl" for split in splits)
        raise DataError(f"{data} holds no {wanted} (nor a .jsonl.gz of one)")
    return {split: read_examples(path, row_format, skip_bad) for split, path in files.items()}


def data_name(data: str) -> str:
    """What people call their data: the last part of a folder's path, or of a hub dataset's name."""
    folder = Path(data if Path(data).is_dir() else data.partition("@")[0])
    return folder.resolve().name or "data"


def load_hub_datasets(
    entries: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    row_format: RowFormat | None = None,
    skip_bad: bool = False,
    splits: Sequence[str] = SPLITS,
) -> dict[str, ExampleList]:
    """Reads the entries of mlx-lm's ``hf_dataset``, of each split one after the other.

    An entry has a ``path``, and as wanted ``train_split``, ``valid_split``, ``test_split``
    (``train[:80%]``, ``train[-10%:]`` and none by default) and fields of RowFormat in the place of
    those of ``row_format``. Raises as :func:`load_examples`, and for an unknown key or slice.
    """
    found: dict[str, ExampleList] = {}
    for entry in [entries] if isinstance(entries, Mapping) else entries:
        path, formats, slices = _read_entry(entry, row_format or RowFormat(), splits)
        folder = _folder(path, [name for name, _, _ in slices.values()])
        files: dict[str, ExampleList] = {}
        for split, (name, start, stop) in slices.items():
            if (file := _split_file(folder, name)) is None:
                raise DataError(
                    f"{path} holds no {name}.jsonl: hub datasets are read as JSONL; fetch one of "
                    "another format with its own tools and give the folder as `data`"
                )
            if name not in files:
                files[name] = read_examples(file, formats, skip_bad)
            whole = files[name]
            part = slice(_bound(start, len(whole)), _bound(stop, len(whole)))
            before = found.get(split, ExampleList([], []))
            items, places = [*before.items, *whole[part]], [*before.places, *whole.places[part]]
            found[split] = ExampleList(items, places, before.bad + whole.bad)
    return found


def _read_entry(
    entry: Mapping[str, Any], base: RowFormat, splits: Sequence[str]
) -> tuple[str, RowFormat, dict[str, tuple[str, str | None, str | None]]]:
    """An ``hf_dataset`` entry: its path, its keys, and a slice for each split."""
    names = {*RowFormat.__dataclass_fields__} - {"answers"}
    known = {"path", *(f"{split}_split" for split in SPLITS), *names}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise DataError(f"hf_dataset is {short(entry)}, expected an entry with a path")
    if unknown := sorted(map(str, set(entry) - known)):
        raise DataError(f"hf_dataset: unknown {', '.join(unknown)}, expected {sorted(known)}")
    slices = {}
    for split in splits:
        text = entry.get(f"{split}_split", _DEFAULT_SLICES.get(split))
        match = _SLICE.fullmatch(text) if isinstance(text, str) else None
        if match is not None:
            slices[split] = match.groups()
        elif text is not None:
            raise DataError(f"{split}_split is {short(text)}, expected NAME or NAME[:80%]")
    given = {name: entry[name] for name in names & entry.keys()}
    return entry["path"], RowFormat(**(vars(base) | given)), slices


def _bound(text: str | None, size: int) -> int | None:
    """One end of a slice, in examples: percentages round to the nearest, as in ``datasets``."""
    if text is not None and text.endswith("%"):
        return round(size * int(text[:-1]) / 100)
    return text and int(text)


def _folder(data: str | Path, splits: Sequence[str]) -> Path:
    """A local folder, downloaded from the hub if it is not one already."""
    path = Path(data)
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{data} is a file: give the folder that holds {splits[0]}.jsonl")
    patterns = [f"{split}{suffix}" for split in splits for suffix in _SUFFIXES]
    return fetch(str(data), patterns, DataError, repo_type=DATASET)


def _split_file(folder: Path, split: str) -> Path | None:
    """The file of a split, plain or compressed."""
    found = [path for suffix in _SUFFIXES if (path := folder / f"{split}{suffix}").exists()]
    if len(found) > 1:
        raise DataError(f"found {found[0]} and {found[1].name}, expected one of them: remove one")
    return found[0] if found else None
