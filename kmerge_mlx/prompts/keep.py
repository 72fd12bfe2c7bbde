"""Finds exact strings in what merges, so that they stay raw: numbers, code, urls, names and so on.

Whatever the text is, looking for them takes time in proportion to its length: what repeats without
a bound gives nothing back (``++``, ``*+``), and begins only where a word or a line does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kmerge_mlx.errors import PromptError, SettingsError
from kmerge_mlx.prompts.segments import Segment, add, merged_text
from kmerge_mlx.prompts.tags import Span

NONE = "none"
"""In place of kinds: nothing, where an adapter was trained with some."""

_CASED = [c for c in map(chr, (*range(0x590), *range(0x1E00, 0x1F00))) if c.isalpha()]
_L, _U = "".join(_CASED), "".join(filter(str.isupper, _CASED))
"""Letters of the alphabets that have capitals, and their capitals."""

_W = r"A-Za-z\d_"
_URL = r"A-Za-z0-9\-_~/#\[@$&(*+=%"
_ENDS = r".,;:!?)\]'"  # they may stand in an address, but not at its end
_DOMAINS = "com|org|net|edu|gov|io|dev|ai|app|co|info|de|uk|eu|fr|ch|at|nl|it|es|jp|cn|in"
_CAP = rf"(?!I\b)[{_U}]['\u2019]?[{_L}]++(?:['\u2019-][{_L}]++)*+"
_RUN = rf"{_CAP}(?:[ ]{_CAP})"  # with *+ or ++ after it: one word or more, or two or more
_BEGIN = rf"(?<![{_L}\d_])(?<![{_L}]['\u2019-])"


def _compiled(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{each})" for each in alternatives), re.MULTILINE | re.DOTALL)


KINDS: dict[str, re.Pattern[str]] = {
    # A word with a digit in it, what it is joined to without a space, and further groups of digits.
    "numbers": _compiled(
        rf"(?<![{_W}])(?:[-+\u2212±~#$€£¥₹(]{{1,3}}+)?"
        rf"(?:[A-Za-z_]{{1,16}}+-){{0,3}}+[A-Za-z_]*+\d[{_W}]*+"
        rf"(?:[-.,:/'\u2019\u2013\u00d7^*+@]{{1,2}}+[{_W}]++|\)?[ \u00a0\u202f]?\(?\d[{_W}]*+)*+"
        r"(?:[ \u00a0\u202f]?(?:[%‰]|°[CF]?))?[€£¥$₹]?"
    ),
    "code": _compiled(
        r"^[ \t]*+(`{3,}+)[^`\n]*+(?:\n|\Z).*?(?:^[ \t]*+\1`*+[ \t\r]*+$|\Z)",  # or to the end
        r"(?<!`)`(?!`)[^`\n]{1,200}+`(?!`)",
        r"(?<!`)``(?!`)(?:[^`\n]|`(?!`)){1,200}+``(?!`)",
        rf"(?<![{_W}])[A-Za-z_][{_W}]*+(?:(?:\.|::|->)[A-Za-z_][{_W}]++)++(?:\(\))?",
        rf"(?<![{_W}])(?:_*+[A-Za-z\d]++_++[A-Za-z\d]|__[A-Za-z\d])[{_W}]*+(?:\(\))?",
        rf"(?<![{_W}])(?:[a-z]++|[A-Z]++[a-z\d]++)[A-Z][{_W}]*+(?:\(\))?",
        rf"(?<![{_W}])[A-Za-z_][{_W}]*+\(\)",
    ),
    "urls": _compiled(
        rf"(?<![A-Za-z\d+.-])(?:[A-Za-z][A-Za-z\d+.-]{{1,15}}+://|www\.)[{_URL}{_ENDS}]*[{_URL}]",
        rf"(?<![A-Za-z\d+.-])(?:[A-Za-z\d-]{{1,63}}+\.){{1,8}}(?:{_DOMAINS})(?![A-Za-z\d-])"
        rf"(?:[/:?#](?:[{_URL}{_ENDS}]*[{_URL}])?)?",
    ),
    "emails": _compiled(
        r"(?<![A-Za-z\d._%+-])[A-Za-z\d._%+-]{1,64}+@[A-Za-z\d-]{1,63}+(?:\.[A-Za-z\d-]{1,63}+){1,8}+"
    ),
    "quotes": _compiled(
        r'(?<![\w"])"(?=[^\s"])(?:[^"\n]|\n(?!\s)){1,200}+(?<=\S)"(?!\w)',
        r"“(?:[^“”\n]|\n(?!\s)){1,200}+”",
        r"„(?:[^„“”\n]|\n(?!\s)){1,200}+[“”]",
        r"«(?:[^«»\n]|\n(?!\s)){1,200}+»",
    ),
    # After a title, or initials; two or more in a row; not at the start of a sentence; acronyms.
    "names": _compiled(
        rf"{_BEGIN}(?:(?:Mrs?|Ms|Dr|Prof|St)\.[ ]|(?:[{_U}]\.[ ]?){{1,4}}){_RUN}*+",
        rf"{_BEGIN}{_RUN}++",
        rf"(?<=[{_L}\d,;:)&\u2013—/][ ]){_RUN}*+",
        rf"{_BEGIN}[{_U}](?:[{_U}&]{{1,7}}s?|(?:\.[{_U}]){{1,5}}\.?)(?![{_L}\d_])",
    ),
}
"""What may be kept, and the pattern of each kind."""


def kinds_of(asked: Sequence[str]) -> tuple[str, ...]:
    """The kinds that a setting asks for, where ``none`` alone stands for none of them."""
    if NONE in asked and len(asked) > 1:
        raise SettingsError(f"`keep` is {','.join(asked)}, and {NONE} stands alone")
    return tuple(kind for kind in asked if kind != NONE)


def cut(spans: Iterable[Span], outside: bool, kinds: Sequence[str]) -> list[Span]:
    """Cuts what stays raw out of the spans that merge.

    Each span is searched by itself, so no text changes what is kept of another one.

    Args:
        spans: Of a text.
        outside: Whether spans that do not specify it merge.
        kinds: Of :data:`KINDS`.
    """
    return [piece for span in spans for piece in _pieces(span, outside, kinds)]


def _pieces(span: Span, outside: bool, kinds: Sequence[str]) -> list[Span]:
    text = span.text
    if not kinds or not (outside if span.merge is None else span.merge):
        return [span]
    found: list[Span] = []
    end = 0
    for start, stop in sorted(m.span() for kind in kinds for m in KINDS[kind].finditer(text)):
        if stop > end:
            found += [Span(text[end:start], span.merge)] if start > end else []
            found.append(Span(text[max(start, end) : stop], False))
            end = stop
    return [*found, Span(text[end:], span.merge)] if end < len(text) else found


def without_lone(segments: Iterable[Segment]) -> list[Segment]:
    """Leaves a merging run of one token raw: it takes one position in any case."""
    made: list[Segment] = []
    for segment in segments:
        add(made, segment.ids, segment.merge and len(segment.ids) > 1)
    return made


def check_keep(tokenizer: object, kinds: Sequence[str]) -> None:
    """Refuses kinds where the encoder reads whole texts, each between two tokens of its own."""
    if kinds and merged_text(tokenizer) is not None:
        raise PromptError(
            f"`keep` is {','.join(kinds)}, and this model's encoder reads each merged text as a "
            f"whole: give `keep` {NONE}"
        )
