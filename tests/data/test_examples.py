"""What a row means: mlx-lm's formats, the split of a prompt, and every kind of bad line."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner import datasets as mlx_datasets

from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.sources import read_examples
from kmerge_mlx.errors import DataError

GOOD = {"prompt": "Tree: JN", "completion": "true"}
CHAT = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]


def write(path: Path, *rows: object) -> Path:
    """Writes rows: bytes as they are, all else as JSON."""
    raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in raw)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(row: dict, **keys: object) -> Example:
    return RowFormat(**keys).read(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, Example("Tree: JN", None, "true")),
        ({"context": "Tree", "prompt": "Child?"}, Example("Tree", "Child?", "true")),
        ({"context": "", "prompt": "Child?"}, Example(None, "Child?", "true")),
        ({"context": None, "prompt": "Child?"}, Example(None, "Child?", "true")),
        ({"context": "Tree", "prompt": None}, Example("Tree", None, "true")),
    ],
)
def test_beside_a_context_field_the_prompt_stays_raw_and_merges_without_one(row, expected):
    assert read(GOOD | row) == expected


def test_messages_are_kept_as_they_are():
    example = read({"messages": CHAT, "tools": [{"type": "function"}]})
    assert example == Example(messages=tuple(CHAT), tools=({"type": "function"},))


def test_a_text_is_cut_at_its_rows_split_or_before_a_word_at_one_share():
    example = read({"text": "Tree: JN, Answer: true", "split": 18})
    assert example == Example("Tree: JN, Answer: ", None, "true", bare=True)
    assert read({"text": "漢字é🙂xy", "split": 4}).answer == "xy"  # characters, not bytes
    example = read({"text": "one two three four"}, text_split=0.6)
    assert (example.context, example.answer) == ("one two", " three four")
    assert read({"text": "漢字漢字"}, text_split=0.5).answer == "漢字"
    assert read({"text": "abcd", "split": 1}, text_split=0.9).answer == "bcd"  # a row's own first


@given(st.text(min_size=2, max_size=30), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_a_cut_text_is_the_text(text, share):
    example = read({"text": text}, text_split=share)
    assert example.context + example.answer == text


COMMIT = {"old_contents": "x = 1 <raw>", "subject": "Use <raw>", "new_contents": "x = <raw>"}
SQUAD = {"context": "In <raw> France.", "question": "Where?", "answers": ["France", "in France"]}


def test_a_commit_keeps_its_subject_raw_and_the_file_before_it_merges():
    row = {"commit": "1", "message": "Use <raw>\n", "lang": "text", "repos": "a/b"} | COMMIT
    change = "Write the whole file after this change: Use \\<raw>"  # a tag of code is text
    assert read(row) == Example("x = 1 \\<raw>", change, "x = <raw>")
    assert read(row | {"old_contents": ""}).context is None
    assert read(row | GOOD) == read(GOOD)


@pytest.mark.parametrize(
    "answers",
    [
        ["France", "in France", "France", " "],
        [{"text": "France", "answer_start": 3}, {"text": "in France", "answer_start": 0}],
        {"text": ["France", "in France"], "answer_start": [3, 0]},
    ],
)
def test_a_question_stays_raw_and_has_every_right_answer(answers):
    expected = Example("In \\<raw> France.", "Where?", "France", answers=("France", "in France"))
    assert read(SQUAD | {"answers": answers}) == expected
    assert read(SQUAD | {"answers": answers}, answers=False) == expected


def test_renamed_keys_are_read_and_the_default_ones_are_then_ignored():
    row = {"input": "a", "output": "b", "doc": "c", "prompt": 1, "completion": 2}
    keys = {"prompt_feature": "input", "completion_feature": "output", "context_feature": "doc"}
    assert read(row, **keys) == Example("c", "a", "b")
    assert read({"chosen": CHAT}, chat_feature="chosen").messages == tuple(CHAT)
    assert read({"body": "abc", "at": 1}, text_feature="body", split_feature="at").answer == "bc"


@pytest.mark.parametrize(
    "row", [GOOD, {"messages": CHAT}, {"text": "abc", "split": 1}, GOOD | {"messages": CHAT}]
)
def test_a_row_is_taken_for_what_mlx_lm_takes_it_for(row):
    kinds = {"CompletionsDataset": "answer", "ChatDataset": "messages", "TextDataset": "bare"}
    theirs = type(mlx_datasets.create_dataset([row], None, SimpleNamespace())).__name__
    example = read(row)
    ours = "messages" if example.messages else "bare" if example.bare else "answer"
    assert ours == kinds[theirs]


def test_answers_may_be_left_out_only_when_none_are_asked_for():
    for row in ({"prompt": "a"}, {"prompt": "a", "completion": ""}, {"text": "a"}):
        assert read(row, answers=False) == Example("a", bare="text" in row)
    assert read({"messages": CHAT[:1]}, answers=False).messages == tuple(CHAT[:1])
    assert read(GOOD, answers=False).answer == "true"


BAD = [
    (b"{'prompt': 1}", r"not JSON: Expecting .* at character 2"),
    (b'{"prompt": "a", "compl', r"not JSON: Unterminated string"),
    (b'{"prompt": "caf\xe9", "completion": "b"}', r"not UTF-8: .* byte 0xe9 in position 15"),
    (["a", "b"], r"found \['a', 'b'\], expected one object a line"),
    (b"[" * 100_000, r"not JSON that can be read"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", r"not JSON that can be read"),
    (b'{"prompt": "\\ud83d", "completion": "b"}', r"half of a surrogate"),
    ({"question": "a", "answer": "b"}, r"found 'question, answer', expected prompt"),
    ({}, r"found 'no key', expected prompt and completion, or messages, or text"),
    ({"prompt": "a"}, r"found 'prompt', expected prompt and completion"),
    ({"prompt": ["a"], "completion": "b"}, r"prompt is \['a'\], expected"),
    (GOOD | {"context": 1}, r"context is 1, expected text"),
    ({"prompt": "a", "completion": None}, r"completion is empty, expected an"),
    ({"prompt": "", "completion": "a"}, r"prompt is empty, expected a prompt"),
    (GOOD | {"tools": "x"}, r"tools is 'x', expected a list"),
    ({"text": "<merge>a b", "split": 3}, r"split is 3, in the middle of a tag"),
    ({"messages": []}, r"messages is \[\], expected a list of messages"),
    ({"messages": ["hi"]}, r"messages\[0\] is 'hi', expected an object"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content is None"),
    ({"messages": [*CHAT, CHAT[0]]}, r"ends with 'user', expected the assist"),
    ({"messages": CHAT[1:]}, r"holds no prompt"),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
        r"messages ends with an empty answer",
    ),
    ({"messages": CHAT, "context": "a"}, r"context beside messages"),
    ({"text": "abc"}, r"text has no split point: put .* under split, or set text_sp"),
    ({"text": "abc", "split": 0}, r"split is 0 in 3 characters: no prompt"),
    ({"text": "abc", "split": 3}, r"no answer, expected 1 to 2"),
    ({"text": "abc", "split": "1"}, r"split is '1', expected a whole number"),
    ({"text": "abc", "split": True}, r"split is True, expected a whole"),
    (COMMIT | {"subject": None}, r"subject is None, expected text"),
    (COMMIT | {"new_contents": ""}, r"new_contents is empty, expected an answer"),
    (SQUAD | {"question": 1}, r"question is 1, expected text"),
    (SQUAD | {"answers": "France"}, r"answers is 'France', expected a list of texts"),
    (SQUAD | {"answers": {"text": "a"}}, r"answers is {'text': 'a'}, expected a list"),
    (SQUAD | {"answers": []}, r"answers is empty, expected an answer"),
]


def test_a_bad_line_stops_everything_and_is_named(tmp_path):
    for line, message in BAD:
        path = write(tmp_path / "train.jsonl", GOOD, GOOD, line, GOOD)
        with pytest.raises(DataError, match=message) as caught:
            read_examples(path)
        assert str(caught.value).startswith(f"{path} line 3: ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(str(path)) + 250


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({"role": JSON | st.just("assistant"), "content": JSON})
KEYS = ("prompt", "completion", "messages", "text", "context", "split", "tools", *COMMIT, *SQUAD)


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON | st.lists(MESSAGE, max_size=3)),
    st.booleans(),
    st.none() | st.floats(0.1, 0.9),
)
@settings(max_examples=100, deadline=None)
def test_whatever_a_row_holds_it_is_an_example_or_one_error(row, answers, share):
    with contextlib.suppress(DataError):
        example = read(row, answers=answers, text_split=share)
        assert example.context or example.prompt or example.messages
        assert example.answer or example.messages or not answers


def test_bad_lines_can_be_counted_instead(tmp_path):
    bad = [line for line, _ in BAD]
    path = write(tmp_path / "train.jsonl", GOOD, *bad, GOOD | {"prompt": "last"})
    found = read_examples(path, skip_bad=True)
    assert (len(found), found.bad) == (2, len(BAD))
    assert found[1].context == "last"


def test_a_format_that_makes_no_sense_is_refused():
    for keys, message in (
        ({"prompt_feature": ""}, "prompt_feature is '', expected the name of a key"),
        ({"chat_feature": 3}, "chat_feature is 3"),
        ({"text_split": 1.0}, "text_split is 1.0, expected a share between 0 and 1"),
        ({"text_split": "half"}, "text_split is 'half'"),
    ):
        with pytest.raises(DataError, match=message):
            RowFormat(**keys)
