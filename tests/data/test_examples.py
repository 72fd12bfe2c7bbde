"""Reading examples: mlx-lm's formats, the split of a prompt, and every kind of bad line."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner import datasets as mlx_datasets

from kmerge_mlx.data import jsonl as lines
from kmerge_mlx.data.examples import Example, ExampleFile, RowFormat
from kmerge_mlx.data.sources import load_examples
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


def test_without_a_context_field_the_whole_prompt_merges():
    assert read(GOOD) == Example(context="Tree: JN", prompt=None, answer="true")


def test_beside_a_context_field_the_prompt_stays_raw():
    row = {"context": "Tree: JN", "prompt": "Child?", "completion": "WO"}
    assert read(row) == Example(context="Tree: JN", prompt="Child?", answer="WO")


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_context_still_keeps_the_prompt_raw(nothing):
    row = {"context": nothing, "prompt": "Child?", "completion": "WO"}
    assert read(row) == Example(context=None, prompt="Child?", answer="WO")


def test_a_context_alone_merges_whole():
    assert read({"context": "Tree", "completion": "WO"}) == Example("Tree", None, "WO")


def test_messages_are_kept_as_they_are():
    example = read({"messages": CHAT, "tools": [{"type": "function"}]})
    assert example.messages == tuple(CHAT)
    assert example.tools == ({"type": "function"},)


def test_a_text_is_cut_at_its_rows_split():
    example = read({"text": "Tree: JN, Answer: true", "split": 18})
    assert (example.context, example.answer, example.bare) == ("Tree: JN, Answer: ", "true", True)


def test_a_texts_split_counts_characters_not_bytes():
    assert read({"text": "漢字é🙂xy", "split": 4}).answer == "xy"


def test_one_share_cuts_every_text_before_a_word():
    example = read({"text": "one two three four"}, text_split=0.6)
    assert (example.context, example.answer) == ("one two", " three four")
    assert read({"text": "漢字漢字"}, text_split=0.5).answer == "漢字"


def test_a_rows_own_split_beats_the_share():
    assert read({"text": "abcd", "split": 1}, text_split=0.9).answer == "bcd"


@given(st.text(min_size=2, max_size=30), st.floats(0.01, 0.99))
@settings(max_examples=200)
def test_a_cut_text_is_the_text(text, share):
    example = read({"text": text}, text_split=share)
    assert example.context + example.answer == text


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


BAD = {
    "not JSON": (b"{'prompt': 1}", r"not JSON: Expecting .* at character 2"),
    "half a row": (b'{"prompt": "a", "compl', r"not JSON: Unterminated string"),
    "two rows": (b'{"prompt": "a"} {"prompt": "b"}', r"not JSON: Extra data at character 17"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "completion": "b"}', r"not UTF-8: byte 16 .* 0xe9"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), r"not UTF-8: byte 1 of the line is 0xff"),
    "a list": (["a", "b"], r"found \['a', 'b'\], expected an object"),
    "too deep": (b"[" * 100_000, r"not JSON that can be read"),
    "too long a number": (b'{"prompt": ' + b"9" * 5000 + b"}", r"not JSON that can be read"),
    "half a character": (b'{"prompt": "\\ud83d", "completion": "b"}', r"half of a surrogate"),
    "no field": ({"question": "a", "answer": "b"}, r"found 'question, answer', expected prompt"),
    "nothing": ({}, r"found 'no key', expected prompt and completion, or messages, or text"),
    "no completion": ({"prompt": "a"}, r"found 'prompt', expected prompt and completion"),
    "no prompt": ({"completion": "a"}, r"found 'completion', expected prompt and completion"),
    "a number": ({"prompt": "a", "completion": 3}, r"completion is 3, expected text"),
    "a list of prompts": ({"prompt": ["a"], "completion": "b"}, r"prompt is \['a'\], expected"),
    "a wrong context": (GOOD | {"context": 1}, r"context is 1, expected text"),
    "an empty answer": ({"prompt": "a", "completion": ""}, r"completion is empty, expected an"),
    "a null answer": ({"prompt": "a", "completion": None}, r"completion is empty, expected an"),
    "an empty prompt": ({"prompt": "", "completion": "a"}, r"prompt is empty, expected a prompt"),
    "a wrong tool": (GOOD | {"tools": "x"}, r"tools is 'x', expected a list"),
    "a cut tag": ({"text": "<merge>a b", "split": 3}, r"split is 3, in the middle of a tag"),
    "no messages": ({"messages": []}, r"messages is \[\], expected a list of messages"),
    "a wrong message": ({"messages": ["hi"]}, r"messages\[0\] is 'hi', expected an object"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\].content is None"),
    "a question last": ({"messages": [*CHAT, CHAT[0]]}, r"ends with 'user', expected the assist"),
    "an answer alone": ({"messages": CHAT[1:]}, r"holds no prompt"),
    "an empty last": (
        {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
        r"messages ends with an empty answer",
    ),
    "a context beside": ({"messages": CHAT, "context": "a"}, r"context beside messages"),
    "no split": ({"text": "abc"}, r"text has no split point: put .* under split, or set text_sp"),
    "a split at 0": ({"text": "abc", "split": 0}, r"split is 0 in 3 characters: no prompt"),
    "a split at the end": ({"text": "abc", "split": 3}, r"no answer, expected 1 to 2"),
    "a split in words": ({"text": "abc", "split": "1"}, r"split is '1', expected a whole number"),
    "a split that is true": ({"text": "abc", "split": True}, r"split is True, expected a whole"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_stops_everything_and_is_named(tmp_path, name, suffix):
    line, message = BAD[name]
    path = write(tmp_path / f"train.{suffix}", GOOD, GOOD, line, GOOD)
    with pytest.raises(DataError, match=message) as caught:
        ExampleFile(path)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({"role": JSON | st.just("assistant"), "content": JSON})
KEYS = ("prompt", "completion", "messages", "text", "context", "split", "tools")


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON | st.lists(MESSAGE, max_size=3)),
    st.booleans(),
    st.none() | st.floats(0.1, 0.9),
)
@settings(max_examples=500)
def test_whatever_a_row_holds_it_is_an_example_or_one_error(row, answers, share):
    with contextlib.suppress(DataError):
        example = read(row, answers=answers, text_split=share)
        assert example.context or example.prompt or example.messages
        assert example.answer or example.messages or not answers


def test_bad_lines_can_be_counted_instead(tmp_path):
    bad = [line for line, _ in BAD.values()]
    path = write(tmp_path / "train.jsonl", GOOD, *bad, GOOD | {"prompt": "last"})
    with ExampleFile(path, skip_bad=True) as file:
        assert (len(file), file.bad) == (2, len(BAD))
        assert file.first_bad.startswith(f"{path} line 2: not JSON")
        assert file[1].context == "last"


def test_a_file_of_bad_lines_alone_is_refused_even_when_they_are_counted(tmp_path):
    path = write(tmp_path / "train.jsonl", [1], [2])
    with pytest.raises(DataError, match=r"holds no example: every line is bad, .* line 1: found"):
        ExampleFile(path, skip_bad=True)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("content", [[], [b"", b"  ", b"\r"]])
def test_an_empty_file_is_refused(tmp_path, suffix, content):
    path = write(tmp_path / f"train.{suffix}", *content)
    with pytest.raises(DataError, match=r"holds no example$"):
        ExampleFile(path)


def test_a_line_past_the_limit_is_named_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(GOOD).encode() + b'\n{"prompt": "')
        for _ in range(64):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n' + json.dumps(GOOD).encode())
    tracemalloc.start()
    with pytest.raises(DataError, match=r"line 2: longer than 1 MiB"):
        ExampleFile(path)
    with ExampleFile(path, skip_bad=True) as examples:
        assert (len(examples), examples.bad, examples[1].answer) == (2, 1, "true")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_line_of_exactly_the_limit_is_read(tmp_path, monkeypatch):
    data = json.dumps(GOOD).encode() + b"\n"
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", len(data))
    path = tmp_path / "train.jsonl"
    path.write_bytes(data + data)
    assert len(ExampleFile(path)) == 2
    path.write_bytes(data.replace(b"true", b"trues") + data)
    assert ExampleFile(path, skip_bad=True).bad == 1


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_blank_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path, suffix):
    line = json.dumps(GOOD).encode()
    path = write(tmp_path / f"a.{suffix}", b"\xef\xbb\xbf" + line + b"\r", b"", b" \t\r", line)
    with ExampleFile(path) as file:
        assert [example.answer for example in file] == ["true", "true"]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=20), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_index_gives_the_row_that_was_written_there(tmp_path_factory, pairs, packed, escaped):
    path = tmp_path_factory.mktemp("any") / ("train.jsonl" + ".gz" * packed)
    rows = [{"prompt": p, "completion": c} for p, c in pairs]
    write(path, *[json.dumps(row, ensure_ascii=escaped).encode() for row in rows])
    order = random.Random(0).sample(range(len(rows)), len(rows))
    with ExampleFile(path) as file:
        assert [(file[i].context, file[i].answer) for i in order] == [pairs[i] for i in order]
        assert (file[-1].context, file[-1].answer) == pairs[-1]
        assert [example.context for example in file] == [p for p, _ in pairs]
        with pytest.raises(IndexError):
            file[len(pairs)]


def test_a_file_takes_memory_by_its_rows_not_by_its_size(tmp_path):
    row = json.dumps({"prompt": "x" * 50_000, "completion": "b"}).encode()
    path = write(tmp_path / "train.jsonl", *[row] * 600)  # 30 MB
    tracemalloc.start()
    with ExampleFile(path) as file:
        assert len(file) == 600
        assert len(file[599].context) == 50_000
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_the_digest_tells_one_set_of_examples_from_another(tmp_path):
    one = ExampleFile(write(tmp_path / "a.jsonl", GOOD, GOOD | {"prompt": "b"})).digest
    assert ExampleFile(write(tmp_path / "b.jsonl.gz", GOOD, GOOD | {"prompt": "b"})).digest == one
    assert ExampleFile(write(tmp_path / "c.jsonl", GOOD | {"prompt": "b"}, GOOD)).digest != one
    skipping = ExampleFile(
        write(tmp_path / "d.jsonl", GOOD, [], GOOD | {"prompt": "b"}), None, True
    )
    assert skipping.digest == one


def test_an_example_can_be_named_by_file_and_line(tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD, b"", [], GOOD)
    with ExampleFile(path, skip_bad=True) as file:
        assert [file.where(0), file.where(-1)] == [f"{path} line 1", f"{path} line 4"]
    assert load_examples(tmp_path, skip_bad=True)["train"].where(1) == f"{path} line 4"


def test_a_file_changed_under_way_is_an_error_and_not_a_wrong_example(tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD, GOOD)
    with ExampleFile(path) as file:
        with path.open("r+b") as other:
            other.write(b"#" * 20)
        with pytest.raises(DataError, match=r"line 1 was changed while in use: not JSON"):
            file[0]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in (
        ("gone.jsonl", "no such file"),
        ("pipe.jsonl", "is not a file"),
        (".", ""),
    ):
        with pytest.raises(DataError, match=f"cannot read .*{message}"):
            ExampleFile(tmp_path / name)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-9], lambda d: b"no gzip", lambda d: d[:30] + b"x"]
)
def test_a_torn_gzip_file_is_one_error(tmp_path, damage):
    path = write(tmp_path / "train.jsonl.gz", *[GOOD | {"prompt": str(i)} for i in range(99)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train\.jsonl\.gz is torn or not a gzip file"):
        ExampleFile(path)


def test_an_unpacked_file_leaves_nothing_behind(tmp_path):
    path = write(tmp_path / "train.jsonl.gz", GOOD)
    code = "import sys; from kmerge_mlx.data.examples import *; f = ExampleFile(sys.argv[1]); f[0]"
    place = tmp_path / "tmp"
    place.mkdir()
    environment = os.environ | {"TMPDIR": str(place)}
    subprocess.run([sys.executable, "-c", code, path], env=environment, check=True, timeout=60)
    assert list(place.iterdir()) == []


def test_a_full_disk_under_an_unpacked_file_is_one_error(tmp_path):
    rows = [GOOD | {"prompt": str(i) * 200} for i in range(500)]
    path = write(tmp_path / "train.jsonl.gz", *rows)
    code = (
        "import resource, signal, sys\n"
        "from kmerge_mlx.data.examples import ExampleFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "ExampleFile(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60
    )
    assert "DataError: cannot unpack" in done.stderr
    assert "File too large" in done.stderr


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_feature": ""}, "prompt_feature is '', expected the name of a key"),
        ({"chat_feature": 3}, "chat_feature is 3"),
        ({"text_split": 1.0}, "text_split is 1.0, expected a share between 0 and 1"),
        ({"text_split": "half"}, "text_split is 'half'"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(keys, message):
    with pytest.raises(DataError, match=message):
        RowFormat(**keys)
