"""Decides what of a prompt merges where nothing specifies it, as an adapter was trained.

Source: arXiv 2604.15153 (all of it merges). The shapes that ``documents`` knows are those of
clients and of their prompt templates: tests/prompts/test_shapes.py lists them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from kmerge_mlx.errors import AdapterError, findings, short
from kmerge_mlx.prompts.keep import KINDS, kinds_of
from kmerge_mlx.prompts.tags import Span, text_of

ALL, CONTEXTS, DOCUMENTS = "all", "contexts", "documents"
MERGES = (DOCUMENTS, CONTEXTS, ALL)
"""What of a conversation merges where nothing is specified: see :class:`Layout`."""

QUESTION, SYSTEM, NOTED = 3, 16, 4
"""In thresholds: most tokens of a question at either end of a text, fewest of a system message that
merges, and fewest of a text that is worth a note where it does not merge."""

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Layout:
    """What merges where neither tags nor a message specify it; stored in ``merge_config.json``.

    Args:
        merges: ``documents``: long texts, but not the template, a question before or after a text,
            or system messages unless they are very long; ``contexts``, as adapters up to 0.1.0 were
            trained: long texts, but not the template, system messages, or the last paragraph of the
            last user message; ``all``: everything, the template too, as in the paper.
        threshold: Fewest tokens of a text that merges, unless everything does.
        chat_template: Whether the tokenizer's template is applied, where it has one.
        date: What a template that writes today's date takes for now, in ISO's format, or None: the
            clock. Kept with what is stored and gone on with, but not with an adapter.
        keep: Kinds of exact strings that stay raw inside of what merges, of ``keep.KINDS``.

    Raises:
        AdapterError: Every setting that is not valid, listed.
    """

    merges: str = DOCUMENTS
    threshold: int = 32
    chat_template: bool = True
    date: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.merges not in MERGES:
            problems.append(f"merges is {short(self.merges)}, expected one of {', '.join(MERGES)}")
        if type(self.threshold) is not int or self.threshold < 1:
            problems.append(f"threshold is {short(self.threshold)}, expected a whole number >= 1")
        if not isinstance(self.chat_template, bool):
            problems.append(f"chat_template is {short(self.chat_template)}, expected true or false")
        if self.date is not None and not is_date(self.date):
            problems.append(f"date is {short(self.date)}, expected a date such as 2026-11-28")
        if not isinstance(self.keep, list | tuple) or not {*map(str, self.keep)} <= KINDS.keys():
            problems.append(f"keep is {short(self.keep)}, expected some of {', '.join(KINDS)}")
        if problems:
            raise AdapterError(findings("layout", problems))
        # In one order, so that equal layouts are equal.
        object.__setattr__(self, "keep", tuple(kind for kind in KINDS if kind in self.keep))

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

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads; date and ``keep`` only where there are any."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


DEFAULT_LAYOUT = Layout()
"""What ``train`` begins with, and a conversation is laid out by where no adapter says more."""


def is_date(value: object) -> bool:
    """Whether a value is a date, or date and time, in ISO's format."""
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def chosen(
    stored: Layout | None,
    merges: str | None = None,
    threshold: int | None = None,
    chat_template: bool | None = None,
    keep: Sequence[str] | None = None,
) -> Layout:
    """The layout to use: what is asked for, else ``stored``, as the adapter was trained.

    An adapter that does not record its layout goes on with ``contexts``, as up to 0.1.0.
    """
    asked = {"merges": merges, "threshold": threshold, "chat_template": chat_template}
    asked["keep"] = None if keep is None else kinds_of(keep)
    asked = {name: value for name, value in asked.items() if value is not None}
    return replace(stored or Layout(CONTEXTS), date=None, **asked)


def by_layout(
    tokenizer: Any, spans: list[Span], role: str, last_user: bool, layout: Layout
) -> tuple[list[Span], str]:
    """The spans of a message; where none specifies it, cut into what merges and what does not.

    Args:
        tokenizer: Counts tokens.
        spans: Of one message, a span for each part of its content.
        role: Who wrote it.
        last_user: Whether it is the last message of the user.
        layout: What merges.

    Returns:
        The spans, and why none of a long text merges, or nothing.
    """
    if layout.merges == ALL or any(span.merge is not None for span in spans):
        return spans, ""
    text, least = text_of(spans), layout.threshold
    if layout.merges == CONTEXTS:
        start, end, why = *_context(text, role, last_user), "it is a question or a system message"
    elif role in ("assistant", "tool"):
        start, end, why = 0, len(text), ""
    elif role == "system" and not has_tokens(tokenizer, text, SYSTEM * least):
        start, end, why = 0, 0, f"system messages merge from {SYSTEM * least:,} tokens on"
    else:
        start, end = _document(tokenizer, spans, QUESTION * least)
        why = "no line ends between a document and a question"
    if has_tokens(tokenizer, text[start:end], least):
        cut = (Span(text[:start]), Span(text[start:end], True), Span(text[end:]))
        return [span for span in cut if span.text], ""
    return [Span(text)] * bool(text), why * has_tokens(tokenizer, text, NOTED * least)


def has_tokens(tokenizer: Any, text: str, count: int) -> bool:
    """Whether a text has at least so many tokens; of a long one only the beginning is read."""
    start = text[: 16 * count]
    if len(tokenizer.encode(start, add_special_tokens=False)) >= 2 * count:
        return True  # as many as the cut may have split are left over
    return len(tokenizer.encode(text, add_special_tokens=False)) >= count


def _context(text: str, role: str, last_user: bool) -> tuple[int, int]:
    """What merges of a message by ``contexts``: all, or what stands before the last paragraph."""
    return 0, 0 if role == "system" else _last_paragraph(text) if last_user else len(text)


def _last_paragraph(text: str) -> int:
    """Where the last paragraph of a text begins: after its last blank line, or at 0."""
    end = len(text.rstrip())
    while (line := text.rfind("\n", 0, end)) >= 0:
        if not text[line:end].strip():
            return len(text) - len(text[end:].lstrip())
        end = line
    return 0


def _document(tokenizer: Any, spans: Sequence[Span], most: int) -> tuple[int, int]:
    """Where the document of a message begins and ends: between what may be the question.

    The question is the lines at the end, and those of the first paragraph, that have up to ``most``
    tokens together. If neither end has such a line, the last paragraph is the question, else the
    last line. A new part of the content begins a paragraph.
    """
    text = text_of(spans)
    lines = list(_lines(spans))  # (start, end, number of the paragraph)
    if len(lines) < 2:
        return 0, 0
    first, last = 0, len(text)
    for (_, _, paragraph), (after, _, _) in pairwise(lines):
        if paragraph != lines[0][2] or has_tokens(tokenizer, text[:after], most + 1):
            break
        first = after
    for start, _, _ in reversed(lines):
        if has_tokens(tokenizer, text[start:], most + 1):
            break
        last = start
    if (first, last) == (0, len(text)):
        paragraphs = [start for start, _, paragraph in lines if paragraph == lines[-1][2]]
        last = paragraphs[0] or lines[-1][0]
    return first, max(first, last)


def _lines(spans: Iterable[Span]) -> Iterable[tuple[int, int, int]]:
    """Start, end and paragraph of each line that is not blank."""
    offset = paragraph = 0
    for span in spans:
        paragraph += 1
        for line in _LINE.finditer(span.text):
            if line[0].strip():
                yield offset + line.start(), offset + line.end(), paragraph
            else:
                paragraph += 1
        offset += len(span.text)
