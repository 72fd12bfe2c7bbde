"""``kmerge-mlx evaluate`` as a person, and a script, meet it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kmerge_mlx.cli import evaluated as cli_evaluated
from kmerge_mlx.cli import progress
from kmerge_mlx.evaluation import run as session
from kmerge_mlx.plots import common
from kmerge_mlx.plots.quality import QualityPanel
from tests.cli_runner import Result, assert_one_error, environment, no_room, run
from tests.conftest import UPSTREAM
from tests.data.test_reviews_and_commits import REVIEWS
from tests.evaluations import Folders, labelled, questions_of, write_data, write_folders
from tests.plots.test_plots import words_of

TRUTH = ["true", "false", "true", "true", "false", "true", "true", "false"]
QUICK = ("--max-tokens", 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return write_folders(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    """Questions to which labels are the answers."""
    return write_data(tmp_path_factory.mktemp("truth"), labelled(TRUTH))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Questions to which texts are the answers."""
    return write_data(tmp_path_factory.mktemp("texts"), questions_of(8))


def evaluated(folders: Folders, *args: object, **more: object) -> Result:
    """Runs it, and expects it to succeed."""
    result = run("evaluate", *folders.flags(), *args, *QUICK, **more)
    assert result.code == 0, result.err
    return result


def cells(table: str) -> list[list[str]]:
    """The cells of a table's lines, its title left out."""
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()[1:]]


def test_help_is_quick_and_names_every_option():
    code = (
        "import sys\n"
        "sys.argv = ['kmerge-mlx', 'evaluate', '--help']\n"
        "from kmerge_mlx.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--k", "--baseline", "--data", "--task", "--predictions", "--json", "--plot"):
        assert f" {option}" in done.stdout
    assert "512 and 2048 (text); 32 and 52 (tree)" in " ".join(done.stdout.split())


def test_the_examples_of_the_help_are_command_lines_it_takes(tmp_path, monkeypatch, adapter_path):
    taken = []

    def measure(config, bar):
        taken.append(config)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("A").symlink_to(adapter_path)
    monkeypatch.setattr(session, "evaluate", measure)
    examples = run("evaluate", "--help").out.split("Examples:\n")[1].split("\n\n")[0].splitlines()
    for example in examples:
        program, *args = shlex.split(example)
        assert (program, run(*args).code) == ("kmerge-mlx", 130)
    base = str(UPSTREAM / "base")
    assert [config.model for config in taken] == ["bundled", base, base]
    assert taken[0].baselines == ("uncompressed", "mean", "truncate", "stride")


def test_json_is_one_object_with_everything(folders, truth):
    result = evaluated(folders, "--data", truth, "--baseline", "stride", "--json")
    assert result.out.count("\n") == 1
    assert result.err == ""
    report = json.loads(result.out)
    assert set(report) == {
        *("kmerge_mlx", "device", "settings", "layout", "bad_rows", "groups", "rows"),
    }
    assert report["groups"] == {"data": {"questions": 8, "labels": ["true", "false"]}}
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
        scores = row["scores"]["data"]
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
    result = evaluated(folders, "--data", truth, "--k", 4, "--baseline", "all")
    title, *_ = lines = result.out.splitlines()
    assert title == ("data: 8 questions (always the most frequent answer: 62.50%, balanced 50.00%)")
    assert len({len(line) for line in lines[1:]}) == 1
    heads, *rows = cells(result.out)
    assert heads == [
        *("ratio", "balanced accuracy", "accuracy", "F1 (true)", "F1 macro", "perplexity"),
    ]
    assert [row[:2] for row in rows] == [
        *(["uncompressed", "1.00x"], ["K=4", rows[1][1]], ["mean of 4", rows[1][1]]),
        *(["last 1/4 of the tokens", rows[1][1]], ["one token in 4", rows[1][1]]),
    ]
    share = r"\d+\.\d\d% \(\d+\.\d-\d+\.\d\)"
    number = r"[\d.e+]+"
    for row in rows:
        assert all(re.fullmatch(share, cell) for cell in row[2:6])
        assert re.fullmatch(rf"{number} \({number}-{number}\)", row[6])


def test_texts_have_other_scores_and_trees_a_table_for_each_kind(folders, texts):
    assert cells(evaluated(folders, "--data", texts, "--k", 4).out)[0] == [
        *("ratio", "exact match", "edit similarity", "perplexity"),
    ]
    trees = ("--task", "textualized-tree", "--num-trees", 3, "--stage", "small", "--k", 4)
    one, two = evaluated(folders, *trees).out.split("\n\n")
    assert one.startswith("relationship: 6 questions (always the most frequent answer: 50.00%")
    assert two.startswith("find parent: 3 questions\n")


def test_everything_but_the_report_goes_to_stderr(tmp_path, monkeypatch, folders):
    data = write_data(tmp_path / "data", [*map(json.dumps, labelled(TRUTH)), "{"])
    plain = session.reader

    def chatty(*args):
        print("[WARNING] this model is large")
        return plain(*args)

    monkeypatch.setattr(session, "reader", chatty)
    result = evaluated(folders, "--data", data, "--k", 4, "--skip-bad", "--json")
    assert json.loads(result.out)["bad_rows"] == 1
    assert result.err == "[WARNING] this model is large\nnote: 1 bad row was left out\n"


