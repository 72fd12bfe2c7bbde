"""``kmerge-mlx data``: what it writes and says, what it refuses, and the hub on the loopback."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlx_lm.tuner.datasets import load_local_dataset

from kmerge_mlx.data.sources import load_examples
from tests.cli_runner import assert_one_error, run
from tests.data.test_tasks import COMMITS, REVIEWS
from tests.hub_server import Repo, running_hub, using

TREES = ("textualized-tree", "--num-trees", 30)
SIZES = ("--train", 12, "--valid", 5, "--test", 8)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_trees_are_written_and_the_summary_is_on_stderr(tmp_path):
    result = run("data", *TREES, "--out", tmp_path / "trees")
    assert (result.code, result.out) == (0, "")
    names = {path.name for path in (tmp_path / "trees").iterdir()}
    assert names == {"train.jsonl", "valid.jsonl", "test.jsonl", "summary.json"}
    lines = result.err.splitlines()
    assert lines[0] == f"{tmp_path / 'trees'}: textualized-tree, medium, seed 42"
    assert lines[-1] == "  trees in more than one split: 0"
    for word in ("  train  ", "distinct trees", "(50.0%), true", "negatives: ", "depths: "):
        assert word in result.err
    result = run("data", *TREES, "--out", tmp_path / "trees", "--force", "--json")
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
    summary = json.loads((tmp_path / "trees" / "summary.json").read_text())
    assert json.loads(result.out) == {"folder": str(tmp_path / "trees")} | summary


def test_mlx_lm_and_this_project_read_what_is_written(tmp_path):
    run("data", *TREES, "--out", tmp_path / "trees")
    theirs = load_local_dataset(tmp_path / "trees", None, SimpleNamespace())
    ours = load_examples(tmp_path / "trees")
    for split, data in zip(("train", "valid", "test"), theirs, strict=True):
        rows = [
            (row["prompt"], row["completion"]) for row in map(data.__getitem__, range(len(data)))
        ]
        assert rows == [(example.context, example.answer) for example in ours[split]]


def test_every_option_changes_what_is_written(tmp_path):
    options = ["", "--stage large", "--max-nodes 7", "--seed 7", "--reference-sampling"]
    options += ["--find-parent 2", "--questions-per-tree 2", "--train 5", "--valid 5", "--test 5"]
    found = set()
    for number, option in enumerate(options):
        out = tmp_path / str(number)
        result = run("data", *TREES, "--out", out, *option.split())
        assert result.code == 0, result.err
        found.add(tuple(sorted(digests(out).items())))
    assert len(found) == len(options)


@pytest.mark.parametrize(
    ("task", "sample"), [("amazon-reviews", REVIEWS), ("commitpackft", COMMITS)]
)
def test_a_local_file_in_the_data_sets_schema_does(tmp_path, task, sample):
    file = tmp_path / "raw.jsonl.gz"
    file.write_bytes(gzip.compress(sample.read_bytes()))
    result = run("data", task, "--file", file, "--out", tmp_path / "data", *SIZES, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    rows = {split: found["rows"] for split, found in summary["splits"].items()}
    assert rows == {"train": 12, "valid": 5, "test": 8}
    assert (summary["source"], summary["shared_prompts"]) == (str(file), 0)


def test_a_bad_line_is_one_error_and_leaves_nothing(tmp_path):
    file = tmp_path / "raw.jsonl"
    file.write_bytes(REVIEWS.read_bytes() + b"{\n")
    args = ("data", "amazon-reviews", "--file", file, "--out", tmp_path / "data", *SIZES)
    assert_one_error(run(*args), 1, "raw.jsonl line 41: not JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]
    result = run(*args, "--skip-bad")
    assert result.code == 0
    assert "1 bad lines" in result.err
    assert result.err.splitlines()[-1].startswith("note: the first bad line: ")


def test_a_folder_that_is_there_is_kept_and_force_replaces_nothing_but_data(tmp_path):
    for seed, force, code in ((42, (), 0), (7, (), 1), (7, ("--force",), 0)):
        result = run("data", *TREES, "--out", tmp_path / "trees", "--seed", seed, *force)
        assert result.code == code
    assert json.loads((tmp_path / "trees" / "summary.json").read_text())["seed"] == 7
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    result = run("data", *TREES, "--out", tmp_path / "mine", "--force")
    assert_one_error(result, 1, "thesis.tex")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    assert_one_error(run("data", *TREES, "--out", tmp_path / "mine/thesis.tex/data"), 1, "cannot w")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("textualized-tree --file x.jsonl", "--file is not an option of textualized-tree"),
        ("amazon-reviews --stage small --max-nodes 9", "2 problems"),
        ("amazon-reviews --language python", "--language is not an option of amazon-reviews"),
        ("commitpackft --file x.jsonl --language go", "there is a --file: leave them out, or it"),
        ("textualized-tree --stage huge", "--stage is 'huge', expected one of small, xsmall"),
        ("textualized-tree --questions-per-tree 3", "--questions-per-tree is 3, expected an even"),
        ("textualized-tree --stage x3large --max-nodes 3", "no tree of two nodes can"),
    ],
)
def test_options_that_do_not_belong_are_usage_errors_and_not_ignored(tmp_path, args, message):
    assert_one_error(run("data", *args.split(), "--out", tmp_path / "data"), 2, message)
    assert not list(tmp_path.iterdir())


def test_input_that_cannot_do_is_one_error(tmp_path):
    for task, option, value, message in (
        ("amazon-reviews", "--file", "gone.jsonl", "cannot read gone.jsonl: there is no such"),
        ("amazon-reviews", "--file", REVIEWS, "more than --test 50000 and --valid 1000"),
        ("commitpackft", "--language", "../..", "--language is '../..'"),
    ):
        result = run("data", task, option, value, "--out", tmp_path / "data")
        assert_one_error(result, 1, message)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hub(tmp_path):
    """A hub with both data sets, the project's samples in the place of the real files."""
    reviews, commits = tmp_path / "hub" / "reviews", tmp_path / "hub" / "commits"
    (reviews / "raw" / "review_categories").mkdir(parents=True)
    shutil.copy(REVIEWS, reviews / "raw" / "review_categories" / "Amazon_Fashion.jsonl")
    (commits / "data" / "python").mkdir(parents=True)
    shutil.copy(COMMITS, commits / "data" / "python" / "data.jsonl")
    with running_hub() as hub:
        hub.repos["McAuley-Lab/Amazon-Reviews-2023"] = Repo.of(reviews)
        hub.repos["bigcode/commitpackft"] = Repo.of(commits)
        yield hub


