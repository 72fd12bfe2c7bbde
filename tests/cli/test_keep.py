"""``--keep`` from training to an answer: what an adapter was trained with is used with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmerge_mlx.data.recall import RecallTask
from tests.cli_runner import assert_one_error, run
from tests.train_runs import BASE, SMALL_TREES, kmerge, train, trained, write_data

SMALL = ("--iters", 2, "--batch-size", 2, "--val-batches", 1)
TEXT = (
    "The depot of one and two opens at 12:30, and it closes at 18:45 in all of the weeks of 2026."
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that was trained for two steps on recall, with numbers and code kept."""
    path = tmp_path_factory.mktemp("keep") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecallTask, "rows", {"train": 4, "valid": 2, "test": 2})
        trained(path, "--task", "recall", "--words", 30, "--keep", "code,numbers", *SMALL)
    return path


def layout_of(path: Path) -> dict[str, object]:
    return json.loads((path / "merge_config.json").read_text())["layout"]


def generated(adapter: Path, *options: object) -> tuple[int, str]:
    """Merged tokens of a prompt, and what is said on stderr."""
    result = run(
        *("generate", "--adapter-path", adapter, "--model", BASE, "-", "-p", "When?", "-m", 1),
        *options,
        stdin=TEXT.encode(),
    )
    assert result.code == 0, result.err
    return int(result.err.split(" merged and ")[0].split()[-1]), result.err


def test_an_adapter_is_used_with_what_it_was_trained_to_keep_unless_told_otherwise(adapter):
    assert layout_of(adapter)["keep"] == ["numbers", "code"]
    merged, said = generated(adapter)
    assert "trained" not in said
    everything, said = generated(adapter, "--keep", "none")
    assert merged < everything
    assert "note: this adapter was trained with --keep numbers,code" in said
    fewer, said = generated(adapter, "--keep", "quotes,numbers")
    assert merged <= fewer < everything
    assert "documents of 32 tokens and more merge but numbers, code" in run("info", adapter).out


def test_a_bare_adapter_keeps_what_is_asked_for(adapter_path):
    everything, _ = generated(adapter_path)
    kept, said = generated(adapter_path, "--keep", "numbers")
    assert kept < everything
    assert "trained with --keep none" in said
    named = ("generate", "--model", BASE, "--adapter-path", adapter_path, "-", "--keep")
    said = "--keep is 'dates', expected some of numbers, code, urls, emails, quotes, names, none"
    assert_one_error(run(*named, "dates"), 2, f"generate: {said}")
    said = "--keep is empty, expected names with commas between them"
    assert_one_error(run(*named, ""), 2, said)
    said = "--keep is numbers,none, and none stands alone"
    assert_one_error(run(*named, "numbers,none", stdin=b"a b"), 2, said)


def test_training_names_what_it_keeps_only_where_it_was_asked_and_goes_on_with_it(tmp_path):
    settings = {}
    for name, asked in (("plain", ()), ("kept", ("--keep", "numbers"))):
        path = tmp_path / name
        trained(path, *SMALL_TREES, "--iters", 1, *asked)
        settings[name] = json.loads((path / "training" / "state.json").read_text())["settings"]
    assert not {"keep", "words"} & {*settings["plain"]}
    assert settings["kept"] == settings["plain"] | {"keep": ["numbers"]}
    assert "keep" not in layout_of(tmp_path / "plain")
    again = kmerge("train", "--adapter-path", tmp_path / "kept", "--resume", "--iters", 2)
    assert again.code == 0, again.err
    other = ("--resume", "--iters", 3, "--keep", "code", *SMALL_TREES)
    assert_one_error(train(tmp_path / "kept", *other), 1, "--keep is ['code'], the run has ['nu")


def test_a_row_of_which_little_is_left_to_merge_is_no_mistake(tmp_path):
    rows = [{"context": f"at {i}{i}{i}{i}{i}", "prompt": "?", "completion": "A"} for i in range(4)]
    data = write_data(tmp_path / "data", rows, rows[:2])
    asked = ("--data", data, "--k", 8, *SMALL)
    assert_one_error(train(tmp_path / "plain", *asked), 1, "tokens to merge, expected at least --k")
    trained(tmp_path / "kept", *asked, "--keep", "numbers")


def test_recall_is_evaluated_with_what_the_adapter_keeps(adapter):
    asked = ("--task", "recall", "--haystack", "text", "--length", 400, "--depth", 0.5, "-m", 1)
    ratios = []
    for more in ((), ("--keep", "none")):
        result = run(
            *("evaluate", "--model", BASE, "--adapter-path", adapter, *asked, *more),
            *("--num-needles", 1, "--timed", 0, "--json"),
        )
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert ("keep" in report["layout"]) == (not more)
        assert report["settings"].get("keep") == (["none"] if more else None)
        (row,) = report["rows"]
        ratios.append(row["prompt_tokens"] / row["positions"])
    assert 1 < ratios[0] < ratios[1]