def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(
    monkeypatch, folders, truth
):
    given = ("--data", truth, "--k", 4, "--baseline", "uncompressed", "--batch-size", 4)
    assert evaluated(folders, *given).err == ""
    shown = evaluated(folders, *given, terminal=True).err
    assert "Evaluating:" in shown
    assert "\r" in shown
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    lines = evaluated(folders, *given).err.splitlines()
    counts = [line for line in lines if line.startswith("Evaluating")]
    assert counts[:4] == [f"Evaluating: {done} of 16" for done in (4, 8, 12, 16)]
    assert [line for line in lines if line.startswith("Tokenizing")][-1] == "Tokenizing: 8 of 8"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("truth", {"data: balanced accuracy", "majority answer", "merged", "uncompressed"}),
        ("texts", {"data: exact match", "data: edit similarity", "data: perplexity", "merged"}),
        ("trees", {"relationship: balanced accuracy", "find parent: exact match"}),
    ],
)
def test_the_picture_shows_what_stands_for_each_group(tmp_path, request, folders, given, words):
    picture = tmp_path / "pareto.svg"
    data = (
        ("--task", "textualized-tree", "--num-trees", 4, "--stage", "small")
        if given == "trees"
        else ("--data", request.getfixturevalue(given))
    )
    result = evaluated(folders, *data, "--plot", picture, "--json")
    assert len(json.loads(result.out)["rows"]) == 3
    assert words_of(picture) >= words
    assert [path.name for path in tmp_path.iterdir()] == ["pareto.svg"]


def test_the_picture_is_told_what_each_score_is(tmp_path, monkeypatch, folders, truth, texts):
    drawn: dict[str, QualityPanel] = {}

    def draw(panels, path):
        drawn.update({panel.measure: panel for panel in panels})

    monkeypatch.setattr(cli_evaluated, "draw_quality", draw)
    for data in (truth, texts):
        evaluated(folders, "--data", data, "--baseline", "mean", "--plot", "x.png")
    assert {name: (p.is_share, p.higher_is_better, p.baseline) for name, p in drawn.items()} == {
        "data: balanced accuracy": (True, True, 0.5),
        "data: exact match": (True, True, None),
        "data: edit similarity": (True, True, None),
        "data: perplexity": (False, False, None),
    }
    points = drawn["data: perplexity"].points
    assert [(point.label, point.method) for point in points] == [
        *(("uncompressed", "uncompressed"), ("K=2", "merged"), ("mean of 2", "mean of K")),
        *(("K=4", "merged"), ("mean of 4", "mean of K")),
    ]
    assert all(point.interval.low <= point.value <= point.interval.high for point in points)
    assert points[0].ratio == 1 < points[1].ratio == points[2].ratio < points[3].ratio


def test_a_picture_that_cannot_be_written_does_not_lose_the_report(
    tmp_path, folders, truth, monkeypatch
):
    no_room(monkeypatch)
    flags = ("evaluate", *folders.flags(), "--data", truth, "--k", 4, *QUICK, "--json")
    result = run(*flags, "--plot", tmp_path / "pareto.png")
    assert (result.code, len(json.loads(result.out)["rows"])) == (1, 1)
    assert "error: cannot write --plot" in result.err


