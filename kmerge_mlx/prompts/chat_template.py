"""A conversation through a tokenizer's chat template, and where its contents stand in the result.

Owns: calling the template, and the marks by which contents are found again. Does not know which of
them merge, or tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge_mlx.errors import PromptError, first_line
from kmerge_mlx.prompts.segments import Run
from kmerge_mlx.prompts.tags import Span

# Marks the borders of spans in what a template is given. Text that holds it gets another.
_MARKS = "\ue000\ue001\ue002\ue003\uf8ff"


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

    def around(self, content: Any) -> list[dict[str, Any]]:
        """The conversation of one user message."""
        before = [] if self.system_prompt is None else [_message("system", self.system_prompt)]
        after = []
        if self.prefill_response is not None:
            after = [_message("assistant", self.prefill_response)]
        return [*before, _message("user", content), *after]

    def render(self, tokenizer: Any, text: str) -> str:
        """The full prompt text for one user message.

        Raises:
            PromptError: The template refuses the messages or its options.
        """
        return render_messages(tokenizer, self.around(text), self.options, self.prefilled)

    @property
    def prefilled(self) -> bool:
        """Whether the conversation ends with the beginning of an answer."""
        return self.prefill_response is not None


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def render_messages(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    prefilled: bool,
) -> str:
    """A conversation as text.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        messages: As the template takes them.
        options: Further arguments of ``apply_chat_template``.
        prefilled: Whether the last message is the beginning of the answer.

    Raises:
        PromptError: The template refuses the messages or its options.
    """
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            continue_final_message=prefilled,
            add_generation_prompt=not prefilled,
            **options,
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise PromptError(
            f"the chat template refused ({first_line(error)})",
            "change what it is given, or use --ignore-chat-template",
        ) from error


def rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    prefilled: bool,
) -> tuple[str, list[Run] | None]:
    """A conversation whose contents are spans (or texts) as text, and where the spans are.

    The template is given the contents with marks at the borders, and without: what differs but for
    the marks was rewritten, and the runs are None then. What it leaves out has no run.
    """

    def texts(mark: str) -> list[dict[str, Any]]:
        numbers = iter(range(10**9))
        return [
            dict(message) | {"content": _marked(message["content"], mark, numbers)}
            if isinstance(message.get("content"), list)
            else dict(message)
            for message in messages
        ]

    plain = render_messages(tokenizer, texts(""), options, prefilled)
    spans = [s for m in messages if isinstance(m.get("content"), list) for s in m["content"]]
    if all(span.merge is None for span in spans):
        return plain, []
    mark = next((c for c in _MARKS if c not in plain), None)
    if mark is None:
        return plain, None
    marked = render_messages(tokenizer, texts(mark), options, prefilled)
    pieces = re.split(f"{mark}([^{mark}]*){mark}", marked)
    if "".join(pieces[::2]) != plain:
        return plain, None
    begun: dict[str, int] = {}
    runs, place = [], 0
    merges = [span.merge for span in spans if span.merge is not None]
    for text, name in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        place += len(text)
        if name.startswith("/") and name[1:] in begun:
            runs.append((begun.pop(name[1:]), place, merges[int(name[1:])]))
        elif name:
            begun[name] = place
    return plain, sorted(run for run in runs if run[0] < run[1])


def _marked(spans: Sequence[Span], mark: str, numbers: Iterator[int]) -> str:
    """A content with a mark at each border of what something is said of.

    Many templates trim a message: outer white space stays outside the marks.
    """
    text = "".join(span.text for span in spans)
    if not mark:
        return text
    first = len(text) - len(text.lstrip())
    last = max(first, len(text.rstrip()))
    pieces, end, written = [], 0, 0
    for span in spans:
        start, end = end, end + len(span.text)
        if span.merge is None:
            continue
        number = next(numbers)
        low, high = (min(max(place, first), last) for place in (start, end))
        pieces += [text[written:low], f"{mark}{number}{mark}", text[low:high]]
        pieces.append(f"{mark}/{number}{mark}")
        written = high
    return "".join([*pieces, text[written:]])
