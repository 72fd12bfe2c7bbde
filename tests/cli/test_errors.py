"""Every error of ``kmerge-mlx`` is one message that says what to change, and an exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli_runner import (
    CHATML,
    assert_one_error,
    change_json,
    command,
    copy_base,
    environment,
    run,
    run_process,
)


@dataclass
class World:
    """What the commands below are given.

    Args:
        root: Where the files are; the commands run in it.
        base: The fixture's base.
        adapter: The fixture's adapter.
        checkpoint: The fixture's checkpoint.
    """

    root: Path
    base: Path
    adapter: Path
    checkpoint: Path

    def copy(self, source: Path, name: str) -> Path:
        """A copy of a fixture, to be broken."""
        return Path(shutil.copytree(source, self.root / name))

    def generate(self, *args: object, **options: object) -> list[object]:
        """``generate`` with the fixture's base and adapter, or with others instead."""
        given = {"model": self.base, "adapter_path": self.adapter} | options
        named = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
        pairs = [part for pair in named.items() if pair[1] is not None for part in pair]
        return ["generate", *pairs, *args]


@pytest.fixture
def world(tmp_path, monkeypatch, base_path, adapter_path, checkpoint_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("Tree: JN\n+WO")
    return World(tmp_path, base_path, adapter_path, checkpoint_path)


def folder_with(world: World, **files: object) -> Path:
    folder = world.root / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def file_of(world: World, data: bytes) -> str:
    (world.root / "given.txt").write_bytes(data)
    return "given.txt"


def other_base(world: World, **config: object) -> Path:
    return copy_base(world.base, world.root / "other", **config)


def torn_base(world: World) -> Path:
    folder = world.copy(world.base, "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


def nameless_adapter(world: World) -> Path:
    folder = world.copy(world.adapter, "nameless")
    change_json(folder / "merge_config.json", base_model=None)
    return folder


def two_adapters(world: World) -> Path:
    for k in (2, 4):
        world.copy(world.adapter, f"both/k{k}")
    change_json(world.root / "both/k2/merge_config.json", merge_factor=2)
    return world.root / "both"


def homeless_adapter(world: World) -> Path:
    folder = world.copy(world.adapter, "homeless")
    change_json(folder / "merge_config.json", base_model={"id": "no/such-base"})
    return folder


Case = tuple[str, Callable[[World], list[object]], list[str]]
PROMPTS: list[Case] = [
    ("a missing file", lambda w: w.generate("no.txt"), ["cannot read no.txt: No such file"]),
    ("a folder as a file", lambda w: w.generate("."), ["cannot read .: Is a directory"]),
    ("an empty file", lambda w: w.generate(file_of(w, b"")), ["given.txt is empty: put the"]),
    ("a name too long", lambda w: w.generate("x" * 5000), ["File name too long"]),
    ("an empty prompt", lambda w: w.generate("-p", ""), ["--prompt is empty: leave it out, or"]),
    ("no prompt", lambda w: w.generate(), ["the prompt is empty: give a FILE", "--prompt"]),
    ("stdin twice", lambda w: w.generate("-", "-p", "-"), ["`-` is given more than once"]),
    ("an empty stdin", lambda w: w.generate("-"), ["stdin is empty"]),
    (
        "a file that is not UTF-8",
        lambda w: w.generate(file_of(w, b"caf\xe9.")),
        ["given.txt is not UTF-8: byte 3 is 0xe9; save the file as UTF-8"],
    ),
    (
        "a UTF-16 file",
        lambda w: w.generate(file_of(w, "Tree".encode("utf-16"))),
        ["given.txt is not UTF-8: byte 0 is 0xff"],
    ),
    (
        "a prompt past the context",
        lambda w: w.generate(file_of(w, b"ABCD" * 5000)),
        ["and the model's context is 2,048: shorten it, or use an adapter with a larger K"],
    ),
]
ADAPTERS: list[Case] = [
    ("a K that is not there", lambda w: w.generate("p.txt", k=3), ["for --k 3: it has K = 4"]),
    (
        "several K and no choice",
        lambda w: w.generate("p.txt", adapter_path=two_adapters(w)),
        ["both holds adapters for K = 2, 4: choose one with --k"],
    ),
    ("no adapter for a FILE", lambda w: w.generate("p.txt", adapter_path=None), ["--adapter-path"]),
    (
        "no adapter for a K",
        lambda w: w.generate("-p", "x", adapter_path=None, k=4),
        ["--k 4 needs a merge encoder: give --adapter-path"],
    ),
    (
        "an adapter that is not there",
        lambda w: w.generate("p.txt", adapter_path="no"),
        ["no is not a folder: expected an adapter"],
    ),
    (
        "a folder that is no adapter",
        lambda w: w.generate("p.txt", adapter_path=folder_with(w)),
        ["is no adapter folder: merge_config.json is missing"],
    ),
    (
        "a PyTorch checkpoint",
        lambda w: w.generate("p.txt", adapter_path=w.checkpoint),
        ["is a PyTorch checkpoint: run `kmerge-mlx convert "],
    ),
    (
        "an mlx-lm adapter",
        lambda w: w.generate("p.txt", adapter_path=folder_with(w, adapter_config={"rank": 4})),
        ["is an mlx-lm adapter without a merge encoder", "mlx_lm.generate"],
    ),
    (
        "a PEFT adapter",
        lambda w: w.generate("p.txt", adapter_path=folder_with(w, adapter_config={"peft_type": 1})),
        ["is a PEFT adapter without a merge encoder: convert the whole checkpoint"],
    ),
    (
        "a base model",
        lambda w: w.generate("p.txt", adapter_path=w.base),
        ["is a base model, not an adapter: give it as --model"],
    ),
    (
        "an adapter for another width",
        lambda w: w.generate("p.txt", model=other_base(w, hidden_size=32)),
        ["the adapter does not fit", "hidden_size is 32, the adapter was made for 64"],
    ),
    (
        "an adapter for another RoPE",
        lambda w: w.generate("p.txt", model=other_base(w, rope_parameters={"rope_theta": 5e5})),
        ["rope_theta is 500000.0, the adapter was made for 10000.0"],
    ),
    (
        "an adapter for another depth and vocabulary",
        lambda w: w.generate("p.txt", model=other_base(w, num_hidden_layers=2, vocab_size=800)),
        [": 2 problems\n  - num_hidden_layers is 2, ", "\n  - vocab_size is 800, "],
    ),
]
BASES: list[Case] = [
    (
        "an adapter that names no base",
        lambda w: w.generate("p.txt", model=None, adapter_path=nameless_adapter(w)),
        ["nameless does not name its base model: give --model"],
    ),
    (
        "an adapter whose base is gone",
        lambda w: w.generate("p.txt", model=None, adapter_path=homeless_adapter(w)),
        ["no/such-base", "homeless names this base; --model gives another"],
    ),
    (
        "a base that is not there",
        lambda w: w.generate("p.txt", model="/no/such/base"),
        ["/no/such/base is neither a folder nor the name of a hub repo"],
    ),
    (
        "a base whose name is too long",
        lambda w: w.generate("p.txt", model="x" * 5000),
        ["too long"],
    ),
    (
        "a hub name without the hub",
        lambda w: w.generate("p.txt", model="some/base"),
        ["some/base is no folder here and not in the cache", "HF_HUB_OFFLINE"],
    ),
    (
        "a file as a base",
        lambda w: w.generate("p.txt", model="p.txt"),
        ["--model p.txt is a file: give the folder that holds config.json"],
    ),
    (
        "a base without its config",
        lambda w: w.generate("p.txt", model=folder_with(w)),
        ["holds no config.json: --model takes a base model"],
    ),
    (
        "a torn base",
        lambda w: w.generate("p.txt", model=torn_base(w)),
        ["cannot load", "[load_safetensors]"],
    ),
    (
        "an architecture that mlx-lm lacks",
        lambda w: w.generate("-p", "x", model=other_base(w, model_type="nope"), adapter_path=None),
        ["cannot load", "nope"],
    ),
]
OPTIONS: list[Case] = [
    (
        "a top-k past the vocabulary",
        lambda w: w.generate("p.txt", "--temp", 1, "--top-k", 701),
        ["mlx-lm refused these options: `top_k`", "700"],
    ),
    (
        "a head that kv-bits cannot group",
        lambda w: w.generate("p.txt", "--kv-bits", 4, "--quantized-kv-start", 0),
        ["mlx-lm refused these options: --kv-bits and --kv-group-size: ", "group size 64"],
    ),
    (
        "an end-of-text token that is none",
        lambda w: w.generate("p.txt", "--extra-eos-token", "nope"),
        ["--extra-eos-token nope: the tokenizer has no such token"],
    ),
    (
        "an end-of-text number past the vocabulary",
        lambda w: w.generate("p.txt", "--extra-eos-token", "700"),
        ["--extra-eos-token 700: "],
    ),
    (
        "template options without a template",
        lambda w: w.generate("p.txt", "--system-prompt", "Be brief."),
        ["--system-prompt", "need a chat template: this tokenizer has none"],
    ),
    (
        "template options for an ignored template",
        lambda w: w.generate(
            *("p.txt", "--chat-template-config", '{"a": 1}', "--ignore-chat-template"),
            model=copy_base(w.base, w.root / "chat", CHATML),
        ),
        ["need a chat template: it is left out", "--apply-chat-template applies it"],
    ),
]
MISUSE: list[Case] = [
    ("no tokens", lambda w: w.generate("p.txt", "-m", 0), ["--max-tokens: 0 generates nothing"]),
    (
        "a word for a number",
        lambda w: w.generate("p.txt", "-m", "ten"),
        ["--max-tokens", "integer"],
    ),
    ("a draft model", lambda w: w.generate("p.txt", "--draft-model", "x"), ["--draft-model"]),
    ("a negative temperature", lambda w: w.generate("p.txt", "--temp", -1), ["--temp"]),
    ("a temperature that is no number", lambda w: w.generate("p.txt", "--temp", "nan"), ["--temp"]),
    ("bits MLX lacks", lambda w: w.generate("p.txt", "--kv-bits", 7), ["7 is none of 2, 3, 4, 5"]),
    ("a group MLX lacks", lambda w: w.generate("p.txt", "--kv-group-size", 48), ["32, 64, 128"]),
    (
        "a bounded cache that is quantized",
        lambda w: w.generate("p.txt", "--kv-bits", 4, "--max-kv-size", 64),
        ["--kv-bits", "--max-kv-size"],
    ),
    (
        "template options that are not JSON",
        lambda w: w.generate("p.txt", "--chat-template-config", "{"),
        ["--chat-template-config: not JSON"],
    ),
    (
        "template options that are a list",
        lambda w: w.generate("p.txt", "--chat-template-config", "[1]"),
        ["--chat-template-config: not a JSON object"],
    ),
    ("bytes that are no text", lambda w: w.generate("-p", "\udcff"), ["--prompt", "not UTF-8"]),
    ("an unknown command", lambda w: ["talk"], ["No such command 'talk'", "kmerge-mlx --help"]),
    ("too few arguments", lambda w: ["convert", "x"], ["Missing argument 'DST'", "convert --help"]),
]


def named(cases: list[Case]) -> pytest.MarkDecorator:
    parameters = [pytest.param(arguments, said, id=name) for name, arguments, said in cases]
    return pytest.mark.parametrize(("arguments", "said"), parameters)


@named(PROMPTS + ADAPTERS + BASES + OPTIONS)
def test_a_fault_of_the_input_is_one_message_and_exit_code_1(world, arguments, said):
    assert_one_error(run(*arguments(world)), 1, *said)


@named(MISUSE)
def test_a_misused_command_line_is_one_message_and_exit_code_2(world, arguments, said):
    assert_one_error(run(*arguments(world)), 2, *said)


def test_a_closed_stdin_is_an_error(world):
    assert_one_error(run(*world.generate("-"), stdin=None), 1, "cannot read stdin: it is closed")


def test_an_error_before_the_first_token_leaves_json_empty_too(world):
    assert_one_error(run(*world.generate("p.txt", "--json", k=2)), 1, "--k 2")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("convert", "no/such", "dst"), "no/such is no folder here"),
        (("convert", "p.txt", "dst"), "p.txt is a file"),
        (("convert", ".", "dst"), "holds no encoder.pth and no adapter_config.json"),
        (("convert", ".", "."), "choose another folder, or give --force"),
        (("convert", ".", ".", "--force"), "--force replaces nothing else"),
        (("info", "no"), "no is not a folder"),
        (("info", "."), "is no adapter folder"),
        (("info", "x" * 5000), "File name too long"),
    ],
)
def test_convert_and_info_say_what_they_did_not_find(world, args, said):
    before = sorted(world.root.iterdir())
    assert_one_error(run(*args), 1, said)
    assert sorted(world.root.iterdir()) == before


def test_errors_look_the_same_from_a_shell(world):
    result = run_process(*world.generate("no.txt"), cwd=world.root)
    assert_one_error(result, 1, "cannot read no.txt")


@pytest.mark.parametrize("args", [("info", "."), ("--help",)])
def test_a_full_disk_is_one_message(world, args):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (world.root / "config.json").write_text('{"model_type": "qwen2"}')
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command(*args), env=environment(), stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == b"error: [Errno 28] No space left on device\n"
