"""Reads ``<merge>`` and ``<raw>`` tags: which characters of a text merge, and which stay raw.

A tag is ``<merge>``, ``</merge>``, ``<raw>`` or ``</raw>``, exactly so. Tags nest, and the inner
one decides. A backslash before a tag makes it text: ``\\<raw>`` is ``<raw>``, and ``\\\\<raw>`` is
a backslash and a tag; every other backslash is an ordinary character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kmerge_mlx.errors import PromptError

_TAG = re.compile(r"<(/?)(merge|raw)>")


@dataclass(frozen=True)
class Span:
    """A run of characters that is treated alike.

    Args:
        text: The characters.
        merge: Whether they merge; None: not specified.
    """

    text: str
    merge: bool | None = None


def parse(text: str, name: str = "the prompt") -> list[Span]:
    """Cuts a text at its tags and takes them out.

    Args:
        text: With or without tags.
        name: What to call it in an error.

    Returns:
        Spans in order, each with characters. ``<merge>a</merge><merge>b</merge>`` is two spans:
        a block never crosses a tag.

    Raises:
        PromptError: A tag that closes nothing, closes the wrong one, or is never closed.
    """
    spans: list[Span] = []
    opened: list[tuple[str, int]] = []
    run, end = "", 0

    def close_run(rest: str) -> None:
        if run + rest:
            spans.append(Span(run + rest, opened[-1][0] == "merge" if opened else None))

    for found, before, backslashes in _tags(text):
        tag, (closing, kind), end = found[0], found.groups(), found.end()
        before += "\\" * (backslashes // 2)
        if backslashes % 2:
            run += before + tag
            continue
        close_run(before)
        run = ""
        if not closing:
            opened.append((kind, found.start()))
        elif opened and opened[-1][0] == kind:
            opened.pop()
        else:
            what = f"closes <{opened[-1][0]}>" if opened else "closes nothing"
            raise _malformed(text, found.start(), tag, what, name)
    if opened:
        kind, place = opened[-1]
        raise _malformed(text, place, f"<{kind}>", "is never closed", name)
    close_run(text[end:])
    return spans


def parsed(text: str | Sequence[Span] | None, name: str) -> list[Span]:
    """The spans of a text, which may have been parsed before; none for None."""
    return parse(text, name) if isinstance(text, str) else list(text or ())


def text_of(spans: Iterable[Span]) -> str:
    """The characters of spans, end to end."""
    return "".join(span.text for span in spans)


def escape(text: str) -> str:
    """A text that :func:`parse` gives back as it is, in one span."""
    pieces, end = [], 0
    for found, before, backslashes in _tags(text):
        end = found.end()
        pieces += [before, "\\" * (2 * backslashes + 1), found[0]]
    return "".join([*pieces, text[end:]])


def cuts_tag(text: str, place: int) -> bool:
    """Whether a place in a text lies inside a tag."""
    return any(f.start() < place < f.end() for f in _TAG.finditer(text, max(0, place - 16)))


def _tags(text: str) -> Iterator[tuple[re.Match[str], str, int]]:
    """Each tag, the text between the one before and its backslashes, and how many those are."""
    end = 0
    for found in _TAG.finditer(text):
        between = text[end : found.start()]
        before = between.rstrip("\\")
        yield found, before, len(between) - len(before)
        end = found.end()


def _malformed(text: str, place: int, tag: str, what: str, name: str) -> PromptError:
    line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
    return PromptError(
        f"{name}: {tag} at line {line}, column {column} {what}; write \\{tag} for the characters "
        "themselves"
    )
