"""Where examples are: a folder, a hub dataset, or several, by mlx-lm's config keys.

Owns: the names of the split files, mlx-lm's ``hf_dataset`` entries with their slices
(``train[:80%]``), and their concatenation. Does not know what a row means.

Source: mlx_lm/LORA.md and ``mlx_lm.tuner.datasets`` (keys, default slices); the ``datasets``
library's documentation (rounding of percentages).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kmerge_mlx.data.examples import Example, ExampleFile, RowFormat
from kmerge_mlx.errors import DataError, short
from kmerge_mlx.hub.fetch import DATASET, fetch

SPLITS = ("train", "valid", "test")

# mlx-lm's: without a slice of its own, a validation set is the end of the training file.
_DEFAULT_SLICES = {"train": "train[:80%]", "valid": "train[-10%:]", "test": None}
_SLICE = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class ExampleList(Sequence[Example]):
    """Examples of one split, from one file or several, whole or in part.

    Args:
        parts: Each file, and which of its examples.
    """

    parts: tuple[tuple[ExampleFile, range], ...]

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.parts)

    def __getitem__(self, index: int | slice) -> Any:
        """Reads an example (or a list of them, for a slice) from the disk."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, at = self._place(index)
        return file[at]

    def where(self, index: int) -> str:
        """The file and line of an example, to name it in an error."""
        file, at = self._place(index)
        return file.where(at)

    def _place(self, index: int) -> tuple[ExampleFile, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        for file, indices in self.parts:
            if index < len(indices):
                return file, indices[index]
            index -= len(indices)
        raise AssertionError

    @property
    def bad(self) -> int:
        """How many lines of the files were left out."""
        return sum(file.bad for file in {id(file): file for file, _ in self.parts}.values())

    @property
    def digest(self) -> str:
        """SHA-256 by which a resumed run knows its data: of the files, and of what is taken."""
        parts = [f"{f.digest} {r.start} {r.stop}" for f, r in self.parts]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_examples(
    data: str | Path,
    row_format: RowFormat | None = None,
    skip_bad: bool = False,
    splits: Sequence[str] = SPLITS,
) -> dict[str, ExampleList]:
    """The splits of a folder, or of a hub dataset that keeps them as JSONL.

    Args:
        data: A folder with ``train.jsonl``, ``valid.jsonl``, ``test.jsonl`` (or ``.jsonl.gz``), or
            a hub repo id of one (``user/name@revision``).
        row_format: What the rows mean.
        skip_bad: Count bad lines and go on, instead of stopping at the first.
        splits: Which splits are wanted; one that is not there is left out, as in mlx-lm.

    Returns:
        Examples by split, at least one split. Every line has been checked.

    Raises:
        DataError: No such folder or dataset, no split in it, or a bad line.
    """
    folder = _folder(data, splits)
    files = {split: path for split in splits if (path := _split_file(folder, split))}
    if not files:
        wanted = " or ".join(f"{split}.jsonl" for split in splits)
        raise DataError(f"{data} holds no {wanted} (nor a .jsonl.gz of one)")
    opened = {name: ExampleFile(path, row_format, skip_bad) for name, path in files.items()}
    return {name: ExampleList(((file, range(len(file))),)) for name, file in opened.items()}


def load_hub_datasets(
    entries: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    row_format: RowFormat | None = None,
    skip_bad: bool = False,
    splits: Sequence[str] = SPLITS,
) -> dict[str, ExampleList]:
    """What mlx-lm's ``hf_dataset`` config names: hub datasets, their keys and slices.

    Args:
        entries: One mapping or several: ``path``, and as wanted ``train_split``, ``valid_split``,
            ``test_split`` (``train[:80%]``, ``train[-10%:]`` and none by default) and the fields of
            RowFormat (``prompt_feature``, ...).
        row_format: What the rows mean, where an entry does not say.
        skip_bad: Count bad lines and go on, instead of stopping at the first.
        splits: Which splits are wanted.

    Returns:
        Examples by split, those of several entries one after the other.

    Raises:
        DataError: An unknown key, a slice that is none, a dataset without JSONL files, a bad line.
    """
    if isinstance(entries, Mapping):
        entries = [entries]
    found: dict[str, tuple[tuple[ExampleFile, range], ...]] = {}
    for entry in entries:
        path, formats, slices = _read_entry(entry, row_format or RowFormat(), splits)
        folder = _folder(path, [name for name, _, _ in slices.values()])
        files: dict[str, ExampleFile] = {}
        for split, (name, start, stop) in slices.items():
            if name not in files:
                file = _split_file(folder, name)
                if file is None:
                    raise DataError(
                        f"{path} holds no {name}.jsonl: hub datasets are read as JSONL; fetch one "
                        "of another format with its own tools and give the folder as --data"
                    )
                files[name] = ExampleFile(file, formats, skip_bad)
            size = len(files[name])
            indices = range(size)[slice(_bound(start, size), _bound(stop, size))]
            found[split] = (*found.get(split, ()), (files[name], indices))
    return {split: ExampleList(parts) for split, parts in found.items()}


def _read_entry(
    entry: Mapping[str, Any], base: RowFormat, splits: Sequence[str]
) -> tuple[str, RowFormat, dict[str, tuple[str, str | None, str | None]]]:
    """An ``hf_dataset`` entry, checked: its path, its keys, and a slice for each split."""
    names = {field.name for field in fields(RowFormat)} - {"answers"}
    known = {"path", *(f"{split}_split" for split in SPLITS), *names}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise DataError(f"hf_dataset is {short(entry)}, expected an entry with a path")
    if unknown := sorted(map(str, set(entry) - known)):
        raise DataError(f"hf_dataset: unknown {', '.join(unknown)}, expected {sorted(known)}")
    given = {name: entry[name] for name in names if name in entry}
    slices = {}
    for split in splits:
        text = entry.get(f"{split}_split", _DEFAULT_SLICES.get(split))
        if text is not None:
            match = _SLICE.fullmatch(text) if isinstance(text, str) else None
            if match is None:
                raise DataError(f"{split}_split is {short(text)}, expected NAME or NAME[:80%]")
            slices[split] = (match[1], match[2], match[3])
    return entry["path"], RowFormat(**(vars(base) | given)), slices


def _bound(text: str | None, size: int) -> int | None:
    """One end of a slice, in examples: the percentages round to the nearest, as in ``datasets``."""
    if text is None:
        return None
    return round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _folder(data: str | Path, splits: Sequence[str]) -> Path:
    """A local folder, downloaded from the hub if it is not one already."""
    path = Path(data)
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{data} is a file: give the folder that holds train.jsonl")
    patterns = [f"{split}{suffix}" for split in splits for suffix in _SUFFIXES]
    return fetch(str(data), patterns, DataError, repo_type=DATASET)


def _split_file(folder: Path, split: str) -> Path | None:
    """The file of a split, plain or compressed."""
    found = [path for suffix in _SUFFIXES if (path := folder / f"{split}{suffix}").exists()]
    if len(found) > 1:
        raise DataError(f"found {found[0]} and {found[1].name}, expected one of them: remove one")
    return found[0] if found else None
