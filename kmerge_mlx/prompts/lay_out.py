"""Lays out prompts and conversations: which token ids, and which of them merge.

The ids are those of the whole text, exactly as mlx-lm makes them; LCLM's differ (docs/lclm.md).

Source: mlx_lm.generate for templates and special tokens; arXiv 2604.15153 for "all of it merges".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import PromptError
from kmerge_mlx.prompts.chat_template import ChatTemplate, rendered, renderer_of, with_texts
from kmerge_mlx.prompts.keep import check_keep, cut, without_lone
from kmerge_mlx.prompts.messages import normalised
from kmerge_mlx.prompts.policy import ALL, DEFAULT_LAYOUT, Layout, by_layout
from kmerge_mlx.prompts.segments import Segment, segments_of, wants_special_tokens
from kmerge_mlx.prompts.tags import Span, parse, parsed, text_of

Note = Callable[[str, str], None]
"""Told what of a prompt does not merge, and why."""

_WRITERS = ("system", "user")
"""Roles whose texts may hold tags. In what a model or a tool wrote, a tag is text."""


def without_tags(text: str) -> str:
    """A text with its tags taken out."""
    return text_of(parse(text))


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: texts without tags, and without ``merge``."""
    return with_texts(_parsed_messages(messages))


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

    With LCLM, texts that merge side by side become one segment, its encoder's tokenizer makes their
    ids, and a token stands before and after it.

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
        return lay_out_spans(tokenizer, spans, outside, layout)
    messages = chat.messages(cut(spans, outside, layout.keep))
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = [Span(message["content"])]
    whole = with_texts(messages)
    render = renderer_of(tokenizer, whole, chat.options, chat.prefilled, layout.date)
    return _segments(tokenizer, rendered(messages, render, strict=True), outside, layout)


def lay_out_text(
    tokenizer: Any, text: str, layout: Layout = DEFAULT_LAYOUT, note: Note | None = None
) -> list[Segment]:
    """Splits a text as a conversation of one user message, without a chat template."""
    spans, why = by_layout(tokenizer, parse(text), "user", True, layout)
    if why and note is not None:
        note("the prompt", why)
    return lay_out_spans(tokenizer, spans, layout.merges == ALL, layout)


def lay_out_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    layout: Layout = DEFAULT_LAYOUT,
    options: Mapping[str, Any] | None = None,
    prefilled: bool = False,
    note: Note | None = None,
    merge: bool | None = None,
) -> list[Segment]:
    """Splits a conversation into merged and raw segments.

    A message's ``merge`` (true or false), or that of a part of its content, decides for all of it,
    and tags in it are text. Otherwise tags decide, in system, developer and user messages; in those
    of a model or a tool they are text. Where neither specifies it, the layout does.

    Without a chat template, because there is none or the layout leaves it out, the contents stand
    one after the other as paragraphs: what ``generate`` makes of a file and a prompt.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        messages: With ``role`` and ``content`` (a text, or a list of text parts).
        layout: What merges where nothing is specified.
        options: Further arguments of ``apply_chat_template`` (``tools``, for one).
        prefilled: Whether the last message is the beginning of the answer.
        note: Called with each long message of which nothing merges, and why; or None.
        merge: Whether all of it merges (but what the layout keeps), or nothing, whoever says else.

    Returns:
        Segments whose ids, laid end to end, are those of the rendered conversation.

    Raises:
        PromptError: A message of another form, tags that do not pair, a template that refuses or
            leaves a message or the tools out, or one that rewrites a text that specifies what
            merges; template options without a template.
    """
    options, given = options or {}, _parsed_messages(messages)
    if merge is not None:
        layout, given = replace(layout, merges=ALL), _unspecified(given)
    users = [i for i, message in enumerate(given) if message["role"] == "user"]
    specified = any(span.merge is not None for message in given for span in message["content"])
    for i, message in enumerate(given):
        role, last = message["role"], [i] == users[-1:]
        message["content"], why = by_layout(tokenizer, message["content"], role, last, layout)
        if why and note is not None:
            note(f"messages[{i}] ({role})", why)
    outside = layout.merges == ALL if merge is None else merge
    if not (layout.chat_template and tokenizer.has_chat_template):
        if named := [name for name, value in options.items() if value]:
            said = f"{', '.join(named)}: needs a chat template, and none is applied"
            raise PromptError(said, field=named[0])
        paragraphs: list[Span] = []
        for spans in filter(None, (message["content"] for message in given)):
            paragraphs += [Span(CONTEXT_SEPARATOR), *spans] if paragraphs else spans
        return lay_out_spans(tokenizer, paragraphs, outside, layout)
    for message in given:
        message["content"] = cut(message["content"], outside, layout.keep)
    render = renderer_of(tokenizer, with_texts(given), options, prefilled, layout.date)
    strict = specified or (outside and bool(layout.keep))
    return _segments(tokenizer, rendered(given, render, strict), outside, layout)


def lay_out_spans(
    tokenizer: Any, spans: Sequence[Span], outside: bool, layout: Layout = DEFAULT_LAYOUT
) -> list[Segment]:
    """Splits a text without a chat template; ``outside``: spans that do not specify it merge."""
    special = wants_special_tokens(tokenizer, text_of(spans))
    return _segments(tokenizer, cut(spans, outside, layout.keep), outside, layout, special)


def _segments(
    tokenizer: Any, spans: Sequence[Span], outside: bool, layout: Layout, special: bool = False
) -> list[Segment]:
    check_keep(tokenizer, layout.keep)
    segments = segments_of(tokenizer, spans, outside, special)
    return without_lone(segments) if layout.keep else segments


def _filled(spans: Iterable[Span], merge: bool) -> list[Span]:
    """Spans, with a default for those that tags do not decide."""
    return [replace(span, merge=merge) if span.merge is None else span for span in spans]


def _unspecified(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are spans, with one that specifies nothing in their place."""
    texts = [(message, text_of(message["content"])) for message in messages]
    return [{**message, "content": [Span(text)] * bool(text)} for message, text in texts]


def _parsed_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Normalised messages whose contents are spans, as ``merge``, parts and tags cut them."""
    found = []
    for i, message in enumerate(normalised(messages)):
        whole, content = message.pop("merge", None), message["content"]
        spans: list[Span] = []
        for part in [{"text": content}] if isinstance(content, str) else content:
            merge = part.get("merge", whole)
            if merge is None and message["role"] in _WRITERS:
                spans += parse(part["text"], f"messages[{i}]")
            elif part["text"]:
                spans.append(Span(part["text"], merge))
        found.append(message | {"content": spans})
    return found
