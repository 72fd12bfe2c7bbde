"""Questions on a text: SQuAD's files and rows, splits by article, what is left out or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kmerge_mlx.data import questions
from kmerge_mlx.data.questions import QuestionTask
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.errors import DataError, SettingsError

Row = dict[str, object]
NORMANDY = "The Normans gave their name to Normandy, a region in France."


def article(number: int, paragraphs: int = 2, asked: int = 3) -> Row:
    """An article as SQuAD has it; the last question of each paragraph has no answer."""
    return {
        "title": f"Article {number}",
        "paragraphs": [
            {
                "context": f"Text {number}.{part}",
                "qas": [
                    {
                        "id": f"{number}.{part}.{i}",
                        "question": f"What is {number}.{part}.{i}?",
                        "is_impossible": i + 1 == asked,
                        "answers": []
                        if i + 1 == asked
                        else [
                            {"text": answer, "answer_start": 0} for answer in ("b", f"a {i}", "b")
                        ],
                    }
                    for i in range(asked)
                ],
            }
            for part in range(paragraphs)
        ],
    }


def write(path: Path, content: object) -> str:
    """Writes rows as lines, an object as JSON, and either compressed by the name."""
    text = "\n".join(map(json.dumps, content)) if isinstance(content, list) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def rows_of(folder: Path) -> dict[str, list[Row]]:
    return {p.stem: [json.loads(r) for r in p.open()] for p in folder.glob("*.jsonl")}


def rows(count: int, **more: object) -> list[Row]:
    return [
        {"context": f"Text {i // 3}", "question": f"Question {i}", "answers": [f"{i}"]} | more
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["dev-v2.0.json", "dev.json.gz"])
def test_squads_file_gives_its_questions_and_counts_those_without_an_answer(tmp_path, name):
    data = {"version": "v2.0", "data": [article(i) for i in range(10)]}
    file = write(tmp_path / name, data)
    summary = QuestionTask(file=file, sizes={"test": 4, "valid": 4}).write(tmp_path / "out")
    assert (summary["rows_read"], summary["rows_without_answer"]) == (60, 20)
    assert summary["shared_articles"] == 0
    found = rows_of(tmp_path / "out")
    assert {split: len(rows) for split, rows in found.items()} == {
        "test": 4,
        "valid": 4,
        "train": 32,
    }
    asked = {
        question["question"]: (text["title"], paragraph["context"])
        for text in data["data"]
        for paragraph in text["paragraphs"]
        for question in paragraph["qas"]
    }
    for row in [row for rows in found.values() for row in rows]:
        assert (row["title"], row["context"]) == asked[row["question"]]
        assert row["answers"] == ["b", f"a {row['question'][-2]}"]  # each once, in their order


def test_lines_of_context_question_and_answers_are_read_like_the_file(tmp_path):
    data = [article(i) for i in range(10)]
    lines = [
        question | {"title": text["title"], "context": paragraph["context"]}
        for text in data
        for paragraph in text["paragraphs"]
        for question in paragraph["qas"]
    ]
    QuestionTask(file=write(tmp_path / "a.json", {"data": data})).write(tmp_path / "json")
    QuestionTask(file=write(tmp_path / "a.jsonl.gz", lines)).write(tmp_path / "lines")
    assert rows_of(tmp_path / "lines") == rows_of(tmp_path / "json")


def test_no_article_is_in_two_splits_nor_a_text_where_none_is_named(tmp_path):
    for number, (content, key) in enumerate(
        (
            (rows(90), "context"),
            ([row | {"title": f"Title {i % 7}"} for i, row in enumerate(rows(90))], "title"),
        )
    ):
        task = QuestionTask(file=write(tmp_path / f"{number}.jsonl", content))
        task.write(tmp_path / f"{number}")
        found = rows_of(tmp_path / f"{number}")
        units = {split: {row[key] for row in rows} for split, rows in found.items()}
        everything = [unit for split in units.values() for unit in split]
        assert len(everything) == len(set(everything)) == len({row[key] for row in content})
        sizes = {split: len(rows) for split, rows in found.items()}
        assert sum(sizes.values()) == 90
        assert sizes["test"] >= 9
        assert sizes["valid"] >= 4  # 5% of 90, and what else its articles have


def test_a_question_that_is_asked_twice_about_one_text_counts_once(tmp_path):
    content = [*rows(60), *rows(60, answers=["another"])]
    summary = QuestionTask(file=write(tmp_path / "a.jsonl", content)).write(tmp_path / "out")
    assert summary["repeated_prompts"] == 60
    assert all(row["answers"] != ["another"] for row in rows_of(tmp_path / "out")["train"])


def test_what_is_written_is_read_as_it_was_drawn(tmp_path):
    task = QuestionTask(file=write(tmp_path / "a.jsonl", rows(60)))
    task.write(tmp_path / "out")
    folder, memory = load_examples(tmp_path / "out"), task.examples()
    assert {s: [*e] for s, e in folder.items()} == {s: [*e] for s, e in memory.items()}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"context": None}, "context is None, expected text"),
        ({"question": 5}, "question is 5, expected text"),
        ({"answers": "France"}, "answers is 'France', expected a list of texts"),
        ({"answers": [5]}, r"answers is \[5\], expected a list of texts"),
        ({"title": 7}, "title is 7, expected text"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path, row, said):
    good = {"context": NORMANDY, "question": "Where?", "answers": ["France"]}
    paragraph = {"context": NORMANDY, "qas": [good, good | row]}
    squad = {"data": [{"title": row.get("title"), "paragraphs": [paragraph]}]}
    files = {"line 61": write(tmp_path / "a.jsonl", [*rows(60), good | row])}
    if not {"context", "title"} & row.keys():  # of a whole paragraph or article
        files["question 2"] = write(tmp_path / "a.json", squad)
    for place, file in files.items():
        with pytest.raises(DataError, match=f"{Path(file).name} {place}: {said}"):
            QuestionTask(file=file).examples()
    assert QuestionTask(file=files["line 61"], skip_bad=True).examples()["train"].bad == 1


def test_a_file_that_is_not_squads_is_refused(tmp_path, monkeypatch):
    for content, said in (
        ({"data": {}}, r"\(data is {}, expected a list\); rows of context, question and answers"),
        ({"data": [5]}, "paragraphs is None, expected a list"),
        ({"data": [{"paragraphs": [5]}]}, "qas is None, expected a list"),
        (rows(2), "not JSON: Extra data"),
    ):
        with pytest.raises(DataError, match=rf"a.json is not a file of SQuAD .*{said}"):
            QuestionTask(file=write(tmp_path / "a.json", content)).examples()
    monkeypatch.setattr(questions, "MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match="write its questions as JSONL"):
        QuestionTask(file=write(tmp_path / "a.json", {"data": [article(0)]})).examples()
    with pytest.raises(SettingsError, match="qa needs a `file`"):
        QuestionTask().examples()
