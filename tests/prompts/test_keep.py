"""Exact strings inside of what merges: which there are, that they stay raw, that the rest merges.

What is expected was marked by hand: in each line, what stands in brackets is to stay raw.
"""

from __future__ import annotations

import re

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx import load
from kmerge_mlx.convert.window import convert_window
from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.errors import AdapterError, PromptError, SettingsError
from kmerge_mlx.prompts.chat_template import ChatTemplate
from kmerge_mlx.prompts.keep import KINDS, cut, without_lone
from kmerge_mlx.prompts.lay_out import lay_out, lay_out_chat, lay_out_text
from kmerge_mlx.prompts.policy import ALL, Layout, chosen
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.prompts.tags import Span
from kmerge_mlx.settings import LayoutSettings
from kmerge_mlx.train.settings import TrainSettings
from tests.cli_runner import CHATML
from tests.conftest import UPSTREAM

MARKED = {
    "numbers": """\
It cost [1,234.56], not [3.14], at [12:30] on [2026-11-28] for [$5.99], or [40%] of [v1.2.3].
Call [+1 (555) 010-9999] or [555 010 9999]; hex is [0x7f3a], and [srv-eu-7f3a] is a server.
The [21st] of forty-two well-known days. \u4fa1\u683c\u306f[1234]\u5186\u3067\u3059""",
    "code": """\
Use [`pip install`] or [``a`b``], then [retry_limit_ms], [camelCase], [os.path.join()] and [open()].
E.g. this (see it.) is not code, and the end.
[```py
if x:  # "quoted"
    pass
```]
After it, [__init__] and a last one:
[```
what is never closed is code to its end.
One more line]""",
    "urls": """\
See [https://example.com/a?b=c#d]. Or ([http://x.y/z(1]), [www.foo.org/bar], and [github.com/a/b].
[ftp://files.net/x]\u3002\u6b21 is no e.g. or and/or""",
    "emails": "Ask [a.b+c@example.co.uk] or <[x_y@z.de]>. Not @me, nor a@b, nor x at y.",
    "quotes": """\
He said ["to be"] and [\u201cor not\u201d], [\u00abici\u00bb], [\u201eda\u201c] ["over
two lines"]; a 5" pipe of 6" width, "never closed

in its paragraph".""",
    "names": """\
The code of the [Harlow] depot. Harlow is a town. [Tom Baker] asked [Jean-Luc] at [NASA], I think.
In the [U.S.] and in [K\u00f6ln]; [Dr. Smith] knows [J. R. Tolkien]. But I'm not. \u7531[NASA]\u53d1
Maria came. City: [Paris], and the two of [O'Neill].""",
}


def kept(text: str, *kinds: str) -> str:
    """A text with brackets around what is kept."""
    spans = cut([Span(text, True)], False, kinds)
    assert "".join(span.text for span in spans) == text
    return "".join(span.text if span.merge else f"[{span.text}]" for span in spans)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_and_nothing_else(kind):
    text = re.sub(r"[\[\]]", "", MARKED[kind])
    assert kept(text, kind) == MARKED[kind]


def test_kinds_add_up_and_what_does_not_merge_is_not_searched():
    text = 'The server "srv-eu-7f3a" of Harlow is at http://10.0.0.1/x_y.'
    assert kept(text, "numbers") == text.replace("srv-eu-7f3a", "[srv-eu-7f3a]").replace(
        "10.0.0.1/x_y", "[10.0.0.1/x_y]"
    )
    assert kept(text, *KINDS) == (
        'The server ["srv-eu-7f3a"] of [Harlow] is at [http://10.0.0.1/x_y].'
    )
    fenced = "```\r\nx\r\n```\r\n"
    assert kept(f"a\r\n{fenced}b 1", "code") == f"a\r\n[{fenced[:-2]}]\r\nb 1".replace(
        "]\r\n", "\r]\n"
    )
    for merge, outside in ((False, True), (None, False)):
        assert cut([Span(text, merge)], outside, [*KINDS]) == [Span(text, merge)]
    assert cut([Span("a 12 b")], True, ["numbers"]) == [
        *(Span("a "), Span("12", False), Span(" b")),
    ]


