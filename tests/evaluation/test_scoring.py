"""The predictions file: a stopped evaluation goes on to the same table, with its own file alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kmerge_mlx.data.examples import Example
from kmerge_mlx.errors import EvaluateError
from kmerge_mlx.evaluation import scoring
from kmerge_mlx.evaluation.baselines import Merged
from kmerge_mlx.evaluation.questions import Question
from kmerge_mlx.evaluation.scoring import Prediction, PredictionsFile, stored_date
from tests.cli_runner import assert_one_error, command, copy_base, environment, run
from tests.evaluations import (
    TEMPLATE,
    answers_of,
    labelled,
    lines_of,
    questions_of,
    write_data,
    write_folders,
)

K4, K2 = Merged(4), Merged(2)
ASKED = Question(Example("?", None, "right"), "data")
TOKENS = {"answer_tokens": 2, "prompt_tokens": 9, "positions": 3}
IDENTITY = {"the base model": "a" * 64, "--batch-size": "2", "the adapter for K=4": "b" * 64}
QUICK = ("--batch-size", 4, "--max-tokens", 2, "--timed", 0, "--json")
LINE = {"method": "merged", "k": 4, "question": 0, "text": "a", "nll": 1.5, **TOKENS}


def answer(number: int, **changes) -> Prediction:
    return Prediction(**{"text": f"é {number}\n", "nll": 0.1 * number} | changes, **TOKENS)


def opened(path: Path, size: int = 4, **identity: str) -> PredictionsFile:
    known = {name: (value,) for name, value in (IDENTITY | identity).items()}
    return PredictionsFile(str(path), known, size)


def filled(path: Path) -> Path:
    """Four answers in two batches."""
    file = opened(path)
    for batch in ([3, 0], [1, 2]):
        file.add(K4, batch, [ASKED] * 2, [answer(i) for i in batch])
    return path


def refused(path: Path, size: int = 4, **identity: str) -> str:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(EvaluateError) as caught:
        opened(path, size, **identity)
    assert before == (path.read_bytes() if path.is_file() else None)
    said = str(caught.value)
    assert said.startswith(f"`predictions` {path}")
    assert "\n" not in said
    return said


def test_answers_are_read_back_as_they_were(tmp_path):
    path = filled(tmp_path / "answers.jsonl")
    again = opened(path)
    assert again.has(K4, range(4))
    assert again.of(K4) == [answer(i) for i in range(4)]
    assert not again.has(K2, [3])
    about = {"question": 3, "group": "data", "answer": "right", "text": "é 3\n", "nll": 0.1 * 3}
    assert lines_of(path)[0] == LINE | about
    assert path.read_bytes() == filled(tmp_path / "other.jsonl").read_bytes()


def test_a_batch_that_was_cut_short_is_missing_and_a_torn_line_is_cut_off(tmp_path):
    whole = filled(tmp_path / "whole.jsonl").read_bytes()
    ends = [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    path = tmp_path / "answers.jsonl"
    for end in sorted({*ends[1:], *range(ends[1], len(whole) + 1, 23)}):
        path.write_bytes(whole[:end])
        file = opened(path)
        left = sum(end >= at for at in ends) - 2  # whole answers
        assert [file.has(K4, batch) for batch in ([3, 0], [1, 2])] == [left >= 2, left == 4]
        assert path.read_bytes() == whole[: ends[left + 1]]


def test_a_hard_link_to_the_file_keeps_what_it_holds(tmp_path):
    whole = filled(tmp_path / "whole.jsonl").read_bytes()
    for torn in (b"", b"{"):
        path, kept = tmp_path / f"answers{len(torn)}.jsonl", tmp_path / f"kept{len(torn)}.jsonl"
        kept.write_bytes(whole + torn)
        os.link(kept, path)
        filled(path)
        assert kept.read_bytes() == whole + torn
        assert path.read_bytes().startswith(whole)
        assert path.stat().st_nlink == 1


def test_a_file_that_was_killed_in_its_first_line_is_begun_again(tmp_path):
    path = filled(tmp_path / "answers.jsonl")
    whole = path.read_bytes()
    assert json.loads(whole.splitlines()[0]) == {"evaluation": IDENTITY}
    for size in (0, 1, 16, 17, 100):
        path.write_bytes(whole[:size])
        assert filled(path).read_bytes() == whole


def test_what_is_not_a_predictions_file_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    for content in (
        *(b"my notes", b"my notes\n", b'{"prompt": "a"}\n', b'{"evaluation": 1}\n', b"[1]\n"),
        *(b"\x00\xff\x00", b"\n", b"[" * 100_000, b"e", b'{"evaluations"'),
    ):
        path.write_bytes(content)
        assert "is not a predictions file: name another" in refused(path)


def test_a_damaged_line_is_named(tmp_path):
    path = filled(tmp_path / "answers.jsonl")
    whole = path.read_bytes()
    untyped = json.dumps(LINE | {"text": None})
    strange = [{"nll": float("nan")}, {"nll": 10**400}, {"positions": 0}, {"prompt_tokens": 1.5}]
    strange += [{"k": [4]}, {"question": {}}, {"evaluation": [1]}, {"evaluation": {"a": 1}}]
    strange = [json.dumps(LINE | change) for change in strange]
    for line in ("{", "[1]", "7", "\x00", '{"method": "merged", "k": 4}', untyped, *strange):
        path.write_bytes(whole + f"{line}\n{json.dumps(LINE)}\n".encode())
        assert "line 6 is damaged" in refused(path)


def test_a_line_without_end_is_not_read_whole_and_the_file_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LINE_BYTES", 1 << 20)
    path = filled(tmp_path / "answers.jsonl")
    os.truncate(path, 1 << 40)  # sparse: a terabyte of zeros
    with pytest.raises(EvaluateError, match="line 6 is damaged"):
        opened(path)
    assert path.stat().st_size == 1 << 40


def test_what_an_earlier_release_wrote_of_a_file_is_known(tmp_path):
    path = tmp_path / "answers.jsonl"
    now, earlier = "c" * 64, IDENTITY["the base model"]
    filled(path)
    file = PredictionsFile(str(path), {"the base model": (now, earlier)}, 4)
    assert file.has(K4, range(4))
    with pytest.raises(EvaluateError, match="not the same: the base model"):
        PredictionsFile(str(path), {"the base model": (now, "d" * 64)}, 4)
    other = tmp_path / "other.jsonl"
    PredictionsFile(str(other), {"the base model": (now, earlier)}, 4)
    assert json.loads(other.read_text()) == {"evaluation": {"the base model": now}}


def test_a_folder_a_device_and_a_missing_folder_are_refused(tmp_path):
    assert refused(tmp_path).endswith("is not a file: name one")
    assert refused(Path(os.devnull)).endswith("is not a file: name one")
    os.mkfifo(tmp_path / "pipe")
    assert stored_date(str(tmp_path / "pipe")) is None  # at once: nobody writes into it
    assert refused(tmp_path / "no" / "answers.jsonl").endswith(": No such file or directory")


def test_a_full_disk_is_one_line_and_loses_no_earlier_answer(tmp_path, monkeypatch):
    path = filled(tmp_path / "answers.jsonl")
    file = opened(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvaluateError, match=r"answers\.jsonl: No space left on device"):
        file.add(K2, [0], [ASKED], [answer(0)])
    monkeypatch.undo()
    assert opened(path).of(K4) == [answer(i) for i in range(4)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), questions_of(12, 10))


@pytest.fixture(scope="module")
def flags(folders, data) -> tuple:
    return ("evaluate", *folders.flags(), "--data", data, "--k", 4, "--baseline", "mean", *QUICK)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, flags) -> tuple[str, bytes]:
    """What an evaluation prints, and its file."""
    path = tmp_path_factory.mktemp("unbroken") / "answers.jsonl"
    result = run(*flags, "--predictions", path)
    assert result.code == 0, result.err
    assert run(*flags).out == result.out
    return result.out, path.read_bytes()


@pytest.mark.parametrize("lines", [1, 9, 20])
def test_stopped_anywhere_it_goes_on_to_the_same_table(tmp_path, flags, unbroken, lines):
    path = tmp_path / "answers.jsonl"
    parts = unbroken[1].splitlines(keepends=True)
    assert len(parts) == 25
    path.write_bytes(b"".join(parts[:lines]) + parts[lines][:-7])
    result = run(*flags, "--predictions", path)
    assert (result.code, result.out) == (0, unbroken[0]), result.err
    whole = dict.fromkeys((("merged", 4), ("mean", 4)), 12)
    assert {method: len(of) for method, of in answers_of(path).items()} == whole


def test_another_k_and_another_baseline_go_on_with_the_file(
    tmp_path, monkeypatch, folders, data, unbroken
):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(unbroken[1])
    asked, plain = [], PredictionsFile.add

    def add(self, method, *answers):
        asked.append((method.name, method.k))
        plain(self, method, *answers)

    monkeypatch.setattr(PredictionsFile, "add", add)
    more = ("--k", 4, "--k", 2, "--baseline", "mean", "--baseline", "stride")
    flags = ("evaluate", *folders.flags(), "--data", data, *more, *QUICK)
    found = [run(*flags, "--predictions", path) for _ in range(2)]
    assert found[0].code == 0, found[0].err
    assert found[0] == found[1]
    assert set(asked) == {("merged", 2), ("mean", 2), ("stride", 2), ("stride", 4)}
    assert len(asked) == 4 * 3  # batches, all of the first run
    assert path.read_bytes().startswith(unbroken[1])
    rows = {(row["method"], row["k"]): row for row in json.loads(found[0].out)["rows"]}
    for row in json.loads(unbroken[0])["rows"]:
        assert rows[row["method"], row["k"]] == row


def test_another_evaluation_is_refused_by_name(tmp_path, folders, data, flags, unbroken):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(unbroken[1])
    others = write_folders(tmp_path / "others", (4,), intermediate_size=64)
    other_data = write_data(tmp_path / "data", questions_of(12, 10, seed=9))
    templated = copy_base(folders.base, tmp_path / "templated", TEMPLATE)
    different = {
        "same: the base model)": ("--model", others.base),
        "same: the questions)": ("--data", other_data),
        "same: --batch-size, 4 there and 5 here)": ("--batch-size", 5),
        "same: --max-tokens, 2 there and 3 here)": ("--max-tokens", 3),
        "the chat template, unused there and used here)": ("--model", templated),
        "same: the adapter for K=4)": ("--adapter-path", others.adapters),
    }
    for said, change in different.items():
        result = run(*flags, *change, "--predictions", path)
        assert_one_error(result, 1, f"--predictions {path} holds answers of another", said)
        assert path.read_bytes() == unbroken[1]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_and_started_again_it_prints_the_same(tmp_path, folders):
    """Killed, and then ended by Ctrl-C, each after some answers."""
    data = write_data(tmp_path / "data", labelled(["true", "false", "so so"] * 30))
    flags = ("evaluate", *folders.flags(), "--data", data, "--k", 4, "--baseline", "mean")
    flags += ("--batch-size", 1, "--timed", 0, "--json")
    path, lines = tmp_path / "answers.jsonl", 1 + 2 * 3 * 30  # of two methods, after the header
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        goal, arguments = lines_in(path) + 9, command(*flags, "--predictions", path)
        with subprocess.Popen(arguments, env=environment(), **pipes) as process:
            while process.poll() is None and lines_in(path) < goal:
                time.sleep(0.005)
            process.send_signal(number)
            out, err = process.communicate(timeout=600)
        assert (process.returncode, out) == (code, ""), err
        assert goal <= lines_in(path) < lines
    assert err.splitlines()[-1] == f"Stopped: the same command goes on with {path}"
    assert "Traceback" not in err
    resumed = run(*flags, "--predictions", path)
    assert (resumed.code, resumed.out) == (0, run(*flags).out), resumed.err
    assert lines_in(path) == lines
