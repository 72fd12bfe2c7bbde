"""``kmerge-mlx evaluate`` as a person, and a script, meet it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kmerge_mlx.cli import output
from kmerge_mlx.evaluation import run as session
from tests.cli_runner import Result, assert_one_error, no_room, run
from tests.conftest import UPSTREAM
from tests.data.test_tasks import REVIEWS
from tests.evaluations import Folders, labelled, questions_of, words_of, write_data, write_folders

TRUTH = ["true", "false", "true", "true", "false", "true", "true", "false"]
QUICK = ("--max-tokens", 1, "--timed", 0)
BASE = ("--model", UPSTREAM / "base")
TREES = ("--task", "textualized-tree")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return write_folders(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    """Questions to which labels are the answers."""
    return write_data(tmp_path_factory.mktemp("a") / "truths", labelled(TRUTH))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Questions to which texts are the answers."""
    return write_data(tmp_path_factory.mktemp("a") / "my texts", questions_of(8))


def evaluated(folders: Folders, *args: object, **more: object) -> Result:
    """Runs it, and expects it to succeed."""
    result = run("evaluate", *folders.flags(), *args, *QUICK, **more)
    assert result.code == 0, result.err
    return result


def cells(table: str) -> list[list[str]]:
    """The cells of a table's lines, its title left out."""
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()[1:]]


def test_a_yaml_file_and_printed_settings_are_taken(tmp_path, folders, truth):
    file = tmp_path / "config.yaml"
    file.write_text(f"data: {truth}\nk: [2, 4]\nbaseline: [mean]\nmax_tokens: 1\n")
    given = ("evaluate", *folders.flags(), "-c", file)
    result = run(*given, "--json")
    assert [row["label"] for row in json.loads(result.out)["rows"]] == [
        *("K=2", "mean of 2", "K=4", "mean of 4"),
    ]
    file.write_text(run(*given, "--k", 4, "--print-config").out)
    again = run("evaluate", "-c", file, "--json")
    assert [row["k"] for row in json.loads(again.out)["rows"]] == [4, 4]


def test_json_is_one_object_with_everything(folders, truth):
    result = evaluated(folders, "--data", truth, "--baseline", "stride", "--json")
    assert result.out.count("\n") == 1
    assert result.err == f"Model: {folders.base} with {folders.adapters}\n"
    report = json.loads(result.out)
    assert set(report) == {
        *("kmerge_mlx", "device", "settings", "layout", "bad_rows", "groups", "rows"),
    }
    assert report["groups"] == {"truths": {"questions": 8, "labels": ["true", "false"]}}
    layout = {"merges": "contexts", "threshold": 32, "chat_template": False}
    assert (report["layout"], report["bad_rows"]) == (layout, 0)
    settings = report["settings"]
    assert (settings["data"], settings["batch_size"], settings["task"]) == (str(truth), 32, None)
    assert "predictions" not in settings
    assert [(row["method"], row["k"]) for row in report["rows"]] == [
        *(("uncompressed", 1), ("merged", 2), ("stride", 2), ("merged", 4), ("stride", 4)),
    ]
    for row in report["rows"]:
        assert row["compression_ratio"] == row["prompt_tokens"] / row["positions"]
        scores = row["scores"]["truths"]
        assert set(scores) == {
            *("accuracy", "balanced_accuracy", "f1", "f1_macro", "perplexity"),
            *("majority_accuracy", "majority_balanced_accuracy"),
        }
        for name, score in scores.items():
            if name.startswith("majority"):
                assert set(score) == {"value"}
            else:
                assert score["low"] <= score["high"]
        assert scores["majority_accuracy"]["value"] == 5 / 8


def test_the_table_has_a_line_for_each_method_and_the_majority_above(folders, truth):
    given = ("evaluate", *folders.flags(), "--data", truth, "--k", 4, "--baseline", "all")
    result = run(*given, "--max-tokens", 1, "--timed", 2)
    assert result.code == 0, result.err
    title, *_ = lines = result.out.splitlines()
    said = "truths: 8 questions (always the most frequent answer: 62.50%, balanced 50.00%)"
    assert title == said
    assert len({len(line) for line in lines[1:]}) == 1
    heads, *rows = cells(result.out)
    assert heads == [
        *("ratio", "KV cache", "TTFT", "balanced accuracy", "accuracy", "F1 (true)", "F1 macro"),
        "perplexity",
    ]
    assert [row[0] for row in rows] == [
        *("K=1 adapter", "base without adapter", "K=4", "mean of 4", "last 1/4 of the tokens"),
        *("one token in 4", "selective context to 1/4", "speculative prefill to 1/4"),
    ]
    assert [row[1:3] for row in rows] == [rows[0][1:3]] * 2 + [rows[2][1:3]] * 6
    share = r"\d+\.\d\d% \(\d+\.\d-\d+\.\d\)"
    number = r"[\d.,]+"
    for row in rows:
        assert re.fullmatch(rf"{number} ms \({number}-{number}\)", row[3])
        assert all(re.fullmatch(share, cell) for cell in row[4:8])
        assert re.fullmatch(rf"{number} \({number}-{number}\)", row[8])


