"""The teacher's top tokens on the disk: computed once, then read instead of the teacher.

Owns the file: for each split, the ids and log-probabilities of the k likeliest tokens at every
answer token, in the order of the examples. Does not know where they come from (``distill``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.errors import TrainError, first_line
from kmerge_mlx.files import replacing_file
from kmerge_mlx.train.dataset import TokenizedSet
from kmerge_mlx.train.distill import Teacher
from kmerge_mlx.train.order import by_length
from kmerge_mlx.train.rows import Batch

Progress = Callable[[int, int], None]


class StoredTeacher:
    """Teaches from a file.

    Args:
        path: Made by :func:`store`.
        digest: What it must have been made of.
        sets: The examples of each split.

    Raises:
        TrainError: Torn, foreign, or made of something else.
    """

    def __init__(self, path: Path, digest: str, sets: Mapping[str, TokenizedSet]):
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(str(path), framework="numpy")
        except (OSError, SafetensorError) as error:
            raise TrainError(f"cannot read --teacher-file {path}: {first_line(error)}") from None
        if (self._file.metadata() or {}).get("digest") != digest:
            raise TrainError(
                f"--teacher-file {path} was made of another base, data or --teacher-top-k: remove "
                "it, or name another file"
            )
        self._starts = {split: _starts(data) for split, data in sets.items()}

    def teach(
        self, batch: Batch, indices: Sequence[int], examples: Sequence[TokenizedExample], split: str
    ) -> Batch:
        """A student's batch with what the file says at its answer positions."""
        starts, size = self._starts[split], batch.targets.size
        ids, logprobs = (
            _stack([part[starts[i] : starts[i + 1]] for i in indices], size)
            for part in (self._file.get_slice(f"{split}.{n}") for n in ("ids", "logprobs"))
        )
        return replace(batch, teacher_ids=mx.array(ids), teacher_logprobs=mx.array(logprobs))


def store(
    path: Path,
    digest: str,
    teacher: Teacher,
    sets: Mapping[str, TokenizedSet],
    batch_size: int,
    progress: Progress,
) -> None:
    """Asks the teacher about every answer token, and writes what it says, whole or not at all.

    Args:
        path: The file.
        digest: What it is made of.
        teacher: Keeps its top tokens.
        sets: The examples of each split.
        batch_size: Rows read at once.
        progress: Called with (rows done, rows in all).

    Raises:
        TrainError: It cannot be written.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    done, total = 0, sum(map(len, sets.values()))
    for split, data in sets.items():
        starts = _starts(data)
        ids = np.zeros((starts[-1], teacher.top_k), np.int32)
        logprobs = np.zeros(ids.shape, np.float32)
        for indices in by_length(data, batch_size, 1):
            examples = [data[i] for i in indices]
            found = [np.array(array) for array in teacher.targets(examples)]
            at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])
            ids[at], logprobs[at] = found[0][: len(at)], found[1][: len(at)]
            done += len(indices)
            progress(done, total)
        tensors |= {f"{split}.ids": ids, f"{split}.logprobs": logprobs}
    try:
        with replacing_file(path) as new:
            save_file(tensors, str(new), {"digest": digest})
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise TrainError(f"cannot write --teacher-file {path}: {first_line(error)}") from error


def _starts(data: TokenizedSet) -> np.ndarray:
    """Where each example's answer begins among all answer tokens: ``(len + 1,)``."""
    lengths = [data.num_answer_tokens(i) for i in range(len(data))]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _stack(parts: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Rows one after the other, filled up with zeros to a batch's answer positions."""
    stacked = np.concatenate(parts)
    return np.pad(stacked, ((0, size - len(stacked)), (0, 0)))
