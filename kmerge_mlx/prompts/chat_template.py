"""Renders conversations with a tokenizer's chat template, and notices what it leaves out.

Source: mlx_lm.generate for the template's arguments; transformers.utils.chat_template_utils for
what a template may call.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from typing import Any

from kmerge_mlx.errors import PromptError, first_line
from kmerge_mlx.prompts.tags import Span, text_of

_MARK = "\ue000\uf8ff"
"""Around a number, a place in what a template is given."""

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""How a template asks transformers for today's date."""


@dataclass(frozen=True)
class ChatTemplate:
    """How ``mlx_lm.generate`` wraps one user message, with its options.

    Args:
        system_prompt: Content of a leading system message, or None.
        prefill_response: Beginning of the answer, or None.
        options: Further arguments of ``apply_chat_template``.
    """

    system_prompt: str | None = None
    prefill_response: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, content: Any) -> list[dict[str, Any]]:
        """The conversation of one user message."""
        texts = (self.system_prompt, content, self.prefill_response)
        roles = zip(("system", "user", "assistant"), texts, strict=True)
        return [{"role": role, "content": text} for role, text in roles if text is not None]

    def render(self, tokenizer: Any, text: str) -> str:
        """The full prompt text for one user message.

        Raises:
            PromptError: The template refuses the messages or its options.
        """
        messages = self.messages(text)
        return renderer_of(tokenizer, messages, self.options, self.prefilled)(messages)

    @property
    def prefilled(self) -> bool:
        """Whether the conversation ends with the beginning of an answer."""
        return self.prefill_response is not None