BASE = ("--model", UPSTREAM / "base")
TREES = ("--task", "textualized-tree")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 1, "no data: give --data, or --task (textualized-tree, amazon-reviews, commitpackft"),
        (("--data", "x", *TREES), 1, "found both --data and --task, expected one of them"),
        (("--data", "no/data"), 1, "no/data is no folder here"),
        (("--data", "."), 1, "holds no test.jsonl"),
        (("--task", "poetry"), 2, "'poetry' is not one of"),
        ((*TREES, "--stage", "huge"), 2, "'huge' is not one of"),
        ((*TREES, "--baseline", "best"), 2, "'best' is not one of"),
        ((*TREES, "--split", "train"), 2, "'train' is not one of"),
        ((*TREES, "--k", 0), 2, "--k"),
        ((*TREES, "--k", 4), 1, "--k above 1 needs --adapter-path"),
        ((*TREES, "--baseline", "mean"), 1, "--baseline mean has the budget of merging: give --k"),
        ((*TREES, "--num-trees", 0), 2, "--num-trees"),
        ((*TREES, "--find-parent", -1), 2, "--find-parent"),
        ((*TREES, "--batch-size", 0), 2, "--batch-size"),
        ((*TREES, "--max-tokens", 0), 2, "--max-tokens"),
        ((*TREES, "--positive", "AB"), 1, "--positive is AB, expected one of true, false"),
        ((*TREES, "--limit", 3), 2, "textualized-tree has no such option"),
        ((*TREES, "--labels", "true,false"), 2, "textualized-tree has no such option"),
        ((*TREES, "--depth", 0.5), 2, "textualized-tree has no such option"),
        (("--data", "x", "--stage", "small"), 2, "--stage: --data has no such option"),
        (("--data", "x", "--data-seed", 1), 2, "--data has no such option"),
        (("--data", "x", "--labels", "a,b,a"), 1, "--labels are a, b, a, expected each of them"),
        (("--data", "x", "--labels", "a,b", "--positive", "c"), 1, "--positive is c, expected one"),
        (("--data", "x", "--limit", 0), 2, "--limit"),
        (("--task", "recall", "--depth", 1.5), 2, "--depth"),
        (("--task", "recall", "--depth", "nan"), 2, "--depth"),
        (("--task", "recall", "--length", 0), 2, "--length"),
        (("--task", "recall", "--length", 9), 1, "a needle and its question alone have"),
        (("--task", "recall", "--num-needles", 0), 2, "--num-needles"),
        (("--task", "recall", "--haystack", "hay"), 2, "'hay' is not one of"),
        (("--task", "amazon-reviews", "--language", "c"), 2, "amazon-reviews has no such option"),
        (("--task", "amazon-reviews", "--file", "no.jsonl"), 1, "there is no such file"),
        (("--task", "amazon-reviews", "--file", REVIEWS), 1, "is too small for the paper's splits"),
        (
            ("--task", "amazon-reviews", "--file", REVIEWS, "--category", "Books"),
            *(
                1,
                "--category and --language name data of the hub, and there is a --file: leave them",
            ),
        ),
        ((*TREES, "--model", "no/base"), 1, "no/base is no folder here"),
        ((*TREES, "--adapter-path", "no/adapter"), 1, "no/adapter is no folder here"),
        ((*TREES, "--adapter-path", UPSTREAM / "base"), 1, "is a base model, not an adapter"),
        ((*TREES, "--plot", "x.txt"), 1, "--plot is x.txt, expected a name that ends with .png"),
        ((*TREES, "--plot", "no/x.png"), 1, "--plot is no/x.png, but there is no folder no"),
        ((*TREES, "--plot", "x.png", "--predictions", "./x.png"), 2, "the same file as --predict"),
        (
            ("--data", ".", "--labels", " ,"),
            2,
            "found no label in ' ,', expected them with commas between",
        ),
        (
            (*TREES, "--num-trees", 2, "--predictions", "."),
            1,
            "--predictions . is not a file: name one",
        ),
        ((*TREES, "surplus"), 2, "unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_loaded(tmp_path, monkeypatch, args, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "reader", None)
    assert_one_error(run("evaluate", *BASE, *args), code, said)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_in_a_folders_place_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "reader", None)
    (tmp_path / "x.png").mkdir()
    result = run("evaluate", *BASE, *TREES, "--plot", tmp_path / "x.png")
    assert_one_error(result, 1, "which cannot be written: name another file")


def test_several_mistakes_are_listed():
    result = run("evaluate", *BASE, "--k", 4, "--file", "x", "--category", "y")
    assert_one_error(result, 1, "evaluate: 3 problems", "  - no data", "  - --k above 1 needs")


def test_a_k_that_the_folder_does_not_hold_is_refused(folders, truth):
    result = run("evaluate", *folders.flags(), "--data", truth, "--k", 4, "--k", 3)
    assert_one_error(result, 1, "holds no adapter for --k 3: it has K = 1, 2, 4")


def test_an_answer_that_is_no_label_is_named(folders, truth):
    result = run("evaluate", *folders.flags(), "--data", truth, "--labels", "true, yes")
    said = f"{truth / 'test.jsonl'} line 2: the answer is 'false', expected one of --labels"
    assert_one_error(result, 1, said)


def test_a_broken_tokenizer_is_one_line(tmp_path, truth):
    folders = write_folders(tmp_path, ())
    (folders.base / "tokenizer.json").write_text("{")
    result = run("evaluate", "--model", folders.base, "--data", truth)
    assert_one_error(result, 1, f"cannot load {folders.base}")


def test_no_picture_can_be_had_without_matplotlib(monkeypatch, folders, truth):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    monkeypatch.setattr(session, "reader", None)
    result = run("evaluate", *folders.flags(), "--data", truth, "--plot", "x.png")
    assert_one_error(result, 1, "--plot needs matplotlib: pip install 'kmerge-mlx[plot]'")


def test_every_k_of_the_folder_is_measured_or_those_that_are_given(folders, truth):
    def ks(*args: object) -> list[int]:
        rows = json.loads(evaluated(folders, "--data", truth, *args, "--json").out)["rows"]
        return [row["k"] for row in rows]

    assert ks() == [1, 2, 4]
    assert ks("--k", 4, "--k", 2, "--k", 4) == [2, 4]
    assert ks("--k", 1) == [1]


def test_the_base_that_the_adapter_names_is_used(adapter_path, truth):
    result = run("evaluate", "--adapter-path", adapter_path, "--data", truth, *QUICK, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["settings"]["model"] == str(UPSTREAM / "base")
