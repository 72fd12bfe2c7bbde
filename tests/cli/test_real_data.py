"""Questions on texts and the commits of a repository, from their source to a score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli_runner import CHATML, assert_one_error, copy_base, run
from tests.conftest import UPSTREAM
from tests.data.test_git_history import history
from tests.data.test_questions import article, write
from tests.evaluations import words_of
from tests.train_runs import trained

pytestmark = pytest.mark.slow

FEW = ("--iters", 2, "--batch-size", 2, "--val-batches", 1, "--k", 2, "--encoder-factor", 0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return copy_base(UPSTREAM / "base", tmp_path_factory.mktemp("chatty") / "base", CHATML)


@pytest.fixture
def squad(tmp_path) -> str:
    return write(tmp_path / "squad.json", {"data": [article(i) for i in range(12)]})


def test_a_folder_of_questions_is_written_and_says_what_was_left_out(tmp_path, squad):
    result = run("data", "qa", "--file", squad, "--out", tmp_path / "qa", "--test", 6)
    assert (result.code, result.out) == (0, "")
    assert "read   72 rows, 0 with the prompt of another, 24 without an answer" in result.err
    assert "  test   6 rows, 2 distinct articles" in result.err
    assert result.err.endswith("articles in more than one split: 0\n")


def test_questions_are_trained_on_and_scored_as_squad_does(tmp_path, base, squad):
    run("data", "qa", "--file", squad, "--out", tmp_path / "qa")
    for name, source in (
        ("task", ("--task", "qa", "--file", squad)),
        ("data", ("--data", tmp_path / "qa")),
    ):
        result = trained(tmp_path / name, *source, *FEW, model=base)
        assert "Data: qa, 36 examples, 4 to validate" in result.err
        args = ("evaluate", "--adapter-path", tmp_path / name, *source, "--max-tokens", 3)
        result = run(*args, "--json", "--plot", tmp_path / f"{name}.svg")
        assert result.code == 0, result.err
        report = json.loads(result.out)
        (group,) = report["groups"]
        scores = report["rows"][0]["scores"][group]
        assert report["groups"][group] == {"questions": 8}
        assert scores.keys() == {"token_f1", "exact_match", "perplexity"}
        assert scores["token_f1"].keys() == {"value", "low", "high"}
        assert f"{group}: token F1" in words_of(tmp_path / f"{name}.svg")
    result = run(*args, "--limit", 2)
    assert [line.split() for line in result.out.splitlines()[:2]] == [
        ["qa:", "2", "questions"],
        ["ratio", "KV", "cache", "TTFT", "token", "F1", "exact", "match", "perplexity"],
    ]


def test_the_commits_of_a_repository_are_trained_on_and_scored(tmp_path, base):
    repos = [part for name in ("one", "two") for part in ("--repo", history(tmp_path / name).path)]
    edits = tmp_path / "edits"
    result = run("data", "commits", *repos, "--out", edits, "--language", "python", "--test", 5)
    assert (result.code, result.out) == (0, ""), result.err
    assert "  test   5 rows, 2 distinct files\n         languages: python 5" in result.err
    assert result.err.endswith("files in more than one split: 0\n")
    again = ("data", "commits", *repos, "--out", edits, "--force")
    summary = json.loads(run(*again, "--max-chars", 14, "--json").out)
    assert summary["rows_read"] == 48
    assert_one_error(
        run(*again, "--max-chars", 13),
        1,
        "found 0 distinct files (48 rows were too long or not text), expected more than",
    )
    result = trained(tmp_path / "run", "--data", edits, *FEW, model=base)
    args = ("--data", edits, "--limit", 2, "--max-tokens", 2, "--json")
    report = json.loads(run("evaluate", "--adapter-path", tmp_path / "run", *args).out)
    assert report["rows"][0]["scores"]["edits"].keys() == {
        *("exact_match", "edit_similarity", "perplexity")
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("data qa --out x", "qa needs a --file"),
        ("data commits --out x", "commits needs a --repo"),
        ("data qa --file x --repo .", "--repo is not an option of qa"),
        ("data commits --repo . --file x", "--file is not an option of commits"),
        ("data commits --repo . --language cobol", "--language is 'cobol', expected one of c, c#"),
        ("data commits --repo . --max-chars 0", ""),
        ("evaluate --task qa", "qa needs a --file"),
        ("evaluate --task qa --category x", "--category is not an option of qa"),
        ("evaluate --task commits", "--task is 'commits', expected one of textualized-tree"),
    ],
)
def test_options_that_do_not_belong_or_are_missing_are_usage_errors(tmp_path, args, message):
    command, *rest = args.split()
    out = ("--out", tmp_path / "out") if command == "data" and "--out" not in rest else ()
    assert_one_error(run(command, *rest, *out), 2, message)
    assert not list(tmp_path.iterdir())
