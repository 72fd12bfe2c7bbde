"""What a row of training data means, and a file of them by index.

Owns: mlx-lm's row formats (``prompt``/``completion``, ``messages``, ``text``), the ``context``
field that merges while the prompt stays raw, the split point of a ``text``, and every check that a
row can be trained on. Does not know tokenizers.

Source: mlx_lm/LORA.md (formats and ``*_feature`` keys); arXiv 2604.15153 (the whole prompt merges).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from kmerge_mlx.config import is_number
from kmerge_mlx.data.jsonl import JsonLines, Row, check_file, is_gzip, parse_row
from kmerge_mlx.errors import DataError, short
from kmerge_mlx.prompts.tags import cuts_tag


@dataclass(frozen=True)
class Example:
    """One prompt and its answer; the prompt is text, or chat messages.

    Args:
        context: Text to merge, or None. The whole prompt, where a row does not tell them apart.
        prompt: Text to read raw, after the context, or None.
        answer: Text to learn, or None where none is given (and none was asked for).
        bare: Whether no chat template applies, as in mlx-lm's ``text`` format.
        messages: A conversation, the last message being the answer; or empty. All of it but the
            answer merges.
        tools: What the chat template lists as tools, or None.
    """

    context: str | None = None
    prompt: str | None = None
    answer: str | None = None
    bare: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class RowFormat:
    """Under which keys a row keeps what, and where a ``text`` is cut.

    Args:
        prompt_feature: Key of the prompt.
        completion_feature: Key of its answer.
        chat_feature: Key of a conversation.
        text_feature: Key of a text.
        context_feature: Key of what merges while the prompt stays raw; a row without it merges its
            whole prompt.
        split_feature: Key of the character of a text at which its answer begins.
        text_split: The share of a text, between 0 and 1, after which its answer begins, for rows
            without a ``split``; the cut moves left to the next white space. None: each row says.
        answers: Whether every row must have an answer.

    Raises:
        DataError: A key that is no name, or a share out of range.
    """

    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"
    context_feature: str = "context"
    split_feature: str = "split"
    text_split: float | None = None
    answers: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_feature") and not (isinstance(value, str) and value):
                raise DataError(f"{name} is {short(value)}, expected the name of a key")
        share = self.text_split
        if share is not None and not (is_number(share) and 0 < share < 1):
            raise DataError(f"text_split is {short(share)}, expected a share between 0 and 1")

    def read(self, row: Row) -> Example:
        """A row to an example.

        Args:
            row: What a line of a file holds; keys that are not asked for are ignored, as in mlx-lm.

        Raises:
            DataError: A missing key, a wrong type, an empty answer, no prompt; says which.
        """
        if self._is_completion(row):
            return self._completion(row)
        if self.chat_feature in row:
            return self._chat(row)
        if self.text_feature in row:
            return self._text(row)
        found = ", ".join(map(str, list(row)[:8])) or "no key"
        raise DataError(
            f"found {short(found)}, expected {self.prompt_feature} and {self.completion_feature}, "
            f"or {self.chat_feature}, or {self.text_feature}"
        )

    def _is_completion(self, row: Row) -> bool:
        asks = self.prompt_feature in row or self.context_feature in row
        if self.completion_feature in row:
            return asks
        others = self.chat_feature in row or self.text_feature in row
        return asks and not others and not self.answers

    def _completion(self, row: Row) -> Example:
        answer = _optional(row, self.completion_feature)
        if not answer and self.answers:
            raise DataError(f"{self.completion_feature} is empty, expected an answer")
        context, prompt = self._parts(row, _optional(row, self.prompt_feature))
        return Example(context, prompt, answer or None, tools=_tools(row))

    def _text(self, row: Row) -> Example:
        text = _string(row, self.text_feature)
        at = self._split(row, text)
        context, prompt = self._parts(row, text[:at])
        return Example(context, prompt, text[at:] or None, bare=True)

    def _parts(self, row: Row, prompt: str | None) -> tuple[str | None, str | None]:
        """What merges and what stays raw: without a ``context`` key, all of the prompt merges."""
        apart = self.context_feature in row
        context = _optional(row, self.context_feature) if apart else prompt
        raw = prompt if apart else None
        if not context and not raw:
            raise DataError(f"{self.prompt_feature} is empty, expected a prompt")
        return context or None, raw or None

    def _split(self, row: Row, text: str) -> int:
        """The character at which the answer of a text begins."""
        at = row.get(self.split_feature)
        if at is None and self.text_split is not None:
            at = int(len(text) * self.text_split)
            blank = max(text.rfind(c, 1, at + 1) for c in " \n\t")
            at = blank if blank > 0 else max(at, 1)
        elif at is None and not self.answers:
            at = len(text)
        elif at is None:
            raise DataError(
                f"{self.text_feature} has no split point: put the character at which the answer "
                f"begins under {self.split_feature}, or set text_split for all rows"
            )
        elif isinstance(at, bool) or not isinstance(at, int):
            raise DataError(f"{self.split_feature} is {short(at)}, expected a whole number")
        last = len(text) - 1 if self.answers else len(text)
        if not 1 <= at <= last:
            raise DataError(
                f"{self.split_feature} is {at} in {len(text)} characters: "
                f"{'no prompt' if at < 1 else 'no answer'}, expected 1 to {last}"
            )
        if cuts_tag(text, at):
            raise DataError(f"{self.split_feature} is {at}, in the middle of a tag: move it")
        return at

    def _chat(self, row: Row) -> Example:
        name = self.chat_feature
        messages = row[name]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{name} is {short(messages)}, expected a list of messages")
        for number, message in enumerate(messages):
            _check_message(message, f"{name}[{number}]")
        if row.get(self.context_feature) is not None:
            raise DataError(
                f"found {self.context_feature} beside {name}, whose prompt merges whole: "
                f"use {self.prompt_feature} and {self.completion_feature}"
            )
        last = messages[-1]
        answered = last["role"] == "assistant"
        if self.answers:
            if not answered:
                raise DataError(f"{name} ends with {last['role']!r}, expected the assistant")
            if not last.get("content") and not last.get("tool_calls"):
                raise DataError(f"{name} ends with an empty answer")
        if len(messages) - answered < 1:
            raise DataError(f"{name} holds no prompt, expected a message before the assistant's")
        return Example(messages=tuple(messages), tools=_tools(row))


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} is {short(message)}, expected an object with role and content")
    content = message.get("content")
    if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
        raise DataError(f"{where}.content is {short(content)}, expected text")


def _string(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{key} is {short(value)}, expected text")
    return value


def _optional(row: Row, key: str) -> str | None:
    return None if row.get(key) is None else _string(row, key)


def _tools(row: Row) -> tuple[Any, ...] | None:
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"tools is {short(tools)}, expected a list")
    return tuple(tools)


class ExampleFile(Sequence[Example]):
    """The examples of a ``.jsonl`` or ``.jsonl.gz`` file, by index.

    The whole file is read and checked once, line by line, before the first example is given out;
    what is kept is where each line stands, 24 bytes an example, and a line is read and parsed again
    when it is asked for. So a file of any size can be shuffled, and the memory an epoch takes does
    not depend on it. A compressed file cannot be read from its middle: it is unpacked once, into a
    temporary file that has no name and is gone with the process.

    Args:
        path: The file.
        row_format: What its rows mean.
        skip_bad: Count bad lines and go on, instead of stopping at the first.

    Attributes:
        bad: How many lines were left out.
        first_bad: What was wrong with the first of them, or None.
        digest: SHA-256 of the good lines, by which a resumed run knows its data.

    Raises:
        DataError: A bad line (named), no line at all, or a file that cannot be read.
    """

    def __init__(
        self, path: str | Path, row_format: RowFormat | None = None, skip_bad: bool = False
    ):
        self.path = Path(path)
        self.row_format = row_format or RowFormat()
        self._offsets, self._lengths, self._numbers = array("Q"), array("Q"), array("Q")
        lines = JsonLines(self.path, self.row_format.read, skip_bad)
        digest = hashlib.sha256()
        self._file = self._open()
        try:
            self._index(lines, digest)
        except BaseException:
            self.close()
            raise
        self.bad, self.first_bad = lines.bad, lines.first_bad
        self.digest = digest.hexdigest()

    def _open(self) -> IO[bytes]:
        check_file(self.path)
        try:
            # Not in a `with`: the file stays open for as long as examples are asked for.
            return tempfile.TemporaryFile() if is_gzip(self.path) else self.path.open("rb")
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None

    def _index(self, lines: JsonLines[Example], digest: Any) -> None:
        """Checks every line, and notes where the good ones stand."""
        packed, end = is_gzip(self.path), 0
        for line, _ in lines:
            data = line.data or b""
            if packed:
                self._unpack(data)
            end = end + len(data) if packed else line.position
            self._offsets.append(end - len(data))
            self._lengths.append(len(data))
            self._numbers.append(line.number)
            digest.update(data.rstrip(b"\r\n") + b"\n")
        if packed:
            self._unpack(b"", flush=True)
        if not self._offsets:
            reason = f": every line is bad, {lines.first_bad}" if lines.bad else ""
            raise DataError(f"{self.path} holds no example{reason}")

    def _unpack(self, data: bytes, flush: bool = False) -> None:
        try:
            self._file.write(data)
            if flush:
                self._file.flush()
        except OSError as error:
            place = tempfile.gettempdir()
            raise DataError(f"cannot unpack {self.path} in {place}: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int | slice) -> Any:
        """Reads an example (or a list of them, for a slice) from the disk.

        Raises:
            DataError: The file was changed after it was opened.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        data = os.pread(self._file.fileno(), self._lengths[index], self._offsets[index])
        try:
            return self.row_format.read(parse_row(data))
        except DataError as error:
            raise DataError(f"{self.where(index)} was changed while in use: {error}") from None

    def where(self, index: int) -> str:
        """The file and line of an example, to name it in an error."""
        return f"{self.path} line {self._numbers[index]}"

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> ExampleFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
