"""Reading JSONL files: limits, torn files, and lines that do no harm."""

from __future__ import annotations

import json
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmerge_mlx.data import jsonl
from kmerge_mlx.data.sources import read_examples
from kmerge_mlx.errors import DataError
from tests.data.test_examples import GOOD, write


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_file_without_a_good_line_is_refused(tmp_path, suffix):
    for lines, message in (
        ([], "holds no example$"),
        ([b"", b"  ", b"\r"], "holds no example$"),
        ([[1], [2]], "holds no example: every line is bad, .* line 1: found"),
    ):
        path = write(tmp_path / f"train.{suffix}", *lines)
        with pytest.raises(DataError, match=message):
            read_examples(path, skip_bad=True)


def test_a_line_past_the_limit_is_named_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(GOOD).encode() + b'\n{"prompt": "')
        for _ in range(64):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n' + json.dumps(GOOD).encode())
    tracemalloc.start()
    with pytest.raises(DataError, match=r"line 2: longer than 1 MiB"):
        read_examples(path)
    found = read_examples(path, skip_bad=True)
    assert (len(found), found.bad, found[1].answer) == (2, 1, "true")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_small_gzip_file_of_endless_rows_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl.gz", *[GOOD] * 1000)
    assert len(read_examples(path)) == 1000
    monkeypatch.setattr(jsonl, "MAX_UNPACKED_BYTES", 10_000)
    with pytest.raises(DataError, match=r"train\.jsonl\.gz holds over .* unpack it"):
        read_examples(path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_blank_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path, suffix):
    line = json.dumps(GOOD).encode()
    path = write(tmp_path / f"a.{suffix}", b"\xef\xbb\xbf" + line + b"\r", b"", b" \t\r", line)
    assert [example.answer for example in read_examples(path)] == ["true", "true"]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=20), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_what_was_written_is_read(tmp_path_factory, pairs, packed, escaped):
    path = tmp_path_factory.mktemp("any") / ("train.jsonl" + ".gz" * packed)
    rows = [{"prompt": p, "completion": c} for p, c in pairs]
    write(path, *[json.dumps(row, ensure_ascii=escaped).encode() for row in rows])
    found = read_examples(path)
    assert [(e.context, e.answer) for e in found] == pairs
    assert found.where(-1) == f"{path} line {len(pairs)}"


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in (
        ("gone.jsonl", "no such file"),
        ("pipe.jsonl", "is not a file"),
        (".", ""),
    ):
        with pytest.raises(DataError, match=f"cannot read .*{message}"):
            read_examples(tmp_path / name)


def test_a_torn_gzip_file_is_one_error(tmp_path):
    path = write(tmp_path / "train.jsonl.gz", *[GOOD | {"prompt": str(i)} for i in range(99)])
    whole = path.read_bytes()
    for torn in (whole[:-9], b"no gzip", whole[:30] + b"x"):
        path.write_bytes(torn)
        with pytest.raises(DataError, match=r"train\.jsonl\.gz is torn or not a gzip file"):
            read_examples(path)
