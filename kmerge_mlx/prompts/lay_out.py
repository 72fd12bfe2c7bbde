"""Lays out prompts and conversations: which token ids, and which of them merge.

The ids are always those of the whole text, exactly as mlx-lm makes them.

Source: mlx_lm.generate for templates and special tokens; arXiv 2604.15153 for "all of it merges".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import AdapterError, PromptError, findings, first_line, short
from kmerge_mlx.prompts.segments import Segment, segments_of, wants_special_tokens
from kmerge_mlx.prompts.tags import Span, parse, parsed, text_of

ALL, CONTEXTS = "all", "contexts"
MERGES = (ALL, CONTEXTS)
"""What of a conversation merges where nothing is specified: see :class:`Layout`."""


@dataclass(frozen=True)
class Layout:
    """What merges where neither tags nor a message specify it; stored in ``merge_config.json``.

    Args:
        merges: ``contexts``: long texts of a conversation, but not its template, its system
            messages and its last question; ``all``: everything, the template too, as in the paper.
        threshold: Fewest tokens of a text that merges, for ``contexts``.
        chat_template: Whether the tokenizer's template is applied, where it has one.

    Raises:
        AdapterError: Every setting that is not valid, listed.
    """

    merges: str = CONTEXTS
    threshold: int = 32
    chat_template: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.merges not in MERGES:
            problems.append(f"merges is {short(self.merges)}, expected {' or '.join(MERGES)}")
        if type(self.threshold) is not int or self.threshold < 1:
            problems.append(f"threshold is {short(self.threshold)}, expected a whole number >= 1")
        if not isinstance(self.chat_template, bool):
            problems.append(f"chat_template is {short(self.chat_template)}, expected true or false")
        if problems:
            raise AdapterError(findings("layout", problems))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout | None:
        """Reads the layout of ``merge_config.json``; None where it is empty.

        Earlier releases merged everything, and wrote ``chat_template`` alone (and ``merged``,
        always the prompt).

        Raises:
            AdapterError: An unknown entry, or a value that is not valid.
        """
        if not data:
            return None
        names = {f.name for f in fields(cls)}
        if extra := sorted(set(data) - names - {"merged"}):
            raise AdapterError(
                f"merge_config.json: layout has {', '.join(extra)}, which this release "
                "does not know: update kmerge-mlx"
            )
        known = {name: value for name, value in data.items() if name in names}
        return cls(**({"merges": ALL} | known))


DEFAULT_LAYOUT = Layout()
"""Where an adapter does not record how it was trained."""


def chosen(
    stored: Layout | None,
    merges: str | None = None,
    threshold: int | None = None,
    chat_template: bool | None = None,
) -> Layout:
    """The layout to use: what is asked for, else ``stored``, as the adapter was trained."""
    asked = {"merges": merges, "threshold": threshold, "chat_template": chat_template}
    asked = {name: value for name, value in asked.items() if value is not None}
    return replace(stored or DEFAULT_LAYOUT, **asked)


_RAW_ROLES = ("system", "developer")
_WRITERS = ("system", "developer", "user")
"""Roles whose texts may hold tags. In what a model or a tool wrote, a tag is text."""

_MARK = "\ue000\uf8ff"
"""Around a number, the border of a span in what a template is given."""


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
        return self._rendered(tokenizer, self.messages(text))

    @property
    def prefilled(self) -> bool:
        """Whether the conversation ends with the beginning of an answer."""
        return self.prefill_response is not None

    def _rendered(self, tokenizer: Any, messages: Iterable[Mapping[str, Any]]) -> str:
        start = {"add_generation_prompt": not self.prefilled}
        start |= {"continue_final_message": self.prefilled, "tokenize": False}
        try:
            return tokenizer.apply_chat_template(list(messages), **start, **self.options)
        except Exception as error:  # a template is a program: it raises what it likes
            raise PromptError(
                f"the chat template refused ({first_line(error)})",
                "change what it is given, or leave it out (`ignore_chat_template`)",
            ) from error


def without_tags(text: str) -> str:
    """A text with its tags taken out."""
    return text_of(parse(text))


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: texts without tags, and without ``merge``."""
    return [_given(m, text_of(_spans(m, f"messages[{i}]"))) for i, m in enumerate(messages)]


