"""Documents that state exact strings: one right answer each, the same for a seed, in one split."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import yaml

from kmerge_mlx.data.recall import RecallTask
from kmerge_mlx.errors import SettingsError
from kmerge_mlx.train.settings import TrainSettings
from tests.cli_runner import run
from tests.doc_blocks import ROOT

ASKED = {
    r"What is the access code of the (.*)\?": r"The access code of the {} is (\d{{5}})\.",
    r"How much was the last invoice of the (.*)\?": (
        r"The last invoice of the {} was (\$[\d,]+\.\d\d)\."
    ),
    r"What is the phone number of the (.*)\?": r"The phone number of the {} is (555-\d{{4}})\.",
    r"Which setting does the computer of the (.*) read\?": (
        r"The computer of the {} reads the setting (\w+_\w+_\w+)\."
    ),
    r"Where is the backup of the (.*)\?": r"The backup of the {} is on (\w+-\w+-\w{{4}})\.",
}


def stated(document: str, question: str) -> tuple[int, list[str]]:
    """Which question it is, and all answers that the document gives, read by hand."""
    for number, (asks, states) in enumerate(ASKED.items()):
        if found := re.fullmatch(f"Question: {asks}\nAnswer:", question):
            return number, re.findall(states.format(re.escape(found[1])), document)
    raise AssertionError(question)


def test_each_document_states_one_answer_to_its_question_and_others_of_its_kind():
    kinds, others, places = Counter(), 0, []
    for example in RecallTask(sizes={"test": 300}).examples(("test",))["test"]:
        kind, answers = stated(example.context, example.prompt)
        assert answers == [example.answer.strip()]
        kinds[kind] += 1
        form = list(ASKED.values())[kind].format("[A-Z][a-z]+ [a-z]+")
        others += len(re.findall(form, example.context)) - 1
        places.append(example.context.index(answers[0]) / len(example.context))
        assert 170 <= len(example.context.split()) <= 200
    assert min(kinds.values()) > 300 / len(ASKED) / 2
    assert others > 300  # so the kind alone does not tell the answer
    assert min(places) < 0.1 < 0.9 < max(places)


def test_the_same_seed_draws_the_same_and_the_length_is_as_asked():
    task = RecallTask(sizes={"train": 5, "valid": 0, "test": 2})
    assert {s: len(found) for s, found in task.examples().items()} == {
        "train": 5,
        "valid": 0,
        "test": 2,
    }
    assert task.examples() == RecallTask(sizes=task.sizes).examples()
    assert task.draw("train", 3) == RecallTask().draw("train", 3)  # whatever the sizes are
    others = [RecallTask(seed=1).draw("train", 3), RecallTask(words=201).draw("train", 3)]
    assert task.draw("train", 3) not in [*others, task.draw("test", 3)]
    assert 2_900 < len(RecallTask(words=3_000).draw("test", 0)[1].split()) <= 3_000
    # Guaranteed by Python for a seed: the same on every machine.
    assert task.draw("train", 0)[0] == ("server", "Norwick clinic", "job-ap-2723")


def test_the_command_writes_what_is_drawn(tmp_path):
    folder = tmp_path / "data"
    sizes = ("--train", 4, "--valid", 3, "--test", 2, "--words", 60)
    result = run("data", "recall", "--out", folder, *sizes, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["shared_documents"] == 0
    assert {split: found["rows"] for split, found in summary["splits"].items()} == {
        "train": 4,
        "valid": 3,
        "test": 2,
    }
    rows = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    drawn = [RecallTask(words=60).draw("valid", i) for i in range(3)]
    assert rows == [
        {"context": text, "prompt": row["prompt"], "completion": f" {fact.answer}"}
        for row, (fact, text) in zip(rows, drawn, strict=True)
    ]
    with pytest.raises(SettingsError, match="nothing to write"):
        RecallTask(sizes={"train": 0, "valid": 0, "test": 0}).write(tmp_path / "none")


def test_the_two_trainings_of_the_example_differ_in_what_they_keep_alone():
    printed = {}
    for path in sorted((ROOT / "examples" / "recall").glob("*.yaml")):
        result = run("train", "-c", path, "--print-config")
        assert result.code == 0, result.err
        printed[path.stem] = yaml.safe_load(result.out)
        assert TrainSettings.of(printed[path.stem]).task == "recall"
    assert printed["plain"] | {"keep": ["numbers", "code"]} == printed["keep"]
    assert printed["plain"]["keep"] == []
