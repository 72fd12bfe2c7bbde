"""Bases, adapters, settings and words of strangers: one line at once, and never a terminal's code.

What a run's folder, a prompt cache or a predictions file could do is in the tests of each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from transformers import PreTrainedTokenizerBase

from kmerge_mlx import load
from kmerge_mlx.cli import texts
from kmerge_mlx.errors import AdapterError, ModelError, printable
from tests.cli_runner import Stream, assert_one_error, change_json, copy_base, run
from tests.conftest import UPSTREAM
from tests.tiny import qwen2_config, write_base

HIDES = "\x1b]0;title\x07\x1b[2J\u202e\x9b"  # a terminal's title, its screen, its direction
SHOWN = r"\x1b]0;title\x07\x1b[2J\u202e\x9b"


def refused(folder: Path, *args: object) -> str:
    with pytest.raises((ModelError, AdapterError)) as caught:
        load(str(folder), *args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "Nope"}},
        {"decoder": {"type": "Nope"}},
        {"normalizer": 3},
        {"model": 3},
        {"version": "9"},
        {"truncation": {"max_length": -1}},
    ],
    ids=str,
)
def test_a_tokenizer_that_its_library_refuses_is_one_line(base_path, tmp_path, part):
    base = copy_base(base_path, tmp_path / "base")
    change_json(base / "tokenizer.json", **part)
    assert refused(base).startswith(f"cannot load {base}: ")


def test_what_a_library_says_is_said_so_that_it_helps(base_path, tmp_path):
    base = copy_base(base_path, tmp_path / "base", num_hidden_layers=2)
    said = run("convert", UPSTREAM / "checkpoint", tmp_path / "out", "--model", base)
    assert_one_error(said, 1, "num_hidden_layers")
    change_json(base / "config.json", num_hidden_layers=3)
    (base / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "X"}}')
    assert refused(base).endswith("'added_tokens' is missing")


def test_weights_that_no_memory_holds_are_refused_before_they_are_read(tmp_path):
    """A sparse file: a terabyte that takes no room, and fits its config."""
    base = write_base(tmp_path / "base", qwen2_config())
    change_json(base / "config.json", vocab_size=1 << 32)
    file = base / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entry = {"dtype": "F32", "shape": [1 << 32, 64], "data_offsets": [0, 1 << 40]}
    header = json.dumps(json.loads(data[8 : 8 + size]) | {"model.embed_tokens.weight": entry})
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    os.truncate(file, 8 + len(header) + (1 << 40))
    assert "is of 1,100 GB of tensors, expected at most this machine's memory" in refused(base)


@pytest.mark.parametrize("rank", [65_537, 10**9, 2**62])
def test_a_rank_of_a_milliard_is_refused(base_path, adapter_path, tmp_path, rank):
    """Its tensors may have no other side, and so take no room in a file."""
    folder = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_parameters"]["rank"] = rank
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert f"LoRA with rank {rank} and scale" in refused(base_path, folder)


def test_what_a_strangers_file_says_is_written_out_for_a_terminal(
    base_path, adapter_path, tmp_path, monkeypatch
):
    adapter = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    merge = json.loads((adapter / "merge_config.json").read_text())["base_model"] | {"id": HIDES}
    change_json(adapter / "merge_config.json", base_model=merge)
    found = run("generate", "--adapter-path", adapter, "-p", "x")
    assert_one_error(found, 1, SHOWN)
    assert found.err.removesuffix("\n").isprintable()
    assert HIDES in json.loads(run("info", adapter, "--json").out)["adapters"][0]["base_model"]
    monkeypatch.setattr(Stream, "isatty", lambda stream: True)
    found = run("info", adapter)
    assert found.code == 0
    assert SHOWN in found.out
    assert found.out.replace("\n", "").isprintable()


def test_words_stay_words():
    for text in (
        "naïve\n\tcafé",
        "東京\u3000日本",
        "a\u00a0b",
        "👩🏽",
        "می\u200cروم",
        "👨\u200d👩\u200d👧",
        "-\\x1b-",
        "a\r\nb",
    ):
        assert printable(text) == text
    assert printable(HIDES) == SHOWN
    assert printable("paid\rfree") == "paid\\rfree"


def test_what_is_read_without_knowing_its_end_has_one(monkeypatch, base_path, adapter_path):
    monkeypatch.setattr(texts, "MAX_TEXT_BYTES", 1 << 20)
    named = ("--model", base_path, "--adapter-path", adapter_path)
    said = "holds over 1 MiB: no model reads that"
    assert_one_error(run("generate", "/dev/zero", *named), 1, f"/dev/zero {said}")
    text = b"a" * ((1 << 20) + 1)
    assert_one_error(run("generate", "-", *named, stdin=text), 1, f"stdin {said}")


def test_a_file_of_settings_is_bounded(tmp_path):
    file = tmp_path / "c.yaml"
    laughs = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    for content, said in (
        ("#" * ((1 << 20) + 1), "is larger than 1 MiB"),
        ("\n".join(["a0: &a0 [x]", *laughs]), "has over 20 aliases: write them out"),
        ("lora_parameters: &a {keys: *a}", "is not YAML: Circular reference"),
    ):
        file.write_text(content)
        assert_one_error(run("train", "-c", file), 2, said)
    assert_one_error(run("train", "-c", "/dev/zero"), 2, "is larger than 1 MiB")
    file.write_text("seed: &s 7\ndata_seed: *s\n")
    found = run("train", "-c", file, "--print-config")
    assert "seed: 7" in found.out


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise ValueError('ran')"


@pytest.fixture
def with_code(base_path, adapter_path, tmp_path):
    """A base with a Python file of its own, and an adapter that names that base."""
    base = copy_base(base_path, tmp_path / "base", model_file="evil.py")
    (base / "evil.py").write_text(CODE)
    adapter = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    merge = json.loads((adapter / "merge_config.json").read_text())["base_model"]
    change_json(adapter / "merge_config.json", base_model=merge | {"id": str(base)})
    return base, adapter


@pytest.mark.parametrize("name", ["generate", "cache", "evaluate", "train"])
def test_no_file_permits_code_or_chooses_whose_runs(with_code, tmp_path, name):
    base, adapter = with_code
    more = {"cache": ("--prompt-cache-file", tmp_path / "a.safetensors"), "train": ("--resume",)}
    more["evaluate"] = ("--data", tmp_path)
    args = (name, "--adapter-path", adapter, *more.get(name, ()))
    args += ("-p", "x") if name in ("generate", "cache") else ()
    said = "--trust-remote-code needs --model: no file chooses whose code runs"
    assert_one_error(run(*args, "--trust-remote-code"), 2, said)
    if name in ("evaluate", "train"):
        file = tmp_path / "c.yaml"
        file.write_text(f"trust_remote_code: true\nmodel: {base}\n")
        said = "--trust-remote-code in a file is not enough: give it as a flag, too"
        assert_one_error(run(*args, "-c", file), 2, said)
    assert not (base / "ran").exists()


def test_code_runs_where_the_command_asks_for_it(with_code):
    """So that the test above is about a file that would run."""
    base, adapter = with_code
    named = ("generate", "--model", base, "--adapter-path", adapter, "-p", "x")
    said = run(*named)
    assert_one_error(said, 1, "requires importing and running")
    assert "Pass --trust-remote-code if you trust this model" in said.err
    assert not (base / "ran").exists()
    assert_one_error(run(*named, "--trust-remote-code"), 1, "ran")
    assert (base / "ran").exists()


def test_ctrl_c_ends_a_chat_template_that_does_not_end(
    base_path, adapter_path, tmp_path, monkeypatch
):
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    base = copy_base(base_path, tmp_path / "base", loops)
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    named = ("--model", base, "--adapter-path")
    render = PreTrainedTokenizerBase.apply_chat_template

    def interrupted(*given, **options):
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        return render(*given, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", interrupted)
    asked = ("generate", *named, adapter_path, "--apply-chat-template", "-p", "x")
    for line in (asked, ("train", *named, tmp_path / "run", "--data", tmp_path)):
        assert run(*line).code == 130


def test_an_adapter_is_read_when_it_is_loaded(base_path, adapter_path, tmp_path):
    """What becomes of its files afterwards changes no answer."""
    folder = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    model, _ = load(str(base_path), folder, 4)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as opened:  # in place: the same file to whoever has it open
            opened.truncate(100)
    wanted = dict(tree_flatten(load(str(base_path), adapter_path, 4)[0].parameters()))
    for name, array in tree_flatten(model.parameters()):
        assert mx.array_equal(array, wanted[name])