def lay_out(
    tokenizer: Any,
    context: str | Sequence[Span] | None,
    prompt: str | Sequence[Span] | None,
    chat: ChatTemplate | None = None,
    layout: Layout = DEFAULT_LAYOUT,
) -> list[Segment]:
    """Splits a prompt into merged and raw segments: the context merges, the prompt does not.

    With a prompt, only the tokens that lie wholly inside the context merge. A context alone merges
    whole; a chat template around it merges with it if the layout says so. Tags decide first.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        context: Text to merge, its spans if it was parsed already, or None.
        prompt: Text to read raw, after the context, or its spans, or None.
        chat: Chat template to apply, or None for the bare text.
        layout: What else merges.

    Returns:
        Segments whose ids, laid end to end, are the ids of the whole text.

    Raises:
        PromptError: Neither context nor prompt, tags that do not pair, or a chat template that
            rewrites the text.
    """
    before = parsed(context, "the context" if prompt else "the prompt")
    after = parsed(prompt, "the prompt")
    if not before and not after:
        raise PromptError("the prompt is empty: there is nothing to read")
    outside = bool(before) and not after and (chat is None or layout.merges == ALL)
    spans = before if outside else _filled(before, True)
    spans += [Span(CONTEXT_SEPARATOR)] * bool(before and after) + _filled(after, False)
    if not outside and not any(span.merge for span in spans):
        spans = [Span(text_of(spans))]  # all of it is raw, so no border needs to be found
    if chat is None:
        return _lay_out_bare(tokenizer, spans, outside)
    return _lay_out_rendered(tokenizer, chat.messages(spans), chat, outside, strict=True)


def lay_out_text(tokenizer: Any, text: str, layout: Layout = DEFAULT_LAYOUT) -> list[Segment]:
    """Splits a text as a conversation of one user message, without a chat template."""
    spans = _by_layout(tokenizer, parse(text), "user", True, layout)
    return _lay_out_bare(tokenizer, spans, layout.merges == ALL)


def lay_out_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    layout: Layout = DEFAULT_LAYOUT,
    options: Mapping[str, Any] | None = None,
    prefilled: bool = False,
) -> list[Segment]:
    """Splits a conversation into merged and raw segments.

    A message's ``merge`` (true or false), or that of a part of its content, decides for all of it,
    and tags in it are text. Otherwise tags decide, in system, developer and user messages; in those
    of a model or a tool they are text. Where neither specifies it and the layout merges contexts:
    the template, system messages and the question (the last paragraph of the last user message)
    stay raw, and every other text of at least ``layout.threshold`` tokens merges.

    Without a chat template, because there is none or the layout leaves it out, the contents stand
    one after the other as paragraphs: what ``generate`` makes of a file and a prompt.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        messages: With ``role`` and ``content`` (a text, or a list of text parts).
        layout: What merges where nothing is specified.
        options: Further arguments of ``apply_chat_template`` (``tools``, for one).
        prefilled: Whether the last message is the beginning of the answer.

    Returns:
        Segments whose ids, laid end to end, are those of the rendered conversation.

    Raises:
        PromptError: A message of another form, tags that do not pair, a template that refuses, or
            one that rewrites a text that specifies what merges; template options without a
            template.
    """
    options = options or {}
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    specified, contents = False, []
    for i, message in enumerate(messages):
        spans = _spans(message, f"messages[{i}]")
        specified |= any(span.merge is not None for span in spans)
        last = [i] == users[-1:]
        contents.append(_by_layout(tokenizer, spans, message.get("role"), last, layout))
    outside = layout.merges == ALL
    if not (layout.chat_template and tokenizer.has_chat_template):
        if named := ", ".join(name for name, value in options.items() if value):
            raise PromptError(f"{named}: needs a chat template, and none is applied")
        paragraphs: list[Span] = []
        for spans in filter(None, contents):
            paragraphs += [Span(CONTEXT_SEPARATOR), *spans] if paragraphs else spans
        return _lay_out_bare(tokenizer, paragraphs, outside)
    given = [_given(message, spans) for message, spans in zip(messages, contents, strict=True)]
    chat = ChatTemplate(prefill_response="" if prefilled else None, options=options)
    return _lay_out_rendered(tokenizer, given, chat, outside, specified)


def _lay_out_bare(tokenizer: Any, spans: Sequence[Span], outside: bool) -> list[Segment]:
    """Segments of spans without a chat template."""
    return segments_of(tokenizer, spans, outside, wants_special_tokens(tokenizer, text_of(spans)))


