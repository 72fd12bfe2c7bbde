"""The file of answers, from which a table is made and with which a killed run goes on.

Owns its lines: what the answers depend on, then every answer with its method and question. The file
is appended to, batch by batch. A batch that was not finished is answered again, because an answer's
last digits depend on its batch; the later line counts. A torn last line is cut off.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kmerge_mlx.errors import EvaluateError, short
from kmerge_mlx.evaluation.baselines import Method
from kmerge_mlx.evaluation.questions import Question
from kmerge_mlx.evaluation.scoring import Prediction

OF = "evaluation"
"""The key of what the answers depend on."""
ROUNDING = 1e-3
"""A likelihood may lie this little above 1."""
MOST_SHOWN = 20
"""Longer values are digests: that they differ says it all."""

_KINDS = {
    "method": str,
    "k": int,
    "question": int,
    "text": str,
    "nll": float,
    "answer_tokens": int,
    "prompt_tokens": int,
    "positions": int,
}
"""What is read of a line; the rest is there for people."""


class PredictionsFile:
    """Answers by method and question.

    Args:
        path: The JSONL file, or None: they are kept in memory alone.
        identity: What the answers depend on, by name; a file made of something else is refused.
        size: How many questions there are.

    Raises:
        EvaluateError: The file cannot be read or written, is no such file, or is another
            evaluation's. It is as it was then.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, str], size: int):
        self._path = None if path is None else Path(path)
        self._size = size
        self._found: dict[tuple[str, int], dict[int, Prediction]] = defaultdict(dict)
        if self._path is None:
            return
        try:
            if self._path.exists() and not self._path.is_file():
                raise EvaluateError(f"--predictions {path} is not a file: name one")
            known, end = self._read() if self._path.exists() else ({}, 0)
            self._check(known, identity)
            # An adapter that the file knows nothing of yet is one more.
            more = {name: what for name, what in identity.items() if name not in known}
            self._append([{OF: more}] if more else [], end)
        except OSError as error:
            raise EvaluateError(f"--predictions {path}: {error.strerror}") from None

    def missing(self, method: Method, batches: Sequence[Sequence[int]]) -> list[int]:
        """The numbers of the batches that are not all there."""
        found = self._found[method.name, method.k]
        return [n for n, batch in enumerate(batches) if not all(i in found for i in batch)]

    def add(
        self,
        method: Method,
        indices: Sequence[int],
        questions: Sequence[Question],
        predictions: Sequence[Prediction],
    ) -> None:
        """Adds the answers of a batch, and has them on the disk before it returns.

        Args:
            method: The method that gave them.
            indices: Which questions they answer.
            questions: Those questions.
            predictions: The answers.

        Raises:
            EvaluateError: They cannot be written.
        """
        lines = []
        for i, question, prediction in zip(indices, questions, predictions, strict=True):
            self._found[method.name, method.k][i] = prediction
            place = {"method": method.name, "k": method.k, "question": i}
            asked = {"group": question.group, "answer": question.answer}
            lines.append(place | asked | asdict(prediction))
        if self._path is None:
            return
        try:
            self._append(lines)
        except OSError as error:
            raise EvaluateError(f"--predictions {self._path}: {error.strerror}") from None

    def of(self, method: Method) -> list[Prediction]:
        """A method's answers, in the order of the questions; none may be missing."""
        found = self._found[method.name, method.k]
        return [found[i] for i in range(self._size)]

    def _append(self, lines: Sequence[Mapping[str, Any]], end: int | None = None) -> None:
        """Writes lines at the end of the file, or at ``end``, where it is cut off first."""
        with self._path.open("ab") as file:
            if end is not None:
                file.truncate(end)
            file.write(b"".join(map(_bytes, lines)))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> tuple[dict[str, str], int]:
        """Takes the answers of every whole line.

        Returns:
            What they depend on, and where the last whole line ends, in bytes.
        """
        known: dict[str, str] = {}
        end = 0
        with self._path.open("rb") as file:
            for number, data in enumerate(file, 1):
                line = _parsed(data)
                whole = data.endswith(b"\n")
                if number == 1 and not whole and data[: len(_BEGUN)] == _BEGUN[: len(data)]:
                    break  # killed before its first line was whole
                if number == 1 and not (line and isinstance(line.get(OF), dict)):
                    raise EvaluateError(
                        f"--predictions {self._path} is no predictions file: name another, or a "
                        "new one"
                    )
                if not whole:
                    break  # a killed run's last
                if line and isinstance(line.get(OF), dict):
                    known |= line[OF]
                else:
                    self._take(line, number)
                end += len(data)
        return known, end

    def _take(self, line: Mapping[str, Any] | None, number: int) -> None:
        """Takes an answer.

        Raises:
            EvaluateError: The line is none.
        """
        if problem := self._problem(line):
            raise EvaluateError(
                f"--predictions {self._path} line {number}: {problem}; the file was damaged: "
                "remove it, or its lines from there on"
            )
        prediction = Prediction(**{field.name: line[field.name] for field in fields(Prediction)})
        self._found[line["method"], line["k"]][line["question"]] = prediction

    def _problem(self, line: Mapping[str, Any] | None) -> str | None:
        """Why a line is no answer, or None if it is one."""
        if line is None:
            return "it is no JSON object"
        for name, kind in _KINDS.items():
            value = line.get(name)
            if type(value) is not kind:  # a bool is an int, too
                return f"{name} is {short(value)}"
            if kind is int and value < (name != "question"):
                return f"{name} is {value}"
        if line["nll"] < -ROUNDING:
            return f"nll is {line['nll']}"
        if line["positions"] > line["prompt_tokens"]:
            return f"positions are {line['positions']}, of {line['prompt_tokens']} tokens"
        if line["question"] >= self._size:
            return f"question is {line['question']}, and there are {self._size:,}"
        return None

    def _check(self, known: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        """Refuses answers of another evaluation."""
        changed = [
            name
            if max(len(str(known[name])), len(what)) > MOST_SHOWN
            else f"{name}, {known[name]} there and {what} here"
            for name, what in identity.items()
            if known.get(name, what) != what
        ]
        if changed:
            raise EvaluateError(
                f"--predictions {self._path} holds answers of another evaluation (not the same: "
                f"{'; '.join(changed)}): name another file, or remove it"
            )


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _bytes(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


_BEGUN = _bytes({OF: {}}).removesuffix(b"}}\n")
"""How the first line of every file begins."""
