"""The uncompressed base model as a teacher: its distributions, a file of them, and its answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kmerge_mlx.config import is_int
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.data.tasks import Progress
from kmerge_mlx.errors import TrainError, first_line
from kmerge_mlx.files import replacing_file, safetensors_shapes
from kmerge_mlx.generation.stream import batch_generate
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.checkpoint import ANSWERS, TRAINING
from kmerge_mlx.train.dataset import TokenizedSet
from kmerge_mlx.train.loss import answer_logits
from kmerge_mlx.train.rows import Batch, by_length, in_parts, in_passes, make_batch

Answers = dict[str, dict[str, list[int]]]
"""Token ids by split and by the row's index (as text, for JSON)."""


class Teacher:
    """A base model that reads prompts uncompressed: wrapped with K = 1, on the student's arrays."""

    def __init__(self, model: nn.Module, top_k: int = 0):
        self.model, self.top_k = model.eval(), top_k
        self.vocab_size = merged_embedding(model).vocab_size
        if top_k > self.vocab_size:
            raise TrainError(
                f"`teacher_top_k` is {top_k}, the model has {self.vocab_size:,} tokens"
            )
        self._compiled = mx.compile(self._compute)

    def teach(
        self, batch: Batch, indices: Sequence[int], examples: Sequence[TokenizedExample], split: str
    ) -> Batch:
        """The batch of some examples (``indices`` of a split), with the teacher's distributions."""
        ids, logprobs = self.targets(examples)
        return replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)

    def targets(self, examples: Sequence[TokenizedExample]) -> tuple[mx.array, mx.array]:
        """Ids and log-probabilities ``(A, k)`` at answer positions; or no ids and ``(A, V)``."""
        read = make_batch(examples, 1, 0, self.vocab_size)
        return self._compiled(read.ids, read.blocks, read.answer_at)

    def _compute(self, ids: mx.array, blocks: mx.array, answer_at: mx.array) -> tuple:
        batch = Batch(ids, blocks, answer_at, answer_at, answer_at)
        logprobs = nn.log_softmax(answer_logits(self.model, batch).astype(mx.float32))
        logprobs = mx.stop_gradient(logprobs)
        if not self.top_k:
            return mx.zeros((0,), mx.int32), logprobs
        top = mx.argpartition(-logprobs, self.top_k - 1)[:, : self.top_k]
        return top.astype(mx.int32), mx.take_along_axis(logprobs, top, axis=-1)


class StoredTeacher:
    """Takes a teacher's place with the file of its top tokens that :func:`store` made."""

    def __init__(
        self,
        path: Path,
        digests: Collection[str],
        teacher: Teacher,
        sets: Mapping[str, TokenizedSet],
    ):
        from safetensors import safe_open

        self._vocab_size = teacher.vocab_size
        self._starts = {split: _starts(data) for split, data in sets.items()}
        shapes = safetensors_shapes(path, TrainError, ("I32", "F32"))
        wanted = {
            f"{split}.{part}": (int(starts[-1]), teacher.top_k)
            for split, starts in self._starts.items()
            for part in ("ids", "logprobs")
        }
        self._file: Any = safe_open(str(path), framework="numpy")
        if (self._file.metadata() or {}).get("digest") not in digests or shapes != wanted:
            raise TrainError(
                f"`teacher_file` {path} was made of another base, data or `teacher_top_k`: remove "
                "it, or name another file"
            )

    def teach(
        self, batch: Batch, indices: Sequence[int], examples: Sequence[TokenizedExample], split: str
    ) -> Batch:
        """As :meth:`Teacher.teach`, by the file."""
        starts, padding = self._starts[split], batch.targets.size
        padding -= sum(len(example.answer_ids) for example in examples)
        parts = [self._file.get_slice(f"{split}.{name}") for name in ("ids", "logprobs")]
        found = (np.concatenate([p[starts[i] : starts[i + 1]] for i in indices]) for p in parts)
        ids, logprobs = (np.pad(part, ((0, padding), (0, 0))) for part in found)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise TrainError("`teacher_file` holds ids that the model does not have: remove it")
        return replace(batch, teacher_ids=mx.array(ids), teacher_logprobs=mx.array(logprobs))


