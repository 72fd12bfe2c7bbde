"""Tags in a text: what they mean, how they are written literally, how they may be wrong."""

from __future__ import annotations

from random import Random

import pytest

from kmerge_mlx.errors import PromptError
from kmerge_mlx.prompts.tags import Span, escape, parse

MERGE, RAW, PLAIN = True, False, None


def test_tags_say_what_merges():
    for text, spans in (
        ("plain", [("plain", PLAIN)]),
        ("", []),
        ("a<merge>b</merge>c", [("a", PLAIN), ("b", MERGE), ("c", PLAIN)]),
        ("<merge>a</merge><merge>b</merge>", [("a", MERGE), ("b", MERGE)]),
        ("<merge>a<raw>b</raw>c</merge>", [("a", MERGE), ("b", RAW), ("c", MERGE)]),
        ("<raw>a<merge>b</merge></raw>", [("a", RAW), ("b", MERGE)]),
        ("<merge></merge>a", [("a", PLAIN)]),
        (r"\<raw>", [("<raw>", PLAIN)]),
        (r"\\<raw>a</raw>", [("\\", PLAIN), ("a", RAW)]),
        (r"C:\raw \n \\", [(r"C:\raw \n \\", PLAIN)]),
        ("<merge>\\</merge></merge>", [("</merge>", MERGE)]),
        ("<Merge>a</Merge><merge >< raw><raw/>", [("<Merge>a</Merge><merge >< raw><raw/>", PLAIN)]),
    ):
        assert parse(text) == [Span(*span) for span in spans]


def test_tags_that_do_not_pair_are_one_error_that_says_where():
    for text, message in (
        ("<merge>a", "<merge> at line 1, column 1 is never closed"),
        ("a\nb</raw>", "</raw> at line 2, column 2 closes nothing"),
        ("<merge>a<raw>b</merge></raw>", "</merge> at line 1, column 15 closes <raw>"),
        ("<raw><merge>a</merge>\n\n<merge></raw>", "</raw> at line 3, column 8 closes <merge>"),
        (r"<raw>\</raw>", "<raw> at line 1, column 1 is never closed"),
    ):
        with pytest.raises(PromptError) as error:
            parse(text, "message 2")
        assert str(error.value).startswith(f"message 2: {message}; write \\<")


def random_text(random: Random, pieces: tuple[str, ...]) -> str:
    return "".join(random.choice(pieces) for _ in range(random.randrange(12)))


def test_whatever_is_escaped_is_read_back_as_one_span():
    pieces = ("<merge>", "</merge>", "<raw>", "</raw>", "\\", "a", "<", ">", "\n", "木", "/raw>")
    for seed in range(300):
        text = random_text(Random(seed), pieces)
        assert parse(escape(text)) == ([Span(text)] if text else [])


def test_random_nests_keep_every_character_and_the_inner_tag_decides():
    for seed in range(300):
        random, expected, source = Random(seed), [], []

        def write(kind, depth, random=random, expected=expected, source=source):
            for _ in range(random.randrange(4)):
                if depth < 4 and random.random() < 0.5:
                    inner = random.random() < 0.5
                    tag = "merge" if inner else "raw"
                    source.append(f"<{tag}>")
                    write(inner, depth + 1)
                    source.append(f"</{tag}>")
                else:
                    text = random_text(random, ("a", "\\", "<raw>", "b\n", "é"))
                    text += "." if text.endswith("\\") else ""  # it would be the next tag's
                    source.append(escape(text))
                    expected.extend((character, kind) for character in text)

        write(None, 0)
        spans = parse("".join(source))
        assert [(character, s.merge) for s in spans for character in s.text] == expected
