"""Plain texts as rows: pieces to go on from and to repeat, and what of them merges."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.data.texts import GO_ON, LEAST, SHORTEST, TextTask
from kmerge_mlx.errors import DataError, SettingsError
from kmerge_mlx.prompts.tags import parse, text_of
from tests.cli_runner import assert_one_error, run
from tests.train_runs import trained

WORDS = ("the ", "of ", "a\n", "cat ", "house ", "seven ", "rain\n", "reads ", "quickly ")


def texts(count: int, words: int = 300) -> list[str]:
    drawn = random.Random(3)
    return [f"{i} " + "".join(drawn.choices(WORDS, k=words)) for i in range(count)]


def written(path: Path, rows: list[object], **options: object) -> dict[str, list[dict[str, str]]]:
    path.mkdir(exist_ok=True)
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    TextTask(file=str(file), **options).write(path / "out")
    return {p.stem: [json.loads(r) for r in p.open()] for p in (path / "out").glob("*.jsonl")}


def piece_of(row: dict[str, str]) -> str:
    return row.get("text") or row["completion"]


def test_pieces_are_the_texts_from_their_beginnings_and_no_text_is_in_two_splits(tmp_path):
    given = texts(60)
    found = written(tmp_path, [{"text": text} for text in given], max_chars=500)
    assert set(found) == {"train", "valid"}
    for text in given:
        inside = [s for s, rows in found.items() if any(piece_of(r) in text for r in rows)]
        assert len(inside) == 1
        pieces = {piece_of(row) for row in found[inside[0]] if piece_of(row) in text}
        left = text
        while pieces:
            (first,) = (piece for piece in pieces if left.startswith(piece))
            left, pieces = left[len(first) :], pieces - {first}
        assert len(left) < SHORTEST
    shares = [(r["split"], len(r["text"]) - r["split"]) for r in found["train"] if "text" in r]
    assert all(merges > LEAST - 12 and 0 < rest <= GO_ON + 12 for merges, rest in shares)
    repeats = len(found["train"]) - len(shares)
    assert 0.1 < repeats / len(found["train"]) < 0.3
    assert max(len(piece_of(row)) for row in found["train"] if "completion" in row) <= 250


def test_the_beginning_merges_and_a_text_that_spells_tags_is_text(tmp_path):
    text = "\\<raw> and <merge> are " * 30
    for share in (0.0, 1.0):
        rows = [{"text": text}, {"text": text[3:]}]
        found = written(tmp_path / str(share), rows, reconstruction=share)
        for row in (row for rows in found.values() for row in rows):
            example = RowFormat().read(row)
            merges = text_of(parse(example.context))
            whole = merges if share else merges + example.answer
            assert whole in text
            assert share == 0.0 or example.answer == merges
            assert example.bare == (share == 0.0)


def test_a_text_without_white_space_is_cut_all_the_same(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(3000))
    found = written(tmp_path, [{"text": text}], sizes={"valid": 0})
    assert len(found["train"]) > 3
    assert all(piece_of(row) in text for row in found["train"])


def test_a_text_that_comes_again_is_one_and_rows_of_squad_have_texts(tmp_path):
    given = [{"context": text, "question": str(i)} for i in range(3) for text in texts(4)]
    found = written(tmp_path, given, sizes={"valid": 0})
    assert len({piece_of(row) for row in found["train"]}) == len(found["train"])


def test_other_seeds_cut_elsewhere(tmp_path):
    rows = [{"text": text} for text in texts(4)]
    one, two = (
        {piece_of(r) for r in written(tmp_path / str(s), rows, seed=s, sizes={"valid": 0})["train"]}
        for s in (1, 2)
    )
    assert one != two


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": 3}], "text is 3, expected text"),
        ([{"title": "x"}], "text is None, expected text"),
        ([{"text": "short"}], "is too small"),
    ],
)
def test_rows_without_a_text_are_refused_by_line(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        written(tmp_path, rows)
    with pytest.raises(SettingsError, match="`max_chars` is 300, expected at least 440"):
        TextTask(max_chars=300)


def test_a_model_is_trained_on_what_the_command_writes(tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "texts"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(20)))
    said = run("data", "text", "--file", file, "--out", out, "--max-chars", 440).err
    assert "go on" in said
    assert "repeat" in said
    assert set(load_examples(str(out))) == {"train", "valid"}
    for k in (2, 4):  # one file of the teacher serves both
        teacher = ("--teacher", "base", "--teacher-top-k", 8, "--teacher-file", tmp_path / "t")
        options = ("--data", out, "--k", k, *teacher, "--iters", 2, "--batch-size", 4)
        trained(tmp_path / f"k{k}", *options)
    refused = run("data", "text", "--file", file, "--out", out, "--repo", "x")
    assert_one_error(refused, 2, "--repo")