def test_without_answers_the_table_has_perplexity_alone(folders, truth):
    given = ("evaluate", *folders.flags(), "--data", truth, "--k", 4)
    result = run(*given, "--max-tokens", 0, "--timed", 0)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "truths: 8 questions"
    assert cells(result.out)[0] == ["ratio", "KV cache", "perplexity"]


def test_everything_but_the_report_goes_to_stderr(tmp_path, monkeypatch, folders):
    data = write_data(tmp_path / "data", [*map(json.dumps, labelled(TRUTH)), "{"])
    plain = session.reader

    def chatty(*args):
        print("[WARNING] this model is large")
        return plain(*args)

    monkeypatch.setattr(session, "reader", chatty)
    result = evaluated(folders, "--data", data, "--k", 4, "--skip-bad", "--json")
    assert json.loads(result.out)["bad_rows"] == 1
    model = f"Model: {folders.base} with {folders.adapters}\n"
    assert result.err == f"[WARNING] this model is large\n{model}note: 1 bad row was left out\n"


def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(
    monkeypatch, folders, truth
):
    given = ("--data", truth, "--k", 4, "--baseline", "uncompressed", "--batch-size", 4)
    shown = evaluated(folders, *given, terminal=True).err
    assert "Evaluating:" in shown
    assert "\r" in shown
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0)
    lines = evaluated(folders, *given).err.splitlines()
    counts = [line for line in lines if line.startswith("Evaluating")]
    assert counts[:4] == [f"Evaluating: {done} of 16" for done in (4, 8, 12, 16)]


def test_texts_have_other_scores_and_trees_a_table_and_a_panel_for_each_kind(
    tmp_path, folders, texts
):
    picture = tmp_path / "pareto.svg"
    table = evaluated(folders, "--data", texts, "--plot", picture).out
    heads = ["ratio", "KV cache", "exact match", "edit similarity", "perplexity"]
    assert cells(table)[0] == heads
    assert words_of(picture) >= {
        *("my texts: exact match", "my texts: edit similarity", "my texts: perplexity")
    }
    trees = (*TREES, "--num-trees", 3, "--stage", "small", "--k", 4, "--plot", picture)
    one, two = evaluated(folders, *trees).out.split("\n\n")
    assert one.startswith("relationship: 6 questions (always the most frequent answer: 50.00%")
    assert two.startswith("find parent: 3 questions\n")
    assert words_of(picture) >= {
        *("relationship: balanced accuracy", "majority answer", "find parent: exact match", "K=4"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["pareto.svg"]


def test_a_picture_that_cannot_be_written_does_not_lose_the_report(
    tmp_path, folders, truth, monkeypatch
):
    no_room(monkeypatch)
    flags = ("evaluate", *folders.flags(), "--data", truth, "--k", 4, *QUICK, "--json")
    result = run(*flags, "--plot", tmp_path / "pareto.png")
    assert (result.code, len(json.loads(result.out)["rows"])) == (1, 1)
    assert "error: cannot write --plot" in result.err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 2, "no data: give --data, or --task (textualized-tree, amazon-reviews, commitpackft"),
        (("--data", "x", *TREES), 2, "found both --data and --task, expected one of them"),
        ((*TREES, "--baseline", "best"), 2, "--baseline is 'best', expected one of uncompressed"),
        ((*TREES, "--k", 4), 1, "--k is 4, and there is no merge encoder: give --adapter-path"),
        ((*TREES, "--baseline", "mean"), 1, "--baseline mean has the budget of merging: give --k"),
        ((*TREES, "--limit", 3), 2, "--limit is not an option of textualized-tree"),
        (("--data", "x", "--labels", "a,b,a"), 2, "expected different texts"),
        (("--task", "recall", "--length", 9), 1, "--length is 9, and a needle and its question"),
        (
            ("--task", "amazon-reviews", "--file", REVIEWS, "--category", "Books"),
            *(2, "--category and --language name data of the hub, and there is a --file"),
        ),
        ((*TREES, "--model", "no/base"), 1, "no/base is not a folder here"),
        ((*TREES, "--plot", "x.txt"), 1, "--plot is x.txt, expected a name that ends with .png"),
        (
            (*TREES, "--plot", "x.png", "--predictions", "./x.png"),
            *(2, "--plot and --predictions are the same file"),
        ),
        ((*TREES, "--num-trees", 2, "--predictions", "."), 1, "--predictions . is not a file"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_loaded(tmp_path, monkeypatch, args, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "reader", None)
    assert_one_error(run("evaluate", *BASE, *args), code, said)
    assert list(tmp_path.iterdir()) == []


def test_each_k_that_is_given_is_measured_once_or_refused(folders, truth):
    def ks(*args: object) -> list[int]:
        rows = json.loads(evaluated(folders, "--data", truth, *args, "--json").out)["rows"]
        return [row["k"] for row in rows]

    assert ks("--k", 4, "--k", 2, "--k", 4) == [2, 4]
    assert ks("--k", 1) == [1]
    result = run("evaluate", *folders.flags(), "--data", truth, "--k", 4, "--k", 3)
    assert_one_error(result, 1, "holds no adapter for --k 3: it has K = 1, 2, 4")
