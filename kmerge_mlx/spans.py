"""``<merge>`` and ``<raw>`` in a text: which of its characters merge, and which stay raw.

Owns the markup alone: finding tags, checking that they pair, taking them out. Does not know
tokens, templates or models.

A tag is ``<merge>``, ``</merge>``, ``<raw>`` or ``</raw>``, exactly so. Tags nest, and the inner
one decides. A backslash before a tag makes it text: ``\\<raw>`` is ``<raw>``, and ``\\\\<raw>`` is
a backslash and a tag; every other backslash is an ordinary character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kmerge_mlx.errors import PromptError

_TAG = re.compile(r"(\\*)(<(/?)(merge|raw)>)")


@dataclass(frozen=True)
class Span:
    """A run of characters that is treated alike.

    Args:
        text: The characters.
        merge: Whether they merge; None: nothing was said.
    """

    text: str
    merge: bool | None = None


def parse(text: str, name: str = "the prompt") -> list[Span]:
    """Cuts a text at its tags and takes them out.

    Args:
        text: With or without tags.
        name: What to call it in an error.

    Returns:
        Spans in order, none empty, neighbours told apart by a border even where both are treated
        alike: ``<merge>a</merge><merge>b</merge>`` is two spans, and no block straddles them.

    Raises:
        PromptError: A tag that closes nothing, the wrong one, or is never closed.
    """
    spans: list[Span] = []
    opened: list[tuple[str, int]] = []
    pending, start = "", 0

    def close_span() -> None:
        nonlocal pending
        if pending:
            spans.append(Span(pending, opened[-1][0] == "merge" if opened else None))
        pending = ""

    for found in _TAG.finditer(text):
        backslashes, tag, closing, kind = found.groups()
        pending += text[start : found.start()] + "\\" * (len(backslashes) // 2)
        start = found.end()
        if len(backslashes) % 2:
            pending += tag
            continue
        close_span()
        if not closing:
            opened.append((kind, found.start(2)))
        elif opened and opened[-1][0] == kind:
            opened.pop()
        else:
            what = f"closes <{opened[-1][0]}>" if opened else "closes nothing"
            raise _malformed(text, found.start(2), tag, what, name)
    pending += text[start:]
    if opened:
        kind, place = opened[-1]
        raise _malformed(text, place, f"<{kind}>", "is never closed", name)
    close_span()
    return spans


def escape(text: str) -> str:
    """A text that :func:`parse` gives back as it is, in one span."""
    return _TAG.sub(lambda found: f"{found[1] * 2}\\{found[2]}", text)


def _malformed(text: str, place: int, tag: str, what: str, name: str) -> PromptError:
    line = text.count("\n", 0, place) + 1
    column = place - (text.rfind("\n", 0, place) + 1) + 1
    return PromptError(
        f"{name}: {tag} at line {line}, column {column} {what}; write \\{tag} for the characters "
        "themselves"
    )
