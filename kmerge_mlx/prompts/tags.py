"""Reads ``<merge>`` and ``<raw>`` tags: which characters of a text merge, and which stay raw.

A tag is ``<merge>``, ``</merge>``, ``<raw>`` or ``</raw>``, exactly so. Tags nest, and the inner
one decides. A backslash before a tag makes it text: ``\\<raw>`` is ``<raw>``, and ``\\\\<raw>`` is
a backslash and a tag; every other backslash is an ordinary character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kmerge_mlx.errors import PromptError

# With all backslashes before it: a match that could begin in the middle of them would take the
# square of their number.
_TAG = re.compile(r"(?<!\\)(\\*)<(/?)(merge|raw)>")


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

    def close_run() -> None:
        if run:
            spans.append(Span(run, opened[-1][0] == "merge" if opened else None))

    def malformed(place: int, tag: str, what: str) -> PromptError:
        line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
        return PromptError(
            f"{name}: {tag} at line {line}, column {column} {what}; write \\{tag} for the "
            "characters themselves"
        )

    for found in _TAG.finditer(text):
        slashes, closing, kind = found.groups()
        place, tag = found.end(1), f"<{closing}{kind}>"
        run += text[end : found.start()] + slashes[: len(slashes) // 2]
        end = found.end()
        if len(slashes) % 2:
            run += tag
            continue
        close_run()
        run = ""
        if not closing:
            opened.append((kind, place))
        elif opened and opened[-1][0] == kind:
            opened.pop()
        else:
            what = f"closes <{opened[-1][0]}>" if opened else "closes nothing"
            raise malformed(place, tag, what)
    if opened:
        kind, place = opened[-1]
        raise malformed(place, f"<{kind}>", "is never closed")
    run += text[end:]
    close_run()
    return spans


def parsed(text: str | Sequence[Span] | None, name: str) -> list[Span]:
    """The spans of a text, which may have been parsed before; none for None."""
    return parse(text, name) if isinstance(text, str) else list(text or ())


def text_of(spans: Iterable[Span]) -> str:
    """The characters of spans, end to end."""
    return "".join(span.text for span in spans)


def escape(text: str) -> str:
    """A text that :func:`parse` gives back as it is, in one span."""
    return _TAG.sub(r"\1\1\\<\2\3>", text)


def cuts_tag(text: str, place: int) -> bool:
    """Whether a place in a text lies inside a tag."""
    return any(found.end(1) < place < found.end() for found in _TAG.finditer(text))
