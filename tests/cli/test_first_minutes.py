"""The first ten minutes: what a new user tries, forgets or mistypes, and what is said then."""

from __future__ import annotations

import importlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from tqdm import tqdm

from kmerge_mlx.cli import texts
from kmerge_mlx.cli.output import aligned, wrapped
from kmerge_mlx.cli.train import BAR
from tests.cli_runner import Stream, assert_one_error, run
from tests.doc_blocks import ROOT
from tests.tools import models

TREE = ROOT / "examples" / "tree.txt"


@pytest.fixture
def named(base_path, adapter_path) -> tuple[object, ...]:
    return "--model", base_path, "--adapter-path", adapter_path


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The bridge was closed in May, says the council.\n" * 4)
    return file


def test_without_an_adapter_k_1_reads_a_file_uncompressed(base_path, text):
    done = run("generate", "--model", base_path, "--k", 1, text, "-m", 2)
    assert done.code == 0, done.err
    assert f"Model: {base_path}, without an adapter: nothing merges\n" in done.err
    assert "(1.00x)" in done.err


def test_without_an_adapter_the_error_says_how_one_is_made(base_path, text):
    for k in ((), ("--k", 4)):
        said = run("generate", "--model", base_path, *k, text)
        command = f"`kmerge-mlx train --model {base_path} --data DIR --adapter-path OUT` trains one"
        assert_one_error(said, 1, "--k 1 to read without merging", command, "docs/guide.md")


def test_the_model_that_answers_is_named(named, text):
    done = run("generate", *named, text, "-m", 2)
    assert f"Model: {named[1]} with {named[3]} (K = 4)\n" in done.err


def test_the_bundled_model_does_not_answer_unasked_what_it_cannot_know(text, tmp_path):
    row = json.dumps({"prompt": text.read_text(), "completion": "June"})
    (tmp_path / "test.jsonl").write_text(row + "\n")
    said = "found neither --model nor --adapter-path, and the bundled model knows only"
    assert_one_error(run("generate", text), 1, said)
    assert_one_error(run("generate", "-p", "Who closed it?"), 1, said)
    assert_one_error(run("cache", text, "--prompt-cache-file", tmp_path / "c.safetensors"), 1, said)
    assert_one_error(run("chat", text), 1, said)
    assert_one_error(run("evaluate", "--data", tmp_path, "--timed", 0), 1, said)
    done = run("generate", TREE, "--k", 4)
    assert (done.code, done.out) == (0, "true\n")
    assert "note: no --model and no --adapter-path: the bundled model reads" in done.err
    assert done.err.count("bundled model") == 1
    assert run("generate", "--model", "bundled", text, "-m", 1).code == 0


def test_a_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "best").mkdir(parents=True)
    hub = "(a hub repo of that name is out/bets@main)"
    there = f"there is no out/bets here, did you mean out/best? {hub}"
    for flag in ("--model", "--adapter-path"):
        assert_one_error(run("generate", flag, "out/bets", text), 1, there)
    assert_one_error(run("evaluate", "--data", "out/bets"), 1, there)
    assert_one_error(run("generate", "--model", "out/x", text), 1, "no out/x here: look into out")
    # No folder of that name is here: it may be on the hub, which this test may not ask.
    for name in ("user/model", "out/bets@main"):
        assert_one_error(run("generate", "--model", name, text), 1, "HF_HUB_OFFLINE")


def test_what_is_no_text_is_called_what_it_is(named, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    for name, data, kind in (
        ("a.pdf", b"%PDF-1.7\n1 0 obj\n", "a PDF"),
        ("a.docx", packed.getvalue(), "a zip archive, as .docx, "),
        ("a.txt", "May".encode("utf-16"), "UTF-16"),
        ("a.gz", b"\x1f\x8b\x08", "compressed by gzip"),
        ("a.out", b"\x7fELF\0\0", "binary, not text"),
    ):
        (tmp_path / name).write_bytes(data)
        said = f"{tmp_path / name} is {kind}"
        assert_one_error(run("generate", *named, tmp_path / name), 1, said, "give its text")


def test_data_that_is_no_text_is_called_what_it_is(base_path, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"%PDF-1.7\n1 0 obj\n")
    said = f"{tmp_path / 'train.jsonl'} is a PDF: expected JSON, one example a line"
    made = ("--model", base_path, "--data", tmp_path, "--adapter-path", tmp_path / "out")
    assert_one_error(run("train", *made), 1, said)


def test_an_encoder_that_no_memory_holds_is_refused_before_it_is_made(base_path, tmp_path):
    row = json.dumps({"prompt": "The bridge was closed in May.", "completion": "June"})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 4)
    made = ("--model", base_path, "--data", tmp_path, "--adapter-path", tmp_path / "out")
    said = "has 12.29 billion parameters, and training it takes over"
    found = run("train", *made, "--k", 1000, "--encoder-factor", 1.5)
    assert_one_error(found, 1, f"the encoder of --k = 1000 {said}")
    assert not (tmp_path / "out").exists()


