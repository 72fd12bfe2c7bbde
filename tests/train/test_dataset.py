"""What a run trains on, and every row it refuses before anything is trained or written."""

from __future__ import annotations

import json

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx.data import AmazonReviews
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.data.textualized_tree import TreeTask
from kmerge_mlx.errors import DataError, TrainError
from kmerge_mlx.train.dataset import TokenizedSet, load_stages, tree_sets
from kmerge_mlx.train.settings import TrainSettings
from tests.cli_runner import CHATML, assert_one_error, copy_base
from tests.data.test_tasks import REVIEWS
from tests.train_runs import BASE, log_of, rows_of, train, trained, write_data

GOOD = rows_of(8)
LONG = {"prompt": "Tree: " + "AB" * 500, "completion": "CD"}
SHORT = {"prompt": "A", "completion": "B"}
OPTIONS = ("--batch-size", 4, "--iters", 1, "--val-batches", 1, "--max-seq-length", 64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


def test_a_changed_tokenizer_or_template_is_other_data(tmp_path):
    """By its files alone a run would go on with ids that mean something else."""
    folder = write_data(tmp_path / "data", GOOD)
    chat = load_tokenizer(copy_base(BASE, tmp_path / "chat", template=CHATML))
    rows = load_examples(folder)["train"]
    digests = {
        TokenizedSet(rows, tokens, TrainSettings()).digest
        for tokens in (load_tokenizer(BASE), chat)
    }
    assert len(digests) == 2
    bare = TrainSettings(ignore_chat_template=True)
    assert TokenizedSet(rows, chat, bare).digest in digests


def test_a_tree_that_does_not_fit_is_named(tokenizer):
    task = TreeTask("small", splits={"train": 3, "valid": 0, "test": 0})
    with pytest.raises(DataError, match=r"textualized-tree, train tree 0: found 1?\d positions"):
        tree_sets(task, tokenizer, TrainSettings(max_seq_length=9))


def chat_of(row: dict) -> dict:
    turns = ("user", row["prompt"]), ("assistant", row["completion"])
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("rows", "valid", "said"),
    [
        ([*GOOD[:2], {"x": "x"}], [], "line 3: found 'x', expected prompt and completion"),
        ([*GOOD[:5], LONG, *GOOD], [], "train.jsonl line 6: found "),
        ([SHORT], [], "line 1: found 1 tokens to merge, expected at least --k = 4"),
        ([chat_of(SHORT)], [], "train.jsonl line 1: messages need a chat template"),
        (GOOD, [*GOOD, b"{"], "valid.jsonl line 9: not JSON"),
        (GOOD[:3], [], "found 3 examples to train on, expected at least --batch-size = 4"),
        ([], GOOD, "holds no training split (train.jsonl)"),
        ([], [], "holds no train.jsonl or valid.jsonl"),
    ],
)
def test_a_bad_row_is_one_line_before_anything_is_written(tmp_path, rows, valid, said):
    data = write_data(tmp_path / "data", rows, valid)
    result = train(tmp_path / "run", "--data", data, *OPTIONS)
    assert_one_error(result, 1, said)
    assert len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_data_at_all_is_one_line_that_names_the_flags(tmp_path):
    said = "found no data: give --data, or --task (textualized-tree, amazon-rev"
    assert_one_error(train(tmp_path / "run", *OPTIONS), 1, said)


def test_bad_rows_are_counted_and_left_out_if_that_is_asked_for(tmp_path):
    rows = [b"{", *GOOD[:4], LONG, SHORT, *GOOD[4:], {"x": 1}]
    data = write_data(tmp_path / "data", rows, [*GOOD, b"{"])
    result = trained(tmp_path / "run", "--data", data, *OPTIONS, "--skip-bad")
    assert "Data: data, 8 examples, 8 to validate, 4 bad rows left out" in result.err
    clean = write_data(tmp_path / "clean", GOOD, GOOD)
    trained(tmp_path / "same", "--data", clean, *OPTIONS)
    assert log_of(tmp_path / "run", "train_loss") == log_of(tmp_path / "same", "train_loss")
    assert log_of(tmp_path / "run", "val_loss") == log_of(tmp_path / "same", "val_loss")


def test_mlx_lms_hf_dataset_entries_name_slices(tmp_path):
    data = write_data(tmp_path / "data", rows_of(20))
    yaml = f"hf_dataset: {{path: {data}, train_split: 'train[:40%]', valid_split: 'train[80%:]'}}\n"
    result = trained(tmp_path / "run", *OPTIONS, yaml=yaml)
    assert "Data: data, 8 examples, 4 to validate" in result.err
    result = train(tmp_path / "other", *OPTIONS, yaml=yaml.replace("40%", "0%"))
    assert_one_error(result, 1, "no row is left to train on: the split is empty")


def test_conversations_train_where_there_is_a_template(tmp_path):
    base = copy_base(BASE, tmp_path / "chat", template=CHATML)
    data = write_data(tmp_path / "data", map(chat_of, GOOD))
    result = trained(tmp_path / "run", "--data", data, *OPTIONS, model=base)
    layout = json.loads((tmp_path / "run" / "merge_config.json").read_text())["layout"]
    assert layout == {"merges": "documents", "threshold": 32, "chat_template": True}
    assert "prompts compressed 1.00x\nnote: next to nothing of them merges" in result.err
    result = trained(tmp_path / "all", "--data", data, *OPTIONS, "--merges", "all", model=base)
    assert "note: " not in result.err
    layout = json.loads((tmp_path / "all" / "merge_config.json").read_text())["layout"]
    assert layout["merges"] == "all"


def test_a_curriculum_that_is_none_is_one_line(tokenizer):
    for settings, said in (
        ({"curriculum": ["nope"]}, "stage is 'nope', expected one of small, xsmall"),
        ({"curriculum": [{"max_depth": 2}]}, "or a mapping of stage (or max_depth, max_nodes"),
        ({"curriculum": [{"stage": "small", "threshold": 2}]}, "threshold is 2, expected an acc"),
    ):
        with pytest.raises((DataError, TrainError)) as caught:
            load_stages(TrainSettings.of(settings | {"task": "textualized-tree"}), tokenizer, None)
        assert said in str(caught.value)


def test_the_papers_other_tasks_train_from_a_local_file(tmp_path, monkeypatch):
    for name, value in {"test": 4, "valid": 4, "train_share": 1}.items():
        monkeypatch.setattr(AmazonReviews, name, value)
    file = tmp_path / "reviews.jsonl"
    file.write_bytes(REVIEWS.read_bytes() + b"{\n")
    task = ("--task", "amazon-reviews", "--file", file, *OPTIONS)
    assert_one_error(train(tmp_path / "run", *task), 1, "reviews.jsonl line 41: not JSON")
    result = trained(tmp_path / "run", *task, "--skip-bad")
    assert "Data: amazon-reviews, 29 examples, 4 to validate, 1 bad rows left out" in result.err
