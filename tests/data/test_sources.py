"""Where examples come from: folders, hub datasets, and mlx-lm's ``hf_dataset`` entries."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kmerge_mlx.data import sources
from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.sources import load_examples, load_hub_datasets
from kmerge_mlx.errors import DataError
from tests.cli_runner import environment
from tests.data.test_examples import GOOD, write
from tests.hub_server import QUIET, running_hub

KEYS = {"prompt_feature": "q", "completion_feature": "a"}


def numbered(prefix: str, count: int) -> list[dict]:
    return [{"q": f"{prefix}{i}", "a": "yes"} for i in range(count)]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """Two datasets of ten and five rows, by the names ``user/one`` and ``user/two``."""
    for name, count in (("one", 10), ("two", 5)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", *numbered(name[0], count))
    write(tmp_path / "one" / "dev.jsonl.gz", *numbered("d", 3))
    monkeypatch.setattr(
        sources, "fetch", lambda repo, *_, **__: tmp_path / repo.removeprefix("user/")
    )


def prompts(examples) -> list[str]:
    return [example.context for example in examples]


def test_a_folder_gives_the_splits_it_has(tmp_path):
    write(tmp_path / "train.jsonl", GOOD, GOOD)
    write(tmp_path / "test.jsonl.gz", GOOD)
    found = load_examples(tmp_path)
    assert {split: len(examples) for split, examples in found.items()} == {"train": 2, "test": 1}
    assert found["train"][0] == RowFormat().read(GOOD)
    assert list(load_examples(tmp_path, splits=("test",))) == ["test"]


def test_a_folder_without_a_split_or_with_two_of_one_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no train\.jsonl or valid\.jsonl or test\.jsonl"):
        load_examples(tmp_path)
    path = write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match="is a file: give the folder"):
        load_examples(path)
    write(tmp_path / "train.jsonl.gz", GOOD)
    with pytest.raises(DataError, match="remove one"):
        load_examples(tmp_path)
    write(tmp_path / "valid.jsonl", GOOD, {"prompt": "a"})
    with pytest.raises(DataError, match=r"valid\.jsonl line 2: found 'prompt'"):
        load_examples(tmp_path, splits=("valid",))
    assert load_examples(tmp_path, skip_bad=True, splits=("valid",))["valid"].bad == 1


def test_a_validation_set_is_the_end_of_the_training_file_or_a_file_of_its_own(datasets):
    found = load_hub_datasets({"path": "user/one", **KEYS})
    assert prompts(found["train"]) == [f"o{i}" for i in range(8)]
    assert prompts(found["valid"]) == ["o9"]
    assert "test" not in found  # as in mlx-lm
    entry = {"path": "user/one", "train_split": "train", "valid_split": "dev[:2]", **KEYS}
    assert prompts(load_hub_datasets(entry)["valid"]) == ["d0", "d1"]


def test_slices_are_read_as_the_datasets_library_reads_them(datasets):
    for text, expected in (
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[-2:]", range(8, 10)),
        ("train[:25%]", range(2)),  # 2.5, to the even neighbour as Python rounds
        ("train[35%:]", range(4, 10)),  # 3.5
        ("train[20%:40%]", range(2, 4)),
        ("train[:-90%]", range(1)),
        ("train[:99]", range(10)),
        ("train[5:5]", range(0)),
    ):
        entry = {"path": "user/one", "train_split": text, **KEYS}
        found = load_hub_datasets(entry, splits=("train",))
        assert prompts(found["train"]) == [f"o{i}" for i in expected], text


def test_several_datasets_follow_one_another_each_with_its_own_keys(datasets, tmp_path):
    write(tmp_path / "two" / "train.jsonl", *[{"text": "ab", "split": 1}] * 5)
    entries = [{"path": "user/one", **KEYS}, {"path": "user/two", "train_split": "train"}]
    train = load_hub_datasets(entries)["train"]
    assert prompts(train) == [*(f"o{i}" for i in range(8)), *"aaaaa"]
    assert train[-1].answer == "b"
    assert prompts(train[6:9]) == ["o6", "o7", "a"]
    assert train.where(8) == f"{tmp_path / 'two' / 'train.jsonl'} line 1"
    with pytest.raises(IndexError):
        train[13]


def test_an_entry_that_cannot_be_read_is_refused_by_name(datasets):
    one = {"path": "user/one"}
    for entry, message in (
        (one | {"prompt_key": "q"}, "unknown prompt_key, expected"),
        (one | {"answers": False}, "unknown answers"),
        ({"name": "user/one"}, "expected an entry with a path"),
        ("user/one", "expected an entry with a path"),
        (one | {"train_split": "train[:80"}, r"train_split is 'train\[:80'"),
        (one | {"train_split": 3}, "train_split is 3"),
        (one | {"train_split": "gone"}, r"holds no gone\.jsonl: hub datasets are"),
        (one | {"prompt_feature": ""}, "prompt_feature is ''"),
        (one, "line 1: found 'q, a'"),
    ):
        with pytest.raises(DataError, match=message):
            load_hub_datasets([entry])


@pytest.mark.slow
def test_a_hub_repo_of_jsonl_files_is_a_folder_like_any_other(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    write(made / "train.jsonl", *[GOOD] * 10)
    write(made / "test.jsonl.gz", GOOD)
    (made / "weights.bin").write_bytes(b"0" * 1000)
    code = (
        "import sys\n"
        "from kmerge_mlx.data.sources import load_examples\n"
        "from kmerge_mlx.errors import DataError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print({k: len(v) for k, v in load_examples(name).items()})\n"
        "    except DataError as error: print(error)\n"
    )
    with running_hub(made=made) as hub:
        settings = QUIET | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home")}
        done = subprocess.run(
            [sys.executable, "-c", code, "user/made", "user/none", "a b"],
            env=environment(**settings), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        fetched = {r.rsplit("/", 1)[-1] for r in hub.requests if "resolve" in r}
    found, missing, no_name = done.stdout.splitlines()
    assert found == "{'train': 10, 'test': 1}"
    taken = "user/none is not a folder here, so it was taken for a hub dataset, and the hub has no"
    assert missing.startswith(taken)
    assert no_name == "a b is neither a folder nor the name of a hub dataset"
    assert fetched == {"train.jsonl", "test.jsonl.gz"}  # and not what is no example
