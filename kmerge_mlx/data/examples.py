"""What a row of training data means: its prompt, what of it merges, and its answer.

Source: mlx_lm/LORA.md (formats and ``*_feature`` keys); arXiv 2604.15153 (the whole prompt merges);
the hub datasets bigcode/commitpackft and rajpurkar/squad (rows of a commit, and of a question).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.config import is_number
from kmerge_mlx.data.jsonl import Row
from kmerge_mlx.errors import DataError, PromptError, short
from kmerge_mlx.prompts.messages import normalised
from kmerge_mlx.prompts.tags import cuts_tag, escape

EDIT = ("old_contents", "subject", "new_contents")
QUESTION = ("context", "question", "answers")


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer."""

    context: str | None = None  # what merges: the whole prompt if a row does not tell them apart
    prompt: str | None = None  # text to read raw after it
    answer: str | None = None
    bare: bool = False  # no chat template applies, as in mlx-lm's text format
    messages: tuple[Mapping[str, Any], ...] = ()  # instead of all that; the last is the answer
    tools: tuple[Any, ...] | None = None
    answers: tuple[str, ...] = ()  # every right one of a SQuAD row; the first is ``answer``


@dataclass(frozen=True)
class RowFormat:
    """The keys of a row (mlx-lm's, and ours for what merges and where a text is cut).

    A row with a ``context`` keeps its prompt raw; without one, the whole prompt merges. A text that
    has no ``split`` is cut at the white space before ``text_split``. Rows of CommitPackFT and SQuAD
    are known by their own keys; what stays raw of them is the commit's subject, or the question.
    """

    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"
    context_feature: str = "context"
    split_feature: str = "split"  # the character of a text at which its answer begins
    text_split: float | None = None  # share of a text, between 0 and 1, before its answer
    answers: bool = True  # whether every row must have one

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_feature") and not (isinstance(value, str) and value):
                raise DataError(f"{name} is {short(value)}, expected the name of a key")
        share = self.text_split
        if share is not None and not (is_number(share) and 0 < share < 1):
            raise DataError(f"text_split is {short(share)}, expected a share between 0 and 1")

    def read(self, row: Row) -> Example:
        """Reads a row, or raises DataError; unknown keys are ignored, as in mlx-lm."""
        named = self.prompt_feature, self.completion_feature, self.chat_feature, self.text_feature
        if not row.keys() & set(named):
            if row.keys() >= set(EDIT):
                return edit_example(row)
            if row.keys() >= set(QUESTION):
                return question_example(row)
        asks = self.prompt_feature in row or self.context_feature in row
        others = self.chat_feature in row or self.text_feature in row
        if asks and (self.completion_feature in row or not (others or self.answers)):
            return self._completion(row)
        if self.chat_feature in row:
            return self._chat(row)
        if self.text_feature in row:
            return self._text(row)
        found = ", ".join(map(str, list(row)[:8])) or "no key"
        raise DataError(
            f"found {short(found)}, expected {self.prompt_feature} and {self.completion_feature}, "
            f"or {self.chat_feature}, or {self.text_feature} (or {', '.join(EDIT)}; or "
            f"{', '.join(QUESTION)})"
        )

    def _completion(self, row: Row) -> Example:
        answer = _text_of(row, self.completion_feature)
        if not answer and self.answers:
            raise DataError(f"{self.completion_feature} is empty, expected an answer")
        parts = self._parts(row, _text_of(row, self.prompt_feature))
        return Example(*parts, answer or None, tools=_tools_of(row))

    def _text(self, row: Row) -> Example:
        text = _text_of(row, self.text_feature)
        at = self._split(row, text)
        return Example(*self._parts(row, text[:at]), text[at:] or None, bare=True)

    def _parts(self, row: Row, prompt: str) -> tuple[str | None, str | None]:
        """What merges and what stays raw: without a ``context`` key, all of the prompt merges."""
        context = _text_of(row, self.context_feature) if self.context_feature in row else None
        parts = (prompt, None) if context is None else (context or None, prompt or None)
        if not any(parts):
            raise DataError(f"{self.prompt_feature} is empty, expected a prompt")
        return parts

    def _split(self, row: Row, text: str) -> int:
        """The character at which the answer of a text begins."""
        at = row.get(self.split_feature)
        if at is None and self.text_split is not None:
            at = max(space_before(text, 0, int(len(text) * self.text_split)), 1)
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
        try:
            messages = normalised(row[name], name)
        except PromptError as error:
            raise DataError(str(error)) from None
        if row.get(self.context_feature) is not None:
            raise DataError(
                f"found {self.context_feature} beside {name}: mark what merges in the messages, "
                f"or use {self.prompt_feature} and {self.completion_feature}"
            )
        last = messages[-1]
        answered = last["role"] == "assistant"
        if self.answers and not answered:
            raise DataError(f"{name} ends with {last['role']!r}, expected the assistant")
        if self.answers and not last["content"] and not last.get("tool_calls"):
            raise DataError(f"{name} ends with an empty answer")
        if len(messages) - answered < 1:
            raise DataError(f"{name} holds no prompt, expected a message before the assistant's")
        return Example(messages=tuple(messages), tools=_tools_of(row))


def space_before(text: str, start: int, end: int) -> int:
    """Where to cut a text: before the last white space after ``start``, if any, up to ``end``."""
    found = max(text.rfind(c, start + 1, end + 1) for c in " \n\t")
    return found if found > 0 else end


def edit_example(row: Row) -> Example:
    """Reads a commit of CommitPackFT: the file before it merges, and its subject stays raw."""
    old, subject, new = texts_of(row, EDIT)
    if not new:
        raise DataError("new_contents is empty, expected an answer")
    prompt = f"Write the whole file after this change: {escape(subject)}"
    return Example(escape(old) or None, prompt, new)


def question_example(row: Row) -> Example:
    """Reads a question of SQuAD: its context merges, and the question stays raw."""
    context, question = texts_of(row, QUESTION[:2])
    answers = right_answers(row["answers"])
    if not answers:
        raise DataError("answers is empty, expected an answer")
    return Example(escape(context) or None, escape(question), answers[0], answers=answers)


def right_answers(value: Any) -> tuple[str, ...]:
    """The different answers of a SQuAD row, none if it cannot be answered.

    They are texts, or objects with a ``text``, or (on the hub) an object with a list of them.
    """
    found = value.get("text") if isinstance(value, dict) else value
    items = found if isinstance(found, list) else [None]
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"answers is {short(value)}, expected a list of texts")
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def texts_of(row: Row, keys: Sequence[str]) -> list[str]:
    """The texts of some keys, all of which must be there."""
    for key in keys:
        if not isinstance(row.get(key), str):
            raise DataError(f"{key} is {short(row.get(key))}, expected text")
    return [row[key] for key in keys]


def _text_of(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str | None):
        raise DataError(f"{key} is {short(value)}, expected text")
    return value or ""


def _tools_of(row: Row) -> tuple[Any, ...] | None:
    tools = row.get("tools")
    if not isinstance(tools, list | None):
        raise DataError(f"tools is {short(tools)}, expected a list")
    return tools and tuple(tools)