def stored_date(path: str | None) -> str | None:
    """The date that the chat template wrote into the prompts of a teacher's file, if any."""
    if path is None or not Path(path).exists():
        return None
    from safetensors import safe_open

    safetensors_shapes(Path(path), TrainError, ("I32", "F32"))
    with safe_open(str(path), framework="numpy") as file:
        return (file.metadata() or {}).get("date")


def store(
    path: Path,
    about: Mapping[str, str],
    teacher: Teacher,
    sets: Mapping[str, TokenizedSet],
    batch_size: int,
    progress: Progress,
) -> None:
    """Writes a file of the teacher's top tokens at every answer token, whole or not at all.

    ``about``: the ``digest`` of what it is made of, and the ``date`` in its prompts, if any.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    done, total = 0, sum(map(len, sets.values()))
    for split, data in sets.items():
        starts = _starts(data)
        ids = np.zeros((starts[-1], teacher.top_k), np.int32)
        logprobs = np.zeros(ids.shape, np.float32)
        for batch in by_length(data, batch_size, 1):
            for indices, examples in in_parts(batch, [data[i] for i in batch], 1):
                found = [np.array(array) for array in teacher.targets(examples)]
                at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])
                ids[at], logprobs[at] = found[0][: len(at)], found[1][: len(at)]
            done += len(batch)
            progress(done, total)
        tensors |= {f"{split}.ids": ids, f"{split}.logprobs": logprobs}
    try:
        with replacing_file(path) as new:
            save_file(tensors, str(new), dict(about))
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise TrainError(f"cannot write `teacher_file` {path}: {first_line(error)}") from error


def _starts(data: TokenizedSet) -> np.ndarray:
    """Where each example's answer begins among all answer tokens: ``(len + 1,)``."""
    return np.cumsum([0, *(len(row.answer_ids) for row in data)])


def write_answers(
    teacher: Teacher,
    tokenizer: Any,
    sets: Mapping[str, TokenizedSet],
    max_tokens: int,
    progress: Progress,
) -> Answers:
    """Lets the base answer every row that has no answer, greedily and uncompressed.

    An answer that ended by itself has the tokenizer's eos token, one cut at ``max_tokens`` not.
    """
    missing, answers = _missing(sets), {split: {} for split in sets}
    done, total = 0, sum(map(len, missing.values()))
    more = {"max_tokens": max_tokens, "return_token_ids": True}
    for split, indices in missing.items():
        left = iter(indices)
        for part in in_passes([sets[split][i] for i in indices], teacher.vocab_size):
            prompts = [row.segments for row in part]
            found = batch_generate(teacher.model, tokenizer, prompts, **more)
            for ids, reason in zip(found.token_ids, found.finish_reasons, strict=True):
                end = [tokenizer.eos_token_id] if reason == "stop" else []
                answers[split][str(next(left))] = [*ids, *end]
            done += len(part)
            progress(done, total)
    return answers


def read_answers(
    path: Path, teacher: Teacher, sets: Mapping[str, TokenizedSet], max_tokens: int
) -> Answers:
    """The answers that the run in a folder keeps, for exactly the rows without one."""
    file = path / TRAINING / ANSWERS
    wanted = {split: [str(i) for i in indices] for split, indices in _missing(sets).items()}
    limit = (1 << 20) + 32 * (max_tokens + 1) * sum(map(len, wanted.values()))
    try:
        if file.stat().st_size > limit:
            raise ValueError("it is too large")
        answers = json.loads(file.read_text())
        fits = {split: list(found) for split, found in answers.items()} == wanted and all(
            is_int(i) and i < teacher.vocab_size
            for found in answers.values()
            for ids in found.values()
            for i in (ids or [-1])
        )
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise TrainError(f"{file} cannot be read ({first_line(error)})") from error
    if not fits:
        raise TrainError(f"{file} does not hold the answers of this run's rows")
    return answers


def _missing(sets: Mapping[str, TokenizedSet]) -> dict[str, list[int]]:
    """The rows without an answer, by split."""
    return {
        split: [i for i, row in enumerate(data) if not row.answer_ids]
        for split, data in sets.items()
    }
