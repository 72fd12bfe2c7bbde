"""The model that comes with the package: it is there, it is small, and it answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import bundled, load
from kmerge_mlx.adapters.folder import find_adapters
from tests.cli_runner import run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LARGEST = 8 * 10**6  # bytes


def test_it_is_no_larger_than_promised():
    files = [f for f in bundled.BASE.parent.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) <= LARGEST
    assert set(find_adapters("bundled")) == {1, 2, 4}


def test_the_first_command_answers_from_any_folder_and_says_what_it_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("generate", "--k", "4", EXAMPLES / "tree.txt")
    assert (done.code, done.out) == (0, "true\n")
    assert "36 tokens in 9 positions (4.00x)" in done.err
    result = run("generate", EXAMPLES / "tree.txt", "--json")  # nobody names a merge factor
    assert json.loads(result.out)["compressed_tokens"] == 9


def test_it_says_that_it_cannot_talk():
    result = run("chat")
    assert result.code == 0, result.err
    assert "the bundled model answers questions about one tree each" in result.err


def test_a_line_end_after_the_question_is_remarked_on(tmp_path):
    text = (EXAMPLES / "tree.txt").read_text()
    (tmp_path / "tree.txt").write_text(f"{text}\n")
    note = "note: the prompt ends with a line end"
    assert note in run("generate", "--k", 4, tmp_path / "tree.txt").err
    assert note not in run("generate", "--k", 4, EXAMPLES / "tree.txt").err


@pytest.mark.slow
def test_it_answers_the_trees_written_by_hand():
    done = run("evaluate", "--data", EXAMPLES / "handwritten", "--json")
    rows = json.loads(done.out)["rows"]
    assert [row["k"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert row["scores"]["handwritten"]["accuracy"]["value"] >= 18 / 20
        assert row["compression_ratio"] > 0.95 * row["k"]


@pytest.mark.slow
def test_a_tree_of_twenty_nodes_is_read_from_a_quarter_of_its_positions():
    options = ("--stage", "large", "--max-nodes", "20", "--num-trees", "50", "--data-seed", "11")
    done = run("evaluate", "--task", "textualized-tree", *options, "--k", "4", "--json")
    (row,) = json.loads(done.out)["rows"]
    assert row["scores"]["relationship"]["balanced_accuracy"]["value"] > 0.9


def test_it_is_computed_in_single_precision_though_stored_in_half():
    model, _ = load("bundled", "bundled", 4)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float32}
    stored = mx.load(str(bundled.BASE / "model.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.float16}


def test_a_folder_of_that_name_is_reached_by_its_path(tmp_path, monkeypatch, base_path):
    shutil.copytree(base_path, tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    assert load("./bundled")[0].args.hidden_size == 64
    assert load("bundled")[0].args.hidden_size == 128


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_the_base_alone_reads_uncompressed(command, tmp_path):
    prompt = (EXAMPLES / "tree.txt").read_text()
    row = json.dumps({"prompt": prompt, "completion": "true"})
    (tmp_path / "test.jsonl").write_text(f"{row}\n")
    asked = ["-p", prompt] if command == "generate" else ["--data", tmp_path]
    done = run(command, "--model", bundled.BASE, *asked, "--json")
    found = json.loads(done.out)
    ratio = found.get("compression_ratio") or found["rows"][0]["compression_ratio"]
    assert (done.code, ratio) == (0, 1.0)
