"""The paper's two hub tasks: prompts and labels to the letter, splits that share nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmerge_mlx.data import amazon_reviews, commitpackft
from kmerge_mlx.data.examples import ExampleFile
from kmerge_mlx.data.sampling import Pair, SplitSizes, write_splits
from kmerge_mlx.errors import DataError

SAMPLES = Path(__file__).parents[1] / "fixtures" / "data"
REVIEWS, COMMITS = SAMPLES / "amazon_reviews.jsonl", SAMPLES / "commitpackft.jsonl"
SMALL = SplitSizes(test=8, valid=5, train=12)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def draw(source: Path, folder: Path, module=amazon_reviews, sizes=SMALL, **options):
    folder.mkdir()
    return write_splits(source, module.pair, sizes, folder, **options)


def splits(folder: Path) -> dict[str, list[tuple[str, str]]]:
    return {
        path.stem: [(row["prompt"], row["completion"]) for row in rows_of(path)]
        for path in folder.iterdir()
    }


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("rating", "label"),
    [(5.0, "positive"), (4, "positive"), (3.5, "positive"), (3.4, "negative"), (3.0, "negative")],
)
def test_a_review_is_positive_from_three_and_a_half_stars(rating, label):
    row = {"text": "Love it", "rating": rating, "title": "Nice"}
    assert amazon_reviews.pair(row) == Pair("Review: Love it, Label:", label, label)


def test_a_commits_prompt_is_the_papers_to_the_letter():
    row = {"old_contents": "a = 1\n", "subject": "Rename a", "new_contents": "b = 1\n"}
    expected = (
        "Update the old python code content based on the instrutions.\n"
        "Old Content: a = 1\n\n"
        "Instructions: Rename a\n"
        "New Content:\n"
    )
    assert commitpackft.pair(row) == Pair(expected, "b = 1\n")


def test_the_papers_sizes_are_the_defaults():
    reviews = amazon_reviews.SIZES.of(2_500_939)  # about what Amazon_Fashion holds
    assert reviews == {"test": 50_000, "valid": 1_000, "train": 244_993}
    assert commitpackft.SIZES.of(56_025) == {"test": 5_600, "valid": 500, "train": 49_925}


def test_every_row_written_is_a_row_of_the_file_rightly_labelled(tmp_path):
    summary = draw(REVIEWS, tmp_path / "data")
    labels = {}
    for row in rows_of(REVIEWS):
        label = "negative" if row["rating"] < 3.5 else "positive"
        labels.setdefault(f"Review: {row['text']}, Label:", label)  # the first of its kind
    found = splits(tmp_path / "data")
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 12,
        "valid": 5,
        "test": 8,
    }
    assert all(labels[prompt] == label for rows in found.values() for prompt, label in rows)
    for split, rows in found.items():
        assert summary["splits"][split]["labels"] == Counter(label for _, label in rows)


def test_every_commit_written_is_a_commit_of_the_file(tmp_path):
    draw(COMMITS, tmp_path / "data", commitpackft)
    known = {(row["subject"], row["new_contents"]) for row in rows_of(COMMITS)}
    for rows in splits(tmp_path / "data").values():
        for prompt, answer in rows:
            subject = prompt.rsplit("Instructions: ", 1)[1].removesuffix("\nNew Content:\n")
            assert (subject, answer) in known


def test_the_splits_read_back_as_examples(tmp_path):
    draw(COMMITS, tmp_path / "data", commitpackft)
    example = ExampleFile(tmp_path / "data" / "train.jsonl")[0]
    assert example.context.startswith("Update the old python code")
    assert example.prompt is None
    assert example.answer


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)


@given(st.lists(st.tuples(texts, st.integers(1, 5)), min_size=12, max_size=60), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_no_prompt_is_in_two_splits_or_twice_in_one(tmp_path_factory, reviews, seed):
    folder = tmp_path_factory.mktemp("any")
    rows = [json.dumps({"text": text, "rating": rating}) for text, rating in reviews]
    (folder / "raw.jsonl").write_text("\n".join(rows))
    distinct = len({text for text, _ in reviews})
    if distinct < 3:
        return
    sizes = SplitSizes(test=1, valid=1, train=distinct - 2)
    summary = draw(folder / "raw.jsonl", folder / "data", sizes=sizes, seed=seed)
    hashes = [
        hashlib.sha256(prompt.encode()).digest()
        for found in splits(folder / "data").values()
        for prompt, _ in found
    ]
    assert len(hashes) == len(set(hashes)) == distinct
    assert summary["shared_prompts"] == 0
    assert summary["repeated_prompts"] == len(reviews) - distinct


def test_the_same_seed_gives_the_same_bytes_plain_or_packed_and_another_seed_others(tmp_path):
    packed = tmp_path / "reviews.jsonl.gz"
    packed.write_bytes(gzip.compress(REVIEWS.read_bytes()))
    draw(REVIEWS, tmp_path / "one")
    draw(packed, tmp_path / "two")
    draw(REVIEWS, tmp_path / "three", seed=43)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert digests(tmp_path / "one")["test.jsonl"] != digests(tmp_path / "three")["test.jsonl"]


def test_the_draw_does_not_depend_on_the_order_of_the_file(tmp_path):
    rows = [row for row in COMMITS.read_text().splitlines() if "Wait longer" not in row]
    random.Random(1).shuffle(rows)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(rows))
    (tmp_path / "sorted.jsonl").write_text("\n".join(sorted(rows)))
    for name in ("shuffled", "sorted"):
        draw(tmp_path / f"{name}.jsonl", tmp_path / name, commitpackft)
    assert digests(tmp_path / "shuffled") == digests(tmp_path / "sorted")


def test_a_larger_training_set_leaves_the_other_splits_alone_and_holds_the_smaller(tmp_path):
    draw(REVIEWS, tmp_path / "small")
    draw(REVIEWS, tmp_path / "large", sizes=replace(SMALL, train=20))
    small, large = splits(tmp_path / "small"), splits(tmp_path / "large")
    assert (small["test"], small["valid"]) == (large["test"], large["valid"])
    assert large["train"][:12] == small["train"]


def test_rows_are_written_in_random_order_not_in_that_of_the_file(tmp_path):
    rows = [json.dumps({"text": str(i), "rating": 5}) for i in range(300)]
    (tmp_path / "raw.jsonl").write_text("\n".join(rows))
    draw(tmp_path / "raw.jsonl", tmp_path / "data", sizes=SplitSizes(100, 100, 100))
    for found in splits(tmp_path / "data").values():
        order = [int(prompt.split()[1].rstrip(",")) for prompt, _ in found]
        rising = sum(a < b for a, b in pairwise(order))
        assert 30 < rising < 70


def test_rows_without_an_answer_are_counted_and_left_out(tmp_path):
    summary = draw(COMMITS, tmp_path / "data", commitpackft, SplitSizes(5, 5))
    assert summary["rows_read"] == 40
    assert (summary["rows_without_answer"], summary["repeated_prompts"]) == (1, 1)
    assert sum(split["rows"] for split in summary["splits"].values()) == 38
    assert all(answer for rows in splits(tmp_path / "data").values() for _, answer in rows)


BAD = {
    "no text": ('{"rating": 5}', "text is None, expected the text of a review"),
    "no rating": ('{"text": "a"}', "rating is None, expected a number"),
    "a rating in words": ('{"text": "a", "rating": "five"}', "rating is 'five', expected a number"),
    "no JSON": ("{", "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_everything_and_is_named_or_is_counted(tmp_path, name):
    line, message = BAD[name]
    path = tmp_path / "raw.jsonl"
    rows = REVIEWS.read_text().splitlines()
    path.write_text("\n".join([*rows[:6], line, *rows[6:]]))
    with pytest.raises(DataError, match=f"raw.jsonl line 7: {message}"):
        draw(path, tmp_path / "stopped")
    summary = draw(path, tmp_path / "skipped", skip_bad=True)
    assert summary["bad_lines"] == 1
    assert summary["first_bad"].startswith(f"{path} line 7: {message}")
    draw(REVIEWS, tmp_path / "plain")
    assert digests(tmp_path / "skipped") == digests(tmp_path / "plain")


def test_a_commit_without_its_texts_is_named():
    row = {"old_contents": "", "subject": None, "new_contents": "a"}
    with pytest.raises(DataError, match="subject is None, expected text"):
        commitpackft.pair(row)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (amazon_reviews.SIZES, "found 37 distinct prompts, expected more than --test 50000"),
        (SplitSizes(10, 10, 18), "--test 10 and --valid 10 and --train 18"),
        (SplitSizes(37, 0), "found 37 distinct prompts"),
        (SplitSizes(0, 0, 0), "all 0: nothing to write"),
    ],
)
def test_more_rows_than_there_are_is_an_error(tmp_path, sizes, message):
    with pytest.raises(DataError, match=message):
        draw(REVIEWS, tmp_path / "data", sizes=sizes)


@pytest.mark.parametrize("sizes", [{"test": -1}, {"train": 1.5}, {"train_share": 0}])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(DataError, match="expected"):
        SplitSizes(**({"test": 1, "valid": 1} | sizes))


def test_a_split_of_no_rows_leaves_no_file(tmp_path):
    draw(REVIEWS, tmp_path / "data", sizes=SplitSizes(5, 0, 0))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["test.jsonl"]


def test_memory_goes_with_the_rows_not_with_the_file(tmp_path):
    row = json.dumps({"text": "x" * 20_000, "rating": 5, "n": 0})
    with (tmp_path / "raw.jsonl").open("w") as file:
        for i in range(1500):  # 30 MB
            file.write(row.replace("xx", f"{i:04d}", 1) + "\n")
    sizes, progress = SplitSizes(100, 100, 1000), []
    tracemalloc.start()
    draw(
        tmp_path / "raw.jsonl",
        tmp_path / "data",
        sizes=sizes,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    done, totals = zip(*progress, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}


@pytest.mark.parametrize("name", ["", "../x", "a b", "Amazon/Fashion"])
def test_a_name_that_is_none_never_reaches_the_hub(name):
    with pytest.raises(DataError, match="expected a name such as Amazon_Fashion"):
        amazon_reviews.fetch(name)
    with pytest.raises(DataError, match="expected a name such as python"):
        commitpackft.fetch(name)


@pytest.mark.parametrize(("path", "keys"), [(REVIEWS, 10), (COMMITS, 10)])
def test_the_samples_have_the_schema_of_the_data_sets(path, keys):
    rows = rows_of(path)
    assert len(rows) == 40
    assert {len(row) for row in rows} == {keys}