def _filled(spans: Iterable[Span], merge: bool) -> list[Span]:
    """Spans, with a default for those that tags do not decide."""
    return [replace(span, merge=merge) if span.merge is None else span for span in spans]


def _given(message: Mapping[str, Any], content: Any) -> dict[str, Any]:
    """A message for the template: with another content if it has one, and without ``merge``."""
    kept = {name: value for name, value in message.items() if name != "merge"}
    return kept if message.get("content") is None else kept | {"content": content}


def _spans(message: Mapping[str, Any], name: str) -> list[Span]:
    """A message's content, cut as its ``merge``, its parts and its tags say."""
    content, whole = message.get("content"), message.get("merge")
    if content is None:
        return []
    parts = [{"text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise PromptError(f"{name}: content is neither text nor a list of parts")
    spans: list[Span] = []
    for part in [{"text": ""}, *parts]:  # a message's own merge is checked without parts, too
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise PromptError(f"{name}: expected text parts, {{type: text, text: ...}}")
        merge = part.get("merge", whole)
        if merge is not None and not isinstance(merge, bool):
            raise PromptError(f"{name}: merge is {short(merge)}, expected true or false")
        if merge is None and message.get("role") in _WRITERS:
            spans += parse(text, name)
        elif text:
            spans.append(Span(text, merge))
    return spans


def _by_layout(
    tokenizer: Any, spans: list[Span], role: str | None, last_user: bool, layout: Layout
) -> list[Span]:
    """The spans of a message; where none specifies it, what a layout of contexts merges."""
    if layout.merges == ALL or any(span.merge is not None for span in spans):
        return spans
    text = text_of(spans)
    cut = 0 if role in _RAW_ROLES else _last_paragraph(text) if last_user else len(text)
    if len(tokenizer.encode(text[:cut], add_special_tokens=False)) < layout.threshold:
        cut = 0
    return [span for span in (Span(text[:cut], True), Span(text[cut:])) if span.text]


def _last_paragraph(text: str) -> int:
    """Where the last paragraph of a text begins: after its last blank line, or at 0."""
    end = len(text.rstrip())
    while (line := text.rfind("\n", 0, end)) >= 0:
        if not text[line:end].strip():
            return len(text) - len(text[end:].lstrip())
        end = line
    return 0


def _lay_out_rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    chat: ChatTemplate,
    outside: bool,
    strict: bool,
) -> list[Segment]:
    """Segments of a rendered conversation, whose contents are spans (or texts).

    The template gets the contents without marks at the borders of spans, and with. If the results
    differ in more than the marks, the template rewrites its text: an error if ``strict``; otherwise
    the text is read as the template is.
    """

    def rendered(mark: str) -> str:
        numbers = count()
        marked = [_given(m, _marked(m.get("content"), mark, numbers)) for m in messages]
        return chat._rendered(tokenizer, marked)

    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    merges = [span.merge for spans in contents for span in spans if span.merge is not None]
    spans = [Span(rendered(""))]
    if merges:
        pieces = re.split(rf"{_MARK}(\d+){_MARK}", rendered(_MARK))
        texts, marks = pieces[::2], [int(number) for number in pieces[1::2]]
        if "".join(texts) == text_of(spans):
            around = zip([-1, *marks], texts, [*marks, -1], strict=True)
            spans = [
                Span(text, merges[mark // 2] if mark % 2 == 0 and after == mark + 1 else None)
                for mark, text, after in around
            ]
        elif strict:
            raise PromptError(
                "the chat template rewrites the text, so it is not known which of its tokens merge",
                "leave it out (`ignore_chat_template`), or the tags and `merge`",
            )
    return segments_of(tokenizer, spans, outside)


def _marked(content: Any, mark: str, numbers: Iterator[int]) -> Any:
    """A content with a numbered mark at each border of a span that specifies what merges.

    Many templates trim a message, so outer white space stays outside the marks.
    """
    if not isinstance(content, list):
        return content
    text = text_of(content)
    if not mark:
        return text
    first = len(text) - len(text.lstrip())
    last = max(first, len(text.rstrip()))
    pieces, end, written = [], 0, 0
    for span in content:
        start, end = end, end + len(span.text)
        if span.merge is not None:
            low, high = (min(max(place, first), last) for place in (start, end))
            for upto in (low, high):
                pieces += [text[written:upto], f"{mark}{next(numbers)}{mark}"]
                written = upto
    return "".join([*pieces, text[written:]])
