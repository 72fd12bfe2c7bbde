"""Asks a model the questions by each method, and keeps the answers in a file that survives a stop.

The file (``--predictions``) is JSON lines: first ``{"evaluation": ...}``, what the answers depend
on, then an answer each. It is appended to batch by batch. An unfinished batch is asked again,
because the last digits of a likelihood depend on the batch; of two answers the later one counts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.data.jsonl import MAX_LINE_BYTES
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.detokenizer import exact
from kmerge_mlx.errors import EvaluateError, first_line
from kmerge_mlx.evaluation.baselines import Method
from kmerge_mlx.evaluation.questions import Question
from kmerge_mlx.files import flush
from kmerge_mlx.generation.cost import time_reading
from kmerge_mlx.generation.stream import batch_generate
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train.checkpoint import unshare
from kmerge_mlx.train.loss import answer_logits, cross_entropy
from kmerge_mlx.train.rows import in_passes, make_batch
from kmerge_mlx.virtual_tokens import CompressedPrompt

STEP = 2048  # positions of one prompt that are read at once, as in mlx-lm
OF, DATE = "evaluation", "the date"
_BEGUN = f'{{"{OF}": {{'.encode()  # how a line begins that says what answers depend on
MOST_SHOWN = 20  # longer values are digests, and an error does not show them


@dataclass(frozen=True)
class Prediction:
    """What a model wrote to answer a question, and how likely it finds the right answer."""

    text: str
    nll: float  # of the right answer and its end, summed over its tokens, in nats
    answer_tokens: int
    prompt_tokens: int
    positions: int  # that the prompt was read in


class Scorer:
    """Asks one model, whose embedding is wrapped, up to ``batch_size`` questions at once."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int):
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._embedding = merged_embedding(model)

    def score(
        self, method: Method, rows: Sequence[TokenizedExample], max_tokens: Sequence[int]
    ) -> list[Prediction]:
        """Answers a batch by a method, written greedily; where all limits are 0, with no text.

        Where each token of the right answer is the likeliest one, it is what the model writes, and
        that is known without writing it.
        """
        # Merged anew, so that an answer's last digits depend on its batch alone.
        self._embedding.forget_blocks()
        prompts = [self._embedding.compress(method.read(self._model, row.segments)) for row in rows]
        # Virtual ids stand for their blocks, so nothing merges here.
        read = [
            TokenizedExample([Segment(prompt.ids, False)], row.answer_ids)
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        texts, nll = [], []
        for part in in_passes(read, self._embedding.vocab_size):
            here = slice(len(texts), len(texts) + len(part))
            found, likeliest = self._right_answers(part)
            nll += found
            texts += self._write(prompts[here], part, likeliest, max_tokens[here])
        return [
            Prediction(text, loss, len(row.answer_ids), len(row.prompt_ids), len(prompt.ids))
            for row, prompt, text, loss in zip(rows, prompts, texts, nll, strict=True)
        ]

    def seconds(self, method: Method, segments: Sequence[Segment]) -> float:
        """Seconds from a prompt's token ids to the first token of its answer.

        The method's own pass over the prompt, and merging, are part of it.
        """
        self._embedding.forget_blocks()

        def compress() -> CompressedPrompt:
            return self._embedding.compress(method.read(self._model, segments))

        return time_reading(self._model, compress).seconds[0]

    def _write(
        self,
        prompts: Sequence[CompressedPrompt],
        rows: Sequence[TokenizedExample],
        likeliest: Sequence[bool],
        max_tokens: Sequence[int],
    ) -> list[str]:
        """What the model writes, greedily: the right answer where that is the likeliest."""
        decode = exact(self._tokenizer).detokenizer.decode
        texts = {
            i: decode(row.answer_ids[:-1])
            for i, (row, right) in enumerate(zip(rows, likeliest, strict=True))
            if right and len(row.answer_ids) - 1 <= max_tokens[i]  # its end need not be written
        }
        if left := [i for i, most in enumerate(max_tokens) if most and i not in texts]:
            written = batch_generate(
                self._model,
                self._tokenizer,
                [prompts[i] for i in left],
                max_tokens=[max_tokens[i] for i in left],
                prefill_batch_size=self._batch_size,
                completion_batch_size=self._batch_size,
            ).texts
            texts |= zip(left, written, strict=True)
        return [texts.get(i, "") for i in range(len(rows))]

    def _right_answers(self, read: Sequence[TokenizedExample]) -> tuple[list[float], list[bool]]:
        """The negative log-likelihood of each right answer, and if all its tokens are likeliest."""
        embedding = self._embedding
        batch = make_batch(read, 1, embedding.pad_token_id, embedding.vocab_size)
        # Long prompts are read in steps: attention takes memory by the square of what it reads.
        begun = min(sum(len(s.ids) for s in row.segments) - 1 for row in read) // STEP * STEP
        cache = make_prompt_cache(self._model) if begun else None
        for start in range(0, begun, STEP):
            self._model(batch.ids[:, start : start + STEP], cache=cache)
            mx.eval([each.state for each in cache])
        if begun:
            row, column = mx.divmod(batch.answer_at, batch.ids.shape[1])
            ids = batch.ids[:, begun:]
            at = row * ids.shape[1] + mx.maximum(column - begun, 0)  # padding's is 0
            batch = replace(batch, ids=ids, answer_at=at)
        logits = answer_logits(self._model, batch, cache).astype(mx.float32)
        losses = np.array(cross_entropy(logits, batch.targets)[0], np.float64)
        hits = np.array(logits.argmax(axis=-1) == batch.targets)
        *ends, total = np.cumsum([len(row.answer_ids) for row in read])
        nll = [float(part.sum()) for part in np.split(losses[:total], ends)]
        return nll, [bool(part.all()) for part in np.split(hits[:total], ends)]


def stored_date(path: str | None) -> str | None:
    """The date that the chat template wrote into the questions of a predictions file, if any."""
    if path is None or not Path(path).is_file():
        return None
    try:
        with Path(path).open("rb") as file:
            lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
            known = [json.loads(line)[OF] for line in lines if line.startswith(_BEGUN)]
    except (OSError, ValueError, RecursionError):  # the file itself says so later
        return None
    return next((about[DATE] for about in known if about.get(DATE)), None)


class PredictionsFile:
    """Answers by method and question, in a file or, where ``path`` is None, in memory alone.

    ``identity`` names what the answers depend on, each by all values by which a file may know it,
    the first of which is written. A file of something else, or of another kind, is left alone.
    """

    def __init__(self, path: str | None, identity: Mapping[str, Sequence[str]], size: int):
        self._path, self._size = None if path is None else Path(path), size
        # By a method's name and K: an older file may hold a method that is gone.
        self._found: dict[tuple[str, int], dict[int, Prediction]] = defaultdict(dict)
        if self._path is None:
            return
        if self._path.exists() and not self._path.is_file():
            raise EvaluateError(f"`predictions` {path} is not a file: name one")
        known, end = self._read() if self._path.exists() else ({}, 0)
        changed = [
            name
            if max(map(len, (known[name], *values))) > MOST_SHOWN
            else f"{name}, {known[name]} there and {values[0]} here"
            for name, values in identity.items()
            if known.get(name, values[0]) not in values
        ]
        if changed:
            raise EvaluateError(
                f"`predictions` {path} holds answers of another evaluation (not the same: "
                f"{'; '.join(changed)}): name another file, or remove it"
            )
        # An adapter that the file does not know yet is added.
        more = {name: values[0] for name, values in identity.items() if name not in known}
        self._append([{OF: more}] if more else [], end)

    def has(self, method: Method, indices: Sequence[int]) -> bool:
        """Whether a method's answers to all these questions are there."""
        return {*indices} <= self._found[method.name, method.k].keys()

    def add(
        self,
        method: Method,
        indices: Sequence[int],
        questions: Sequence[Question],
        predictions: Sequence[Prediction],
    ) -> None:
        """Adds a method's answers to some questions; they are on the disk when it returns."""
        lines = []
        for i, question, prediction in zip(indices, questions, predictions, strict=True):
            self._found[method.name, method.k][i] = prediction
            place = {"method": method.name, "k": method.k, "question": i}
            asked = {"group": question.group, "answer": question.answer}
            lines.append(place | asked | asdict(prediction))
        if self._path is not None:
            self._append(lines)

    def of(self, method: Method) -> list[Prediction]:
        """A method's answers, in the order of the questions; all must be there."""
        return [self._found[method.name, method.k][i] for i in range(self._size)]

    def _append(self, lines: Sequence[Mapping[str, Any]], end: int | None = None) -> None:
        """Writes lines at the end of the file, or at ``end``, where it is cut off first."""
        try:
            unshare(self._path)
            with self._path.open("ab") as file:
                if end is not None:
                    file.truncate(end)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                file.write(text.encode())
            flush(self._path)
        except OSError as error:
            raise EvaluateError(f"`predictions` {self._path}: {error.strerror}") from None

    def _read(self) -> tuple[dict[str, str], int]:
        """Takes the answers of whole lines; returns what they depend on, and where those end."""
        known: dict[str, str] = {}
        end = 0
        try:
            with self._path.open("rb") as file:
                lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
                for number, data in enumerate(lines, 1):
                    if number == 1 and data[: len(_BEGUN)] != _BEGUN[: len(data)]:
                        raise EvaluateError(
                            f"`predictions` {self._path} is not a predictions file: name another, "
                            "or a new one"
                        )
                    if not data.endswith(b"\n") and len(data) < MAX_LINE_BYTES:
                        break  # torn when a run was killed
                    self._take(number, data, known)
                    end += len(data)
        except OSError as error:
            raise EvaluateError(f"`predictions` {self._path}: {error.strerror}") from None
        return known, end

    def _take(self, number: int, data: bytes, known: dict[str, str]) -> None:
        """Takes one line: an answer, or more of what the answers depend on."""
        try:
            line = json.loads(data)
            if OF in line:
                known |= line[OF]
                good = all(isinstance(value, str) for value in known.values())
            else:
                named = {f.name: line[f.name] for f in fields(Prediction)}
                text, nll, *counts = named.values()
                good = (
                    isinstance(text, str) and is_number(nll) and all(is_int(c, 1) for c in counts)
                )
                method = line["method"], line["k"]
                self._found[method][line["question"]] = Prediction(**named)
            if not good:
                raise ValueError("a value of another type")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvaluateError(
                f"`predictions` {self._path} line {number} is damaged ({first_line(error)}): "
                "remove the file, or its lines from there on"
            ) from None
