"""What of a prompt is merged and what stays raw.

Owns: text and conversations to token ids with mlx-lm's rules (special tokens, chat template), what
merges where nothing is said, and the split of the ids into segments. The ids are always those of
the whole text, exactly as mlx-lm makes them; a segment only says which of them to merge. Does not
know models, blocks or how tags are written (``spans.py``).

Source: mlx_lm.generate for templates and special tokens; arXiv 2604.15153 for "all of it merges".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import PromptError, short
from kmerge_mlx.prompts.chat_template import ChatTemplate, rendered
from kmerge_mlx.prompts.policy import ALL, DEFAULT_LAYOUT, Layout
from kmerge_mlx.prompts.segments import Run, Segment, segments_of, wants_special_tokens
from kmerge_mlx.prompts.tags import Span, parse

_RAW_ROLES = ("system", "developer")
_WRITERS = ("system", "developer", "user")
"""Who may say what merges by tags: what a model or a tool wrote is text."""


def decode_text(data: bytes, name: str) -> str:
    """Bytes of a prompt file to text, unchanged but for a leading byte-order mark.

    Args:
        data: The file's content.
        name: What to call it in an error.

    Raises:
        PromptError: Not UTF-8 (says which byte), or empty.
    """
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "save the file as UTF-8"
        ) from None
    if not text:
        raise PromptError(f"{name} is empty: put the text to compress in it")
    return text


def without_tags(text: str) -> str:
    """A text as it is read: its tags taken out."""
    return "".join(span.text for span in parse(text))


def plain_messages(
    messages: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Messages as a chat template is given them: texts without tags, and no ``merge``.

    Args:
        messages: As for :func:`lay_out_chat`.

    Raises:
        PromptError: A message that is none, or tags that do not pair.
    """
    plain = []
    for i, message in enumerate(messages):
        kept = {name: value for name, value in message.items() if name != "merge"}
        if message.get("content") is not None:
            spans = _spans(message, f"messages[{i}]")
            kept["content"] = "".join(span.text for span in spans)
        plain.append(kept)
    return plain


def lay_out(
    tokenizer: Any,
    context: str | None,
    prompt: str | None,
    chat: ChatTemplate | None = None,
    layout: Layout = DEFAULT_LAYOUT,
) -> list[Segment]:
    """Splits a prompt into merged and raw segments: the context merges, the prompt does not.

    With a prompt, only the tokens that lie wholly inside the context merge. A context alone merges
    whole; a chat template around it merges with it if the layout says so. Tags decide first.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        context: Text to merge, or None.
        prompt: Text to read raw, after the context, or None.
        chat: Chat template to apply, or None for the bare text.
        layout: What else merges.

    Returns:
        Segments whose ids, laid end to end, are the ids of the whole text.

    Raises:
        PromptError: Neither context nor prompt, tags that do not pair, or a chat template that
            rewrites the text.
    """
    before = parse(context, "the context" if prompt else "the prompt") if context else []
    after = parse(prompt, "the prompt") if prompt else []
    if not before and not after:
        raise PromptError("the prompt is empty: there is nothing to read")
    outside = bool(before) and not after and (chat is None or layout.merges == ALL)
    spans = before if outside else _said(before, True)
    if before and after:
        spans = [*spans, Span(CONTEXT_SEPARATOR)]
    spans = [*spans, *_said(after, False)]
    if not before and not any(span.merge for span in after):
        spans = [Span("".join(span.text for span in spans))]  # all of it is raw, as around it
    if chat is not None:
        messages = chat.around(spans)
        text, runs = rendered(tokenizer, messages, chat.options, chat.prefilled)
        if runs is None:
            raise PromptError(
                "the chat template rewrites the text, so its tokens cannot be told from the "
                "template's: use --ignore-chat-template"
            )
        return segments_of(tokenizer, text, False, runs, outside)
    text = "".join(span.text for span in spans)
    special = wants_special_tokens(tokenizer, text)
    return segments_of(tokenizer, text, special, list(_runs(spans)), outside)


def lay_out_text(tokenizer: Any, text: str, layout: Layout = DEFAULT_LAYOUT) -> list[Segment]:
    """Splits a text of which nobody says what is context and what is question.

    Tags decide. Where there are none and the layout merges contexts, the last paragraph stays raw,
    and what is before it merges if it has at least ``layout.threshold`` tokens.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        text: The whole prompt; no chat template is applied.
        layout: What merges where nothing is said.

    Returns:
        Segments whose ids, laid end to end, are the ids of the whole text.

    Raises:
        PromptError: Tags that do not pair.
    """
    spans = parse(text)
    if layout.merges != ALL and all(span.merge is None for span in spans):
        whole = "".join(span.text for span in spans)
        spans = _by_default(tokenizer, {"role": "user"}, whole, True, layout)
    text = "".join(span.text for span in spans)
    special = wants_special_tokens(tokenizer, text)
    return segments_of(tokenizer, text, special, list(_runs(spans)), layout.merges == ALL)