def writes_date(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template writes today's date into every prompt."""
    return _CLOCK.search(str(getattr(tokenizer, "chat_template", None))) is not None


def now(tokenizer: Any) -> str | None:
    """The date and time that a layout goes on with, or None: the template does not write it."""
    return datetime.now().isoformat(timespec="seconds") if writes_date(tokenizer) else None


def needs_template(tokenizer: Any, asked: bool | None) -> None:
    """Raises PromptError if a template is asked for that the tokenizer does not have."""
    if asked and not tokenizer.has_chat_template:
        raise PromptError(
            "`apply_chat_template`: this tokenizer has no chat template: leave it out, or use a "
            "base whose tokenizer_config.json or chat_template.jinja has one"
        )


@dataclass(frozen=True)
class Renderer:
    """A chat template with its arguments; :func:`renderer_of` makes one that fits the messages."""

    tokenizer: Any
    options: Mapping[str, Any]
    prefilled: bool = False
    date: str | None = None
    as_parts: bool = False  # a content is a list of one part, not a text
    as_text: bool = False  # the arguments of a tool call are their JSON, not an object

    def __call__(self, messages: Sequence[Mapping[str, Any]], prompt: bool = True) -> str:
        """The text of messages whose contents are texts; ``prompt``: an answer is to follow."""
        given = {"add_generation_prompt": prompt and not self.prefilled, "tokenize": False}
        given["continue_final_message"] = self.prefilled
        own = "chat_template" in self.options
        if self.date is not None and not own and writes_date(self.tokenizer):
            given["chat_template"] = self._dated()
        shown = [dict(message) for message in messages]
        for message in shown:
            if self.as_parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
            if self.as_text and "tool_calls" in message:
                message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        try:
            return self.tokenizer.apply_chat_template(shown, **given, **self.options)
        except Exception as error:  # a template is a program: it raises what it likes
            raise PromptError(
                f"the chat template refused ({first_line(error)})", self._remedy(messages)
            ) from error

    def _dated(self) -> str:
        """The template with its date in place of the clock's; transformers lets no function in."""
        written = datetime.fromisoformat(self.date).strftime
        template = self.tokenizer.get_chat_template(tools=self.options.get("tools"))
        return _CLOCK.sub(lambda found: json.dumps(written(found[2])), template)

    def left_out(self, messages: Sequence[Mapping[str, Any]], written: str) -> str:
        """What of the messages, or which option, is not in what the template wrote; empty: nothing.

        An object that it writes as Python's ``{'a': 1}`` counts as left out.
        """
        called = [c.get("function", c) for m in messages for c in m.get("tool_calls", ())]
        if any(f["arguments"] and str(f["arguments"]) in written for f in called):
            return "the arguments of tool calls"
        without = replace(self, options={**self.options, "tools": None})
        with contextlib.suppress(PromptError):  # one that needs the tools writes them
            if self.options.get("tools") and without(messages) == written:
                return "tools"
        asked = [i for i, m in enumerate(messages) if m["role"] != "assistant" and m["content"]]
        marked = [dict(message) for message in messages]
        for i in asked:  # in the middle: some templates look at the ends
            text = marked[i]["content"]
            place = len(text) // 2
            marked[i]["content"] = f"{text[:place]}{_MARK}{i}{_MARK}{text[place:]}"
        try:
            text = self(marked)
        except PromptError:  # it checks what the texts are
            return ""
        missing = [i for i in asked if f"{_MARK}{i}{_MARK}" not in text]
        return f"messages[{missing[0]}] ({messages[missing[0]]['role']})" if missing else ""

    def _remedy(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What helps where a template refuses, or leaves something out."""
        if any(message["role"] == "system" for message in messages):
            return "leave the system message out, or put it into the user's"
        if self.prefilled or self.options:
            return "leave its options and the beginning of the answer out"
        return "change what it is given, or leave it out (`ignore_chat_template`)"


def renderer_of(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any] | None = None,
    prefilled: bool = False,
    date: str | None = None,
) -> Renderer:
    """The renderer with which a template writes all of some messages, whose contents are texts.

    A template that cannot take a content as text is given a list of one text part, and one that
    cannot take the arguments of tool calls as objects their JSON.

    Raises:
        PromptError: The template refuses the messages, or leaves one of them or ``tools`` out.
    """
    plain, problems = Renderer(tokenizer, options or {}, prefilled, date), []
    for form in ({}, {"as_parts": True}, {"as_text": True}):
        renderer = replace(plain, **form)
        try:
            if not (what := renderer.left_out(messages, renderer(messages))):
                return renderer
            tools = what == "tools"
            remedy = "remove them" if tools else renderer._remedy(messages)
            said = f"the chat template leaves {what} out"
            problems.append(PromptError(said, remedy, "tools" if tools else None))
        except PromptError as error:
            problems.append(error)
    raise problems[0]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON, not an object."""
    function = call.get("function", call)
    text = json.dumps(function["arguments"], ensure_ascii=False)
    function = {**function, "arguments": text}
    return {**call, "function": function} if "function" in call else function


def with_texts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are spans, with texts in their place."""
    return [{**message, "content": text_of(message["content"])} for message in messages]


def rendered(
    messages: Sequence[Mapping[str, Any]], render: Callable[..., str], strict: bool
) -> list[Span]:
    """The text of a conversation, whose contents are spans, as spans.

    The template gets the contents without marks at the borders of spans, and with. If the results
    differ in more than the marks, the template rewrites its text: an error if ``strict``; otherwise
    the text is read as the template is.
    """
    numbers = count()
    whole = render(with_texts(messages))
    merges = [span.merge for m in messages for span in m["content"] if span.merge is not None]
    if not merges:
        return [Span(whole)]
    marked = [{**m, "content": _marked(m["content"], numbers)} for m in messages]
    pieces = re.split(rf"{_MARK}(\d+){_MARK}", render(marked))
    texts, marks = pieces[::2], [int(number) for number in pieces[1::2]]
    if "".join(texts) == whole:
        around = zip([-1, *marks], texts, [*marks, -1], strict=True)
        return [
            Span(text, merges[mark // 2] if mark % 2 == 0 and after == mark + 1 else None)
            for mark, text, after in around
        ]
    if strict:
        raise PromptError(
            "the chat template rewrites the text, so it is not known which of its tokens merge",
            "leave it out (`ignore_chat_template`), or the tags and `merge`",
        )
    return [Span(whole)]


def _marked(content: Sequence[Span], numbers: Iterator[int]) -> str:
    """A content with a numbered mark at each border of a span that specifies what merges.

    Many templates trim a message, so outer white space stays outside the marks.
    """
    text = text_of(content)
    first = len(text) - len(text.lstrip())
    last = max(first, len(text.rstrip()))
    pieces, end, written = [], 0, 0
    for span in content:
        start, end = end, end + len(span.text)
        if span.merge is not None:
            low, high = (min(max(place, first), last) for place in (start, end))
            for upto in (low, high):
                pieces += [text[written:upto], f"{_MARK}{next(numbers)}{_MARK}"]
                written = upto
    return "".join([*pieces, text[written:]])