@pytest.mark.parametrize("unit", [
    *("a", "a-", "1 ", "_", "a_", "aB", "a.", "`a", "```\n", ' "a', '"\n', "www.", "a://,", "a@a."),
    *("O'", "Aa ", "A. ", "(", "\n ", "\u201ca", "\t" * 999 + "\n", "~" * 999 + "\n", "1)(", "a1-"),
])  # fmt: skip
def test_a_million_hostile_characters_end(unit):
    """With a pattern that takes the square of the length, this would not end within an hour."""
    kept(unit * (10**6 // len(unit)), *KINDS)


@pytest.fixture(scope="module")
def tokenizer():
    """Its template trims, as many do."""
    found = load_tokenizer(UPSTREAM / "base")
    found._tokenizer.chat_template = CHATML.replace("message.content", "message.content | trim")
    found.has_chat_template = True
    return found


LONG = "The depot of one and two has the code 48213, and the other one has srv-eu-7f3a today. " * 2
EXACT = ("48213", "srv-eu-7f3a")
KEEP = Layout("documents", 8, keep=("numbers",))


def ids_of(segments):
    return [i for segment in segments for i in segment.ids]


def texts(tokenizer, segments, merge):
    return [tokenizer.decode(list(s.ids)) for s in segments if s.merge == merge]


def check(tokenizer, segments, plain):
    """The ids are those without ``keep``; what is exact is raw, and most of the rest merges."""
    assert ids_of(segments) == ids_of(plain)
    assert not any(char.isdigit() for text in texts(tokenizer, segments, True) for char in text)
    raw = " ".join(texts(tokenizer, segments, False))
    assert all(raw.count(exact) == 2 for exact in EXACT)
    before, after = (sum(len(s.ids) for s in each if s.merge) for each in (plain, segments))
    assert before / 2 < after < before
    assert min(len(s.ids) for s in segments if s.merge) > 1


WAYS = {
    "context and prompt": lambda t, layout: lay_out(t, LONG, "What is it?", layout=layout),
    "context alone": lambda t, layout: lay_out(t, LONG, None, layout=layout),
    "template": lambda t, layout: lay_out(t, LONG, "What is it?", ChatTemplate(), layout),
    "template, alone": lambda t, layout: lay_out(t, LONG, None, ChatTemplate(), layout),
    "tags": lambda t, layout: lay_out(t, None, f"Read <merge>{LONG}</merge>?", layout=layout),
    "text": lambda t, layout: lay_out_text(t, f"{LONG}\n\nWhat is it?", layout),
    "message": lambda t, layout: lay_out_chat(t, [user(f"{LONG}\n\nWhat is it?")], layout),
    "merge true": lambda t, layout: lay_out_chat(t, [user(LONG, merge=True)], layout),
    "part": lambda t, layout: lay_out_chat(t, [user([{"text": LONG, "merge": True}])], layout),
    "answer": lambda t, layout: lay_out_chat(
        t, [user("What?"), {"role": "assistant", "content": LONG}, user("And?")], layout
    ),
    "training row": lambda t, layout: tokenize(t, Example(LONG, "What?", "48"), layout).segments,
    "training messages": lambda t, layout: (
        tokenize(
            t,
            Example(messages=(user(f"{LONG}\n\nWhat?"), {"role": "assistant", "content": "48"})),
            layout,
        ).segments
    ),
}


def user(content, **more):
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [
    *(KEEP, Layout("contexts", 8, keep=("numbers",)), Layout(ALL, keep=("numbers",))),
    Layout(ALL, chat_template=False, keep=("numbers",)),
])  # fmt: skip
def test_whatever_merges_merges_around_its_numbers(tokenizer, way, layout):
    if way == "training messages" and not layout.chat_template:
        return  # they need a template
    plain = WAYS[way](tokenizer, Layout(layout.merges, layout.threshold, layout.chat_template))
    check(tokenizer, WAYS[way](tokenizer, layout), plain)


def test_with_all_the_templates_own_text_is_not_searched(tokenizer):
    given = Layout(ALL, keep=("names", "numbers"))
    template = "Date: 2026-11-28 for Harlow\n{{ messages[0].content }}"
    found = lay_out_chat(tokenizer, [user("go 42 on")], given, {"chat_template": template})
    assert "".join(texts(tokenizer, found, True)).startswith("Date: 2026-11-28 for Harlow\ngo")
    assert "42" in "".join(texts(tokenizer, found, False))
    # A template that changes its text hides where the numbers are: that is said, not ignored.
    rewriting = {"chat_template": "{{ messages[0].content | length }}{{ messages[0].content }}"}
    with pytest.raises(PromptError, match="rewrites the text"):
        lay_out_chat(tokenizer, [user("go 42 on")], given, rewriting)
    assert lay_out_chat(tokenizer, [user("go 42 on")], Layout(ALL), rewriting)[0].merge


def test_raw_tags_and_what_stands_outside_are_as_without(tokenizer):
    text = "a 12 <merge>b 34 b b b b <raw>c c</raw></merge> d d d d"
    segments = lay_out(tokenizer, None, text, layout=KEEP)
    raw = "".join(texts(tokenizer, segments, False))
    assert all(part in raw for part in ("a 12", "34", "c c", "d d d d"))


def test_a_run_of_one_token_stays_raw_and_costs_the_same_at_every_k():
    one, two = Segment([1]), Segment([2, 3])
    found = without_lone([Segment([9], False), one, Segment([8], False), two, one, one])
    assert [(list(s.ids), s.merge) for s in found] == [
        *(([9, 1, 8], False), ([2, 3], True), ([1, 1], False)),
    ]
    for k in (2, 4, 8):
        assert one.positions(k) == Segment([1], False).positions(k)
        assert two.positions(k) < Segment([2, 3], False).positions(k)


@pytest.mark.parametrize("merges", ["documents", "contexts", ALL])
def test_what_follows_changes_no_layout_of_what_stands_before(tokenizer, merges):
    layout = Layout(merges, 8, keep=tuple(KINDS))
    said = {"role": "assistant", "content": 'He said "no 12 `x', "merge": True}
    turns = [user(f"{LONG}\n\nWhat?"), said, user(f'More" of 13` it?\n\n{LONG}')]
    whole = lay_out_chat(tokenizer, turns, layout)
    first = lay_out_chat(tokenizer, turns[:1], layout)
    flat = [
        [(i, segment.merge) for segment in each for i in segment.ids] for each in (first, whole)
    ]
    border = len("<|im_start|>assistant\n")  # where a run may end otherwise, in tokens at most
    assert flat[1][: len(flat[0]) - border] == flat[0][:-border]


def test_a_layout_stores_what_it_keeps_only_if_there_is_something():
    assert "keep" not in Layout().to_json()
    stored = Layout(keep=("names", "numbers"))
    assert stored == Layout(keep=("numbers", "names", "names"))
    assert Layout.from_json(stored.to_json()) == stored
    assert len({stored, Layout.from_json(stored.to_json())}) == 1
    for wrong in (["dates"], "numbers", None, [["numbers"]], {"numbers": 1}, ["none"]):
        with pytest.raises(AdapterError, match=r"keep is .*, expected some of numbers, code, urls"):
            Layout.from_json({"merges": "all", "keep": wrong})


def test_what_is_asked_for_replaces_what_is_stored_and_none_is_nothing():
    stored = Layout(keep=("numbers", "code"))
    assert chosen(stored) == stored
    assert chosen(stored, keep=["urls"]).keep == ("urls",)
    assert chosen(stored, keep=["none"]).keep == chosen(stored, keep=[]).keep == ()
    assert TrainSettings.of({"keep": ["code", "numbers"]}).layout() == stored
    assert TrainSettings.of({"keep": ["none"]}).layout() == TrainSettings().layout() == Layout()
    for wrong in (["dates"], "numbers", ["numbers", 5]):
        with pytest.raises(SettingsError, match=r"`keep` is .*, expected some of numbers, code"):
            LayoutSettings.of({"keep": wrong})


def test_an_encoder_that_reads_whole_texts_refuses_to_keep_anything(tmp_path):
    convert_window(UPSTREAM.parent / "lclm_cs4_w16" / "checkpoint", "it", tmp_path / "made")
    _, tokenizer = load(str(tmp_path / "made"), tmp_path / "made")
    assert lay_out(tokenizer, LONG, "What?")
    with pytest.raises(PromptError, match=r"`keep` is numbers, .* as a whole: give `keep` none"):
        lay_out(tokenizer, LONG, "What?", layout=KEEP)
