"""Turns examples into token ids: what merges, what stays raw, what is to be answered.

Source: ``mlx_lm.tuner.datasets`` (``CompletionsDataset`` and ``ChatDataset`` with ``mask_prompt``);
arXiv 2604.15153 (prompt and answer tokenized apart, no template).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.data.examples import Example
from kmerge_mlx.errors import DataError, PromptError
from kmerge_mlx.prompts.chat_template import ChatTemplate, renderer_of
from kmerge_mlx.prompts.lay_out import lay_out, lay_out_chat, plain_messages, without_tags
from kmerge_mlx.prompts.policy import DEFAULT_LAYOUT, Layout
from kmerge_mlx.prompts.segments import Segment, check_ids

_BARE = "leave the chat template out (`ignore_chat_template`)"
_ROWS = f"use prompt and completion rows, and {_BARE}"


@dataclass(frozen=True)
class TokenizedExample:
    """An example as ids."""

    segments: list[Segment]  # of the prompt: runs that merge and runs that do not
    answer_ids: Sequence[int]  # an end-of-text token is last; empty where there is no answer

    @property
    def num_tokens(self) -> int:
        """How many ids prompt and answer have together."""
        return sum(len(segment.ids) for segment in self.segments) + len(self.answer_ids)

    def packed(self) -> TokenizedExample:
        """The same in 4 bytes a token, for there may be many."""
        segments = [Segment(array("i", s.ids), s.merge) for s in self.segments]
        return TokenizedExample(segments, array("i", self.answer_ids))

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's ids, laid end to end."""
        return [i for segment in self.segments for i in segment.ids]


def tokenize(tokenizer: Any, example: Example, layout: Layout = DEFAULT_LAYOUT) -> TokenizedExample:
    """Turns an example into ids; the prompt's are those that generation reads.

    With a chat template, prompt and answer are cut apart where the template's generation prompt
    ends, so their ids laid end to end are those of the whole conversation, up to the token that
    ends the answer: what a template writes after it (ChatML's line break) is never generated, and
    is left out. Without one, prompt and answer are tokenized apart. Raises DataError where that
    cannot be done, and PromptError as ``prompts.lay_out`` does, or for an id past the base's table.
    """
    row = _tokenized(tokenizer, example, layout)
    if (rows := getattr(tokenizer, "table_rows", None)) is not None:
        check_ids([*row.prompt_ids, *row.answer_ids], rows, tokenizer)
    return row


def prompt_segments(tokenizer: Any, example: Example, layout: Layout) -> list[Segment]:
    """The prompt alone, also where the encoder has a tokenizer of its own (``MergedText``)."""
    templated = layout.chat_template and tokenizer.has_chat_template
    options = {} if example.tools is None else {"tools": list(example.tools)}
    if example.messages:
        answered = example.messages[-1]["role"] == "assistant"
        asked = example.messages[: len(example.messages) - answered]
        return lay_out_chat(tokenizer, asked, layout, options)
    chat = ChatTemplate(options=options) if templated and not example.bare else None
    return lay_out(tokenizer, example.context, example.prompt, chat, layout)


def _tokenized(tokenizer: Any, example: Example, layout: Layout) -> TokenizedExample:
    templated = layout.chat_template and tokenizer.has_chat_template
    options = {} if example.tools is None else {"tools": list(example.tools)}
    if example.messages:
        if not templated:
            why = "it is left out" if tokenizer.has_chat_template else "this tokenizer has none"
            raise DataError(f"messages need a chat template, and {why}: {_ROWS}")
        answered = example.messages[-1]["role"] == "assistant"
        asked = example.messages[: len(example.messages) - answered]
        try:
            segments = prompt_segments(tokenizer, example, layout)
        except PromptError as error:
            raise DataError(f"{error.found}: change the row, or {_ROWS}") from None
        turns = plain_messages(asked)
        whole = plain_messages(example.messages) if answered else None
    else:
        bare = example.bare or not templated
        segments = prompt_segments(tokenizer, example, layout)
        if options and bare:
            raise DataError("tools need a chat template, and none is applied: leave them out")
        if bare and example.answer is not None:
            ids = list(tokenizer.encode(example.answer, add_special_tokens=False))
            return TokenizedExample(segments, _ended(tokenizer, ids))
        parts = [without_tags(part) for part in (example.context, example.prompt) if part]
        turns = [{"role": "user", "content": CONTEXT_SEPARATOR.join(filter(None, parts))}]
        answer = {"role": "assistant", "content": example.answer}
        whole = None if example.answer is None else [*turns, answer]
    row = TokenizedExample(segments, [])
    if whole is None:
        return row
    try:
        ids = _after_prompt(tokenizer, row.prompt_ids, turns, whole, options, layout.date)
    except (DataError, PromptError) as error:
        found = error.found if isinstance(error, PromptError) else error
        raise DataError(f"{found}: {_ROWS if example.messages else _BARE}") from None
    return TokenizedExample(segments, _ended(tokenizer, ids))


def _after_prompt(
    tokenizer: Any,
    prompt: list[int],
    turns: Sequence[Mapping[str, Any]],
    whole: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    date: str | None,
) -> list[int]:
    """The ids of a conversation that follow its prompt; tokenized apart if a token straddles it."""
    render = renderer_of(tokenizer, turns, options, date=date)
    text = render(whole, prompt=False)
    rest = list(tokenizer.encode(text, add_special_tokens=False))
    if rest[: len(prompt)] == prompt:
        rest = rest[len(prompt) :]
    elif text.startswith(before := render(turns)):
        rest = list(tokenizer.encode(text[len(before) :], add_special_tokens=False))
    else:
        raise DataError(
            "the chat template writes the prompt otherwise when an answer follows it, so the "
            "answer cannot be told from the prompt"
        )
    if not rest:
        raise DataError("the chat template leaves the answer out")
    return rest


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """An answer's ids with one end-of-text token, last; what follows its own is left out."""
    end = None
    for i in reversed(range(len(ids))):
        if ids[i] in tokenizer.eos_token_ids:
            end = i
        elif tokenizer.decode([ids[i]]).strip():
            break
    if end is not None:
        return ids[: end + 1]
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token to end an answer with")
    return [*ids, tokenizer.eos_token_id]