def test_data_has_its_own_name(base_path, adapter_path, tmp_path):
    folder, row = tmp_path / "bridges", json.dumps({"prompt": "Closed in May.", "completion": "So"})
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(f"{row}\n" * 4)
    named = ("--model", base_path, "--data", folder)
    out = ("--adapter-path", tmp_path / "out", "--iters", 1)
    assert "Data: bridges, 4 examples" in run("train", *named, *out).err
    told = run("evaluate", *named, "--adapter-path", adapter_path, "--timed", 0, "--json")
    assert json.loads(told.out)["groups"] == {"bridges": {"questions": 4, "labels": ["So"]}}


def test_without_an_adapter_for_k_1_uncompressed_is_called_the_base_without_adapter(
    base_path, adapter_path, tmp_path
):
    row = json.dumps({"prompt": "Closed in May.", "completion": "So"})
    (tmp_path / "test.jsonl").write_text(f"{row}\n" * 4)
    named = ("--model", base_path, "--data", tmp_path, "--adapter-path", adapter_path)
    asked = ("--baseline", "uncompressed", "--baseline", "base", "--timed", 0)
    table = run("evaluate", *named, *asked).out
    lines = [line.split("  ")[0] for line in table.splitlines()[2:]]
    assert lines == ["base without adapter", "K=4"]


def test_a_text_too_long_is_refused_before_all_of_it_is_tokenized(named, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(texts, "_PIECE", 1 << 12)
    real = texts.check_length

    def counted(text, tokenizer, *more):
        class Counting:
            def encode(self, piece, **options):
                read.append(len(piece))
                return tokenizer.encode(piece, **options)

        return real(text, Counting(), *more)

    monkeypatch.setattr("kmerge_mlx.cli.inputs.check_length", counted)
    file = tmp_path / "long.txt"
    file.write_text("so it goes on and on " * 40_000)
    said = "tokens at K = 4, and the model's context is 2,048: shorten it"
    assert_one_error(run("generate", *named, file), 1, said)
    assert 0 < sum(read) < 100_000


def test_a_k_larger_than_the_prompt_is_said(named):
    done = run("generate", *named, "-m", 1, "-", stdin=b"a")
    assert "note: 1 token to merge, fewer than K = 4" in done.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("train", "--train"), "--train: training is what this command does: remove it"),
        (("train", "--mask-prompt"), "--mask-prompt: the loss is always on answers alone"),
        (("lora", "--train"), "mlx-lm's lora is `kmerge-mlx train`"),
        (("server",), "mlx-lm's server is `kmerge-mlx serve`"),
        (("convert", "--hf-path", "x", "-q"), "`kmerge-mlx quantize` takes a --model"),
    ],
)
def test_habits_of_mlx_lm_get_the_right_hint(line, said):
    assert_one_error(run(*line), 2, said)


def test_stdout_is_clean_beside_json(named, text, monkeypatch):
    host = importlib.import_module("mlx_lm.generate")
    loud = host.generate_step

    def warns(*args, **options):
        print("[WARNING] Generating with a model that requires 99 MB")
        return loud(*args, **options)

    monkeypatch.setattr(host, "generate_step", warns)
    done = run("generate", *named, text, "-m", 1, "--json")
    assert json.loads(done.out)["generation_tokens"] == 1
    assert "[WARNING] Generating" in done.err


def test_tables_are_whole_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Stream(terminal=True))
    heads = ["", *(f"column {i}" for i in range(12))]
    lines = [heads, ["method", *(f"{i}.0% (0-9)" for i in range(12))]]
    table = aligned(lines).splitlines()
    assert max(map(len, table)) <= 80
    shown = [name for line in table if "column" in line for name in line.split("  ") if name]
    assert [name.strip() for name in shown] == heads[1:]
    assert sum(line.startswith("method ") for line in table) == len(table) // 3 + 1
    assert max(map(len, wrapped("many words " * 40).splitlines())) <= 80
    monkeypatch.setattr(sys, "stdout", Stream())
    assert len(aligned(lines).splitlines()) == 2  # in a file they are as wide as they are


def test_the_bar_is_whole_at_80_columns():
    told = "loss 12.34, 123,456 tok/s, 123.4 GB"
    shown = tqdm.format_meter(5000, 10_000, 4000, 80, "Training", bar_format=BAR, postfix=told)
    assert len(shown) <= 80
    assert shown.endswith(f", {told}]")


def test_ctrl_c_while_the_drift_is_measured_keeps_the_folder(tmp_path, monkeypatch):
    base, adapter = models.made(tmp_path)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kmerge_mlx.tools.fuse.Comparison.with_model", stopped)
    named = ("--model", base, "--adapter-path", adapter)
    for command, flag in (("quantize", "--mlx-path"), ("fuse", "--save-path")):
        done = run(command, *named, flag, tmp_path / command)
        assert done.code == 130
        assert "Stopped before the drift was measured: the folder is whole" in done.err
        assert run("generate", "--model", tmp_path / command, "-p", "x", "-m", 1).code == 0
        assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
