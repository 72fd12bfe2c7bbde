"""Tags in a text: what they mean, how they are written literally, how they may be wrong."""

from __future__ import annotations

from random import Random

import pytest

from kmerge_mlx.errors import PromptError
from kmerge_mlx.prompts.tags import Span, escape, parse

MERGE, RAW, PLAIN = True, False, None


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("plain", [("plain", PLAIN)]),
        ("", []),
        ("<merge>a</merge>", [("a", MERGE)]),
        ("<raw>a</raw>", [("a", RAW)]),
        ("a<merge>b</merge>c", [("a", PLAIN), ("b", MERGE), ("c", PLAIN)]),
        ("<merge>a</merge><merge>b</merge>", [("a", MERGE), ("b", MERGE)]),
        ("<merge>a<raw>b</raw>c</merge>", [("a", MERGE), ("b", RAW), ("c", MERGE)]),
        ("<raw>a<merge>b</merge></raw>", [("a", RAW), ("b", MERGE)]),
        ("<merge></merge>a", [("a", PLAIN)]),
        ("<merge><merge>a</merge>b</merge>", [("a", MERGE), ("b", MERGE)]),
        (r"\<raw>", [("<raw>", PLAIN)]),
        (r"\\<raw>a</raw>", [("\\", PLAIN), ("a", RAW)]),
        (r"\\\<raw>", [("\\<raw>", PLAIN)]),
        (r"C:\raw \n \\", [(r"C:\raw \n \\", PLAIN)]),
        ("<merge>\\</merge></merge>", [("</merge>", MERGE)]),
        # No tags of ours.
        ("<Merge>a</Merge>", [("<Merge>a</Merge>", PLAIN)]),
        ("<merge >< raw><raw/>", [("<merge >< raw><raw/>", PLAIN)]),
        ("<merged>a</merged>", [("<merged>a</merged>", PLAIN)]),
    ],
)
def test_tags_say_what_merges(text, spans):
    assert parse(text) == [Span(*span) for span in spans]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<merge>a", "<merge> at line 1, column 1 is never closed"),
        ("a\nb</raw>", "</raw> at line 2, column 2 closes nothing"),
        ("<merge>a</raw>", "</raw> at line 1, column 9 closes <merge>"),
        ("<merge>a<raw>b</merge></raw>", "</merge> at line 1, column 15 closes <raw>"),
        ("<raw><merge>a</merge>\n\n<merge></raw>", "</raw> at line 3, column 8 closes <merge>"),
        (r"<raw>\</raw>", "<raw> at line 1, column 1 is never closed"),
    ],
)
def test_tags_that_do_not_pair_are_one_error_that_says_where(text, message):
    with pytest.raises(PromptError) as error:
        parse(text, "message 2")
    assert str(error.value).startswith(f"message 2: {message}; write \\<")


def random_text(random: Random, pieces: tuple[str, ...]) -> str:
    return "".join(random.choice(pieces) for _ in range(random.randrange(12)))


@pytest.mark.parametrize("seed", range(300))
def test_whatever_is_escaped_is_read_back_as_one_span(seed):
    pieces = ("<merge>", "</merge>", "<raw>", "</raw>", "\\", "a", "<", ">", "\n", "木", "/raw>")
    text = random_text(Random(seed), pieces)
    assert parse(escape(text)) == ([Span(text)] if text else [])


@pytest.mark.parametrize("seed", range(300))
def test_random_nests_keep_every_character_and_the_inner_tag_decides(seed):
    random, expected, source = Random(seed), [], []

    def write(kind: bool | None, depth: int) -> None:
        for _ in range(random.randrange(4)):
            if depth < 4 and random.random() < 0.5:
                inner = random.random() < 0.5
                tag = "merge" if inner else "raw"
                source.append(f"<{tag}>")
                write(inner, depth + 1)
                source.append(f"</{tag}>")
            else:
                text = random_text(random, ("a", "\\", "<raw>", "b\n", "é"))
                # A backslash before a tag is the tag's: end on none.
                text += "." if text.endswith("\\") else ""
                source.append(escape(text))
                expected.extend((character, kind) for character in text)

    write(None, 0)
    found = [(character, span.merge) for span in parse("".join(source)) for character in span.text]
    assert found == expected