@pytest.fixture
def from_hub(hub, tmp_path, monkeypatch):
    """Runs a command against the hub, in ``work/`` and with a cache of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run_there(*args, **changes):
        with using(hub, tmp_path / "home", **changes):
            return run(*args)

    return run_there


@pytest.mark.parametrize("task", ["amazon-reviews", "commitpackft"])
def test_the_hubs_raw_file_is_fetched_once_and_gives_what_the_local_one_does(
    hub, from_hub, tmp_path, task
):
    result = from_hub("data", task, "--out", "one", *SIZES)
    assert (result.code, result.out) == (0, ""), result.err
    sample = REVIEWS if task == "amazon-reviews" else COMMITS
    assert run("data", task, "--file", sample, "--out", tmp_path / "local", *SIZES).code == 0
    ours, local = digests(tmp_path / "work" / "one"), digests(tmp_path / "local")
    assert all(ours[name] == local[name] for name in local if name != "summary.json")
    fetched = sum(request.startswith("GET") and "resolve" in request for request in hub.requests)
    assert from_hub("data", task, "--out", "two", *SIZES, HF_HUB_OFFLINE=True).code == 0
    assert fetched == 1
    own = [request for request in hub.requests if "agent" not in request]  # the client's own
    assert all("datasets/" in request for request in own)  # not a model of that name
    assert digests(tmp_path / "work" / "two") == ours


def test_what_the_hub_lacks_is_one_error(from_hub):
    result = from_hub("data", "amazon-reviews", "--category", "Socks", "--out", "data")
    assert_one_error(result, 1, "has no file raw/review_categories/Socks.jsonl")
    result = from_hub("data", "commitpackft", "--out", "data", HF_HUB_OFFLINE=True)
    assert_one_error(result, 1, "not in the cache, or not all of it, and HF_HUB_OFFLINE is set")