def lay_out_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    layout: Layout = DEFAULT_LAYOUT,
    options: Mapping[str, Any] | None = None,
    prefilled: bool = False,
) -> list[Segment]:
    """Splits a conversation into merged and raw segments.

    A message's ``merge`` (true or false), or that of a part of its content, decides for all of it,
    tags and all; else tags do, in what a person writes (system, developer and user messages; in
    those of a model or a tool they are text). Where neither says anything and the layout merges
    contexts: the template, system messages and the question (the last paragraph of the last user
    message) stay raw, and every other text of at least ``layout.threshold`` tokens merges.

    Without a chat template, because there is none or the layout leaves it out, the contents stand
    one after the other as paragraphs: what ``generate`` makes of a file and a prompt.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        messages: With ``role`` and ``content`` (a text, or a list of text parts).
        layout: What merges where nothing is said.
        options: Further arguments of ``apply_chat_template`` (``tools``, for one).
        prefilled: Whether the last message is the beginning of the answer.

    Returns:
        Segments whose ids, laid end to end, are those of the rendered conversation.

    Raises:
        PromptError: A message that is none, tags that do not pair, a template that refuses, or one
            that rewrites a text of which something was said; template options without a template.
    """
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    spoken, spans_of = False, []
    for i, message in enumerate(messages):
        said = _spans(message, f"messages[{i}]")
        spoken |= any(span.merge is not None for span in said)
        if layout.merges != ALL and all(span.merge is None for span in said):
            text = "".join(span.text for span in said)
            said = _by_default(tokenizer, message, text, [i] == users[-1:], layout)
        spans_of.append(said)
    if not (layout.chat_template and tokenizer.has_chat_template):
        return _lay_out_paragraphs(tokenizer, spans_of, layout, options)
    given = [
        message if message.get("content") is None else message | {"content": spans}
        for message, spans in zip(plain_messages(messages), spans_of, strict=True)
    ]
    text, runs = rendered(tokenizer, given, options or {}, prefilled)
    if runs is None:
        if spoken:
            raise PromptError(
                "the chat template rewrites the messages, so it cannot be told which tokens are "
                "those that are said to merge or stay raw: leave the tags and `merge` out"
            )
        runs = []  # what cannot be told from the template is read raw, as the template is
    return segments_of(tokenizer, text, False, runs, layout.merges == ALL)


def _lay_out_paragraphs(
    tokenizer: Any,
    spans_of: Iterable[list[Span]],
    layout: Layout,
    options: Mapping[str, Any] | None,
) -> list[Segment]:
    """A conversation without a template: its contents, one after the other."""
    if any((options or {}).values()):
        named = ", ".join(name for name, value in (options or {}).items() if value)
        raise PromptError(f"{named}: needs a chat template, and none is applied")
    spans: list[Span] = []
    for said in filter(None, spans_of):
        spans += [Span(CONTEXT_SEPARATOR), *said] if spans else said
    text = "".join(span.text for span in spans)
    special = wants_special_tokens(tokenizer, text)
    return segments_of(tokenizer, text, special, list(_runs(spans)), layout.merges == ALL)


def _said(spans: Iterable[Span], merge: bool) -> list[Span]:
    """Spans of which nothing was said, said."""
    return [Span(span.text, merge if span.merge is None else span.merge) for span in spans]


def _spans(message: Mapping[str, Any], name: str) -> list[Span]:
    """What a message says of its content."""
    content, whole = message.get("content"), message.get("merge")
    if content is None:
        return []
    parts = [{"text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise PromptError(f"{name}: content is no text and no list of parts")
    tagged = message.get("role") in _WRITERS
    spans: list[Span] = []
    for part in [{"text": "", "merge": whole}, *parts]:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise PromptError(f"{name}: expected text parts, {{type: text, text: ...}}")
        merge = part.get("merge", whole)
        if merge is not None and not isinstance(merge, bool):
            raise PromptError(f"{name}: merge is {short(merge)}, expected true or false")
        plain = [Span(text, merge)] * bool(text)
        spans += parse(text, name) if merge is None and tagged else plain
    return spans


def _by_default(
    tokenizer: Any, message: Mapping[str, Any], text: str, last_user: bool, layout: Layout
) -> list[Span]:
    """What merges of a message that says nothing of it, in a layout that merges contexts."""
    context, question = text, ""
    if message.get("role") in _RAW_ROLES:
        context, question = "", text
    elif last_user:
        cut = _last_paragraph(text)
        context, question = text[:cut], text[cut:]
    if len(tokenizer.encode(context, add_special_tokens=False)) < layout.threshold:
        context, question = "", text
    return [span for span in (Span(context, True), Span(question)) if span.text]


def _last_paragraph(text: str) -> int:
    """Where the last paragraph of a text begins: after its last blank line, or at 0."""
    end = len(text.rstrip())
    while (line := text.rfind("\n", 0, end)) >= 0:
        if not text[line:end].strip():
            return len(text) - len(text[end:].lstrip())
        end = line
    return 0


def _runs(spans: Iterable[Span]) -> Iterator[Run]:
    """Where spans of which something is said lie in their text."""
    end = 0
    for span in spans:
        start, end = end, end + len(span.text)
        if span.merge is not None:
            yield start, end, span.merge
