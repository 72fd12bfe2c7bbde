"""Examples to token ids: what merges, what stays raw, what is to be answered.

Owns: the answer's tokens (with a chat template or without, ended by the eos token) and the
conversation's prompt. A text prompt's tokens are those of ``prompt.lay_out``, so training reads
exactly what generation will. Does not know blocks, padding or models.

Source: ``mlx_lm.tuner.datasets`` (``CompletionsDataset`` and ``ChatDataset`` with ``mask_prompt``);
arXiv 2604.15153 (prompt and answer tokenized apart, no template).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.data.examples import Example
from kmerge_mlx.errors import DataError, first_line
from kmerge_mlx.prompts.lay_out import (
    ChatTemplate,
    lay_out,
    lay_out_chat,
    plain_messages,
    without_tags,
)
from kmerge_mlx.prompts.policy import DEFAULT_LAYOUT, Layout
from kmerge_mlx.prompts.segments import Segment

_BARE = "use prompt and completion rows and leave the chat template out"


@dataclass(frozen=True)
class TokenizedExample:
    """An example as ids, all below V.

    Args:
        segments: The prompt's ids, in runs that merge and runs that do not; T in all.
        answer_ids: The answer's ids, an end-of-text token last; empty where there is no answer.
    """

    segments: list[Segment]
    answer_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """How many ids prompt and answer have together."""
        return sum(len(segment.ids) for segment in self.segments) + len(self.answer_ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's ids, laid end to end."""
        return [i for segment in self.segments for i in segment.ids]


def tokenize(tokenizer: Any, example: Example, layout: Layout = DEFAULT_LAYOUT) -> TokenizedExample:
    """Turns an example into ids.

    With a chat template, prompt and answer are cut apart where the template's generation prompt
    ends, so their ids laid end to end are those of the whole conversation, up to the token that
    ends the answer: what a template writes after it (ChatML's line break) is never generated, and
    is left out. Without one, prompt and answer are tokenized apart.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        example: What to turn into ids.
        layout: What merges where nothing is said, and whether a chat template applies, where the
            tokenizer has one and the example is not ``bare``.

    Raises:
        DataError: A conversation and no template, a template that refuses, or one that writes the
            prompt otherwise when an answer follows it; a tokenizer without an eos token.
        PromptError: As for ``prompt.lay_out``.
    """
    templated = layout.chat_template and tokenizer.has_chat_template
    if example.messages:
        if not templated:
            why = "it is left out" if tokenizer.has_chat_template else "this tokenizer has none"
            raise DataError(f"messages need a chat template, and {why}: {_BARE}")
        return _conversation(tokenizer, example, layout)
    options = {} if example.tools is None else {"tools": list(example.tools)}
    chat = ChatTemplate(options=options) if templated and not example.bare else None
    segments = lay_out(tokenizer, example.context, example.prompt, chat, layout)
    if example.answer is None:
        return TokenizedExample(segments, [])
    if chat is None:
        ids = list(tokenizer.encode(example.answer, add_special_tokens=False))
        return TokenizedExample(segments, _ended(tokenizer, ids))
    parts = (part and without_tags(part) for part in (example.context, example.prompt))
    text = CONTEXT_SEPARATOR.join(part for part in parts if part)
    answer = {"role": "assistant", "content": example.answer}
    whole = _render(tokenizer, [{"role": "user", "content": text}, answer], example.tools)
    prompt = TokenizedExample(segments, []).prompt_ids
    ids = _after_prompt(tokenizer, prompt, lambda: chat.render(tokenizer, text), whole)
    return TokenizedExample(segments, _ended(tokenizer, ids))


def _conversation(tokenizer: Any, example: Example, layout: Layout) -> TokenizedExample:
    """Messages to ids; the answer's message is not part of the prompt, and its tags are text."""
    messages = example.messages
    answered = messages[-1]["role"] == "assistant"
    options = {} if example.tools is None else {"tools": list(example.tools)}
    asked = messages[: len(messages) - answered]
    segments = lay_out_chat(tokenizer, asked, layout, options)
    row = TokenizedExample(segments, [])
    if not answered:
        return row
    plain = plain_messages(asked)
    whole = _render(tokenizer, plain_messages(messages), example.tools)
    ids = _after_prompt(
        tokenizer, row.prompt_ids, lambda: _render(tokenizer, plain, example.tools, True), whole
    )
    return TokenizedExample(segments, _ended(tokenizer, ids))


def _render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    prompt: bool = False,
) -> str:
    options = {} if tools is None else {"tools": list(tools)}
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            **options,
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise DataError(f"the chat template refused ({first_line(error)}): {_BARE}") from error


def _after_prompt(
    tokenizer: Any, prompt: list[int], render_prompt: Callable[[], str], whole: str
) -> list[int]:
    """The ids of a conversation that follow its prompt.

    Where a token of the conversation would straddle the border, the answer is tokenized apart.
    """
    ids = list(tokenizer.encode(whole, add_special_tokens=False))
    if ids[: len(prompt)] == prompt:
        rest = ids[len(prompt) :]
    elif whole.startswith(before := render_prompt()):
        rest = list(tokenizer.encode(whole[len(before) :], add_special_tokens=False))
    else:
        raise DataError(
            "the chat template writes the prompt otherwise when an answer follows it, so the "
            f"answer cannot be told from the prompt: {_BARE}"
        )
    if not rest:
        raise DataError(f"the chat template leaves the answer out: {_BARE}")
    return rest


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """An answer's ids with one end-of-text token, last.

    If the ids already end with one, white space and other such tokens aside, they are cut after it.
    """
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
