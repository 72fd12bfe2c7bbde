"""The paper's two hub tasks: prompts and labels to the letter, splits that share nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmerge_mlx.data.hub_tasks import AmazonReviews, CommitPackFT
from kmerge_mlx.data.tasks import pair, silent
from kmerge_mlx.errors import DataError, SettingsError

SAMPLES = Path(__file__).parents[1] / "fixtures" / "data"
REVIEWS, COMMITS = SAMPLES / "amazon_reviews.jsonl", SAMPLES / "commitpackft.jsonl"
SMALL = {"test": 8, "valid": 5, "train": 12}
# SHA-256 (its first 12 digits) of the test, train and valid file that release 0.1.0 wrote.
GOLDEN = [
    (AmazonReviews, REVIEWS, 42, {"test": 8, "valid": 5}, "f7fff14f9502 f92db00a168c 6aedaa26ff0f"),
    (AmazonReviews, REVIEWS, 9, SMALL, "63d4cbdd9ec4 4402c71f9b08 c01966b7e82f"),
    (CommitPackFT, COMMITS, 42, {"test": 8, "valid": 5}, "f0986bdab20a 211ff650a057 976091e9e031"),
]


def draw(source, folder, task=AmazonReviews, sizes=SMALL, progress=silent, force=False, **options):
    return task(file=str(source), sizes=sizes, **options).write(folder, force, progress)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def splits(folder: Path) -> dict[str, list[tuple[str, str]]]:
    return {
        path.stem: [(row["prompt"], row["completion"]) for row in rows_of(path)]
        for path in folder.glob("*.jsonl")
    }


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.jsonl"))
    }


def test_the_files_are_those_of_the_first_release_byte_for_byte(tmp_path):
    packed = tmp_path / "rows.jsonl.gz"
    for task, file, seed, sizes, expected in GOLDEN:
        packed.write_bytes(gzip.compress(file.read_bytes()))
        for source in (file, packed):
            draw(source, tmp_path / "data", task, sizes, force=True, seed=seed)
            found = digests(tmp_path / "data").values()
            assert " ".join(digest[:12] for digest in found) == expected


def test_a_review_is_positive_from_three_and_a_half_stars():
    for rating, label in ((4, "positive"), (3.5, "positive"), (3.4, "negative")):
        row = {"text": "Love it", "rating": rating, "title": "Nice"}
        prompt = "Review: Love it, Label:"
        assert AmazonReviews.item(row) == pair(prompt, label, prompt, {"labels": label})


def test_a_review_of_the_five_core_files_is_read_like_one_of_2023(tmp_path):
    named = {"text": "reviewText", "rating": "overall"}
    old = [{named.get(key, key): value for key, value in row.items()} for row in rows_of(REVIEWS)]
    (tmp_path / "Fashion_5.json").write_text("\n".join(map(json.dumps, old)))
    draw(tmp_path / "Fashion_5.json", tmp_path / "old")
    draw(REVIEWS, tmp_path / "new")
    assert digests(tmp_path / "old") == digests(tmp_path / "new")


def test_every_row_written_is_a_row_of_the_file_rightly_labelled(tmp_path):
    summary = draw(REVIEWS, tmp_path / "data")
    labels = {}
    for row in rows_of(REVIEWS):
        label = "negative" if row["rating"] < 3.5 else "positive"
        labels.setdefault(f"Review: {row['text']}, Label:", label)  # the first of its kind
    found = splits(tmp_path / "data")
    assert {split: len(rows) for split, rows in found.items()} == SMALL
    for split, rows in found.items():
        assert all(labels[prompt] == label for prompt, label in rows)
        assert summary["splits"][split]["labels"] == Counter(label for _, label in rows)


def test_examples_in_memory_are_those_of_the_files(tmp_path):
    draw(COMMITS, tmp_path / "data", CommitPackFT)
    found = CommitPackFT(file=str(COMMITS), sizes=SMALL).examples(("test", "valid"))
    for split, examples in found.items():
        rows = splits(tmp_path / "data")[split]
        assert [(e.context, e.answer) for e in examples] == rows
        assert all(e.prompt is None for e in examples)
    assert list(found) == ["test", "valid"]
    assert found["valid"].where(-5) == "commitpackft valid row 1"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)


@given(st.lists(st.tuples(texts, st.integers(1, 5)), min_size=12, max_size=60), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_no_prompt_is_in_two_splits_or_twice_in_one(tmp_path_factory, reviews, seed):
    folder = tmp_path_factory.mktemp("any")
    rows = [json.dumps({"text": text, "rating": rating}) for text, rating in reviews]
    (folder / "raw.jsonl").write_text("\n".join(rows))
    distinct = len({text for text, _ in reviews})
    if distinct < 3:
        return
    sizes = {"test": 1, "valid": 1, "train": distinct - 2}
    summary = draw(folder / "raw.jsonl", folder / "data", sizes=sizes, seed=seed)
    prompts = [prompt for found in splits(folder / "data").values() for prompt, _ in found]
    assert len(prompts) == len(set(prompts)) == distinct
    assert summary["shared_prompts"] == 0
    assert summary["repeated_prompts"] == len(reviews) - distinct


def test_splits_depend_on_neither_the_order_of_the_file_nor_the_size_of_the_others(tmp_path):
    rows = [row for row in COMMITS.read_text().splitlines() if "Wait longer" not in row]
    for name, order in (("one", rows), ("two", sorted(rows))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(order))
        draw(tmp_path / f"{name}.jsonl", tmp_path / name, CommitPackFT)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    draw(tmp_path / "one.jsonl", tmp_path / "large", CommitPackFT, SMALL | {"train": 20})
    small, large = splits(tmp_path / "one"), splits(tmp_path / "large")
    assert (small["test"], small["valid"]) == (large["test"], large["valid"])
    assert large["train"][:12] == small["train"]


def test_rows_without_an_answer_are_counted_and_left_out(tmp_path):
    summary = draw(COMMITS, tmp_path / "data", CommitPackFT, {"test": 5, "valid": 5})
    assert summary["rows_read"] == 40
    assert (summary["rows_without_answer"], summary["repeated_prompts"]) == (1, 1)
    assert sum(split["rows"] for split in summary["splits"].values()) == 38
    assert all(answer for rows in splits(tmp_path / "data").values() for _, answer in rows)


def test_one_row_is_left_to_train_on_where_a_tenth_is_less(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(REVIEWS.read_text().splitlines(keepends=True)[:3]))
    summary = draw(path, tmp_path / "data", sizes={"test": 1, "valid": 1})
    assert [split["rows"] for split in summary["splits"].values()] == [1, 1, 1]


def test_a_bad_row_stops_everything_and_is_named_or_is_counted(tmp_path):
    path, rows = tmp_path / "raw.jsonl", REVIEWS.read_text().splitlines()
    draw(REVIEWS, tmp_path / "plain")
    for line, message in {
        '{"rating": 5}': "text (or reviewText) is None, expected that of a review",
        '{"text": "a", "rating": "five"}': (
            "rating (or overall) is 'five', expected a number from 1 to 5"
        ),
        '{"reviewText": "a", "overall": 9}': "rating (or overall) is 9, expected a number from 1",
        "{": "not JSON",
    }.items():
        path.write_text("\n".join([*rows[:6], line, *rows[6:]]))
        with pytest.raises(DataError, match=re.escape(f"raw.jsonl line 7: {message}")):
            draw(path, tmp_path / "data", force=True)
        summary = draw(path, tmp_path / "data", skip_bad=True, force=True)
        assert summary["bad_lines"] == 1
        assert summary["first_bad"].startswith(f"{path} line 7: {message}")
        assert digests(tmp_path / "data") == digests(tmp_path / "plain")
    found = AmazonReviews(file=str(path), sizes=SMALL, skip_bad=True).examples()
    assert sum(examples.bad for examples in found.values()) == 1
    with pytest.raises(DataError, match="subject is None, expected text"):
        CommitPackFT.item({"old_contents": "", "subject": None, "new_contents": "a"})


def test_more_rows_than_there_are_is_an_error(tmp_path):
    for sizes, message in (
        ({}, "too small: found 37 distinct prompts, .* `test` 50000 .*--test N --valid N"),
        ({"test": 10, "valid": 10, "train": 18}, "`test` 10 and `valid` 10 and `train` 18"),
        ({"test": 37, "valid": 0}, "found 37 distinct prompts"),
        ({"test": 0, "valid": 0, "train": 0}, "all 0: nothing to write"),
    ):
        with pytest.raises((DataError, SettingsError), match=message):
            draw(REVIEWS, tmp_path / "data", sizes=sizes)


def test_a_name_that_is_none_never_reaches_the_hub():
    for name in ("../x", "a b", "Amazon/Fashion"):
        with pytest.raises(DataError, match="expected a name such as Amazon_Fashion"):
            AmazonReviews(category=name).fetch()
        with pytest.raises(DataError, match="expected a name such as python"):
            CommitPackFT(language=name).fetch()
