"""Every error of ``kmerge-mlx`` is one message that says what to change, and an exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx_lm.generate  # noqa: F401
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


@pytest.fixture(scope="module")
def root(tmp_path_factory, base_path, adapter_path):
    """Files, bases and adapters, most of which have a fault."""
    root = tmp_path_factory.mktemp("world")
    (root / "p.txt").write_text("Tree: JN\n+WO")
    (root / "empty.txt").write_bytes(b"")
    (root / "latin.txt").write_bytes(b"caf\xe9.")
    (root / "long.txt").write_bytes(b"ABCD" * 5000)
    (root / "bare").mkdir()
    for name, content in (("lora", {"rank": 4}), ("peft", {"peft_type": "LORA"})):
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(json.dumps(content))
    weights = copy_base(base_path, root / "torn") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    copy_base(base_path, root / "narrow", hidden_size=32)
    copy_base(base_path, root / "shallow", num_hidden_layers=2, vocab_size=800)
    copy_base(base_path, root / "odd", model_type="nope")
    copy_base(base_path, root / "chatty", CHATML)
    for name, change in (
        ("nameless", {"base_model": None}),
        ("homeless", {"base_model": {"id": "no/such-base"}}),
        *((f"both/k{k}", {"merge_factor": k}) for k in (2, 4)),
    ):
        shutil.copytree(adapter_path, root / name)
        change_json(root / name / "merge_config.json", **change)
    return root


@pytest.fixture
def generate(root, monkeypatch, base_path, adapter_path):
    """Makes the command line of ``generate`` with the fixture's models, or with others instead."""
    monkeypatch.chdir(root)

    def make(*args, **options):
        given = {"model": base_path, "adapter_path": adapter_path} | options
        named = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
        return ["generate", *[x for p in named.items() if p[1] is not None for x in p], *args]

    return make


FILES = [
    (["no.txt"], "cannot read no.txt: No such file"),
    (["empty.txt"], "empty.txt is empty: put the"),
    (["latin.txt"], "latin.txt is not UTF-8: byte 3 is 0xe9; save the file as UTF-8"),
    (["-p", ""], "--prompt is empty: leave it out, or"),
    ([], "the prompt is empty: give a FILE to compress, or --prompt"),
    (["-", "-p", "-"], "`-` is given more than once"),
    (["-"], "stdin is empty"),
    (["long.txt"], "and the model's context is 2,048: shorten it, or use an adapter with a larger"),
    (
        ["p.txt", "--kv-bits", 4, "--quantized-kv-start", 0],
        "mlx-lm refused these options: --kv-bits and --kv-group-size: ",
    ),
    (["p.txt", "--extra-eos-token", "nope"], "--extra-eos-token nope: the tokenizer has no such"),
    (
        ["p.txt", "--system-prompt", "x"],
        "--system-prompt cannot be used without a chat template: this tokenizer has none",
    ),
]
MODELS = [
    ({"k": 3}, "--k 3: it has K = 4"),
    ({"adapter_path": "both"}, "both holds adapters for K = 2, 4: choose one with --k"),
    (
        {"adapter_path": None},
        "a FILE merges, and there is no merge encoder: give --adapter-path, or --k 1",
    ),
    (
        {"adapter_path": None, "k": 4},
        "--k is 4, and there is no merge encoder: give --adapter-path",
    ),
    ({"model": "narrow"}, "hidden_size is 32, the adapter was made for 64"),
    ({"model": "shallow"}, ": 2 problems\n  - num_hidden_layers is 2, "),
    ({"model": None, "adapter_path": "nameless"}, "does not name its base model: give --model"),
    ({"model": None, "adapter_path": "homeless"}, "homeless names this base; --model gives"),
    ({"model": "/no/such/base"}, "/no/such/base is neither a folder nor"),
    ({"model": "some/base"}, "HF_HUB_OFFLINE"),
    ({"model": "p.txt"}, "p.txt is a file"),
    ({"model": "torn"}, "cannot load torn"),
]
MISUSE = [
    (["-m", 0], "--max-tokens is 0, which generates nothing"),
    (["--draft-model", "x"], "--draft-model"),
    (["--kv-bits", 7], "--kv-bits is 7, expected one of 2, 3, 4, 5"),
    (["--kv-bits", 4, "--max-kv-size", 64], "mlx-lm cannot quantize a cache with --max-kv-size"),
    (["--chat-template-config", "{"], "--chat-template-config is not JSON"),
    (["-p", "\udcff"], "--prompt is not UTF-8"),
]


@pytest.mark.parametrize(
    ("code", "args", "options", "said"),
    [
        *((1, args, {}, said) for args, said in FILES),
        *((1, ["p.txt"], options, said) for options, said in MODELS),
        *((2, ["p.txt", *args], {}, said) for args, said in MISUSE),
    ],
    ids=str,
)
def test_a_fault_is_one_message_and_an_exit_code(generate, code, args, options, said):
    assert_one_error(run(*generate(*args, **options)), code, said)


def test_other_faults_are_one_message(generate, checkpoint_path):
    found = run(*generate("p.txt", adapter_path=checkpoint_path))
    assert_one_error(found, 1, "is a PyTorch checkpoint: run `kmerge-mlx convert ")
    found = run(*generate("-p", "x", model="odd", adapter_path=None))
    assert_one_error(found, 1, "nope")
    args = ("p.txt", "--chat-template-config", '{"a": 1}', "--ignore-chat-template")
    found = run(*generate(*args, model="chatty"))
    assert_one_error(found, 1, "it is left out here; --apply-chat-template applies it")
    assert_one_error(run("talk"), 2, "No such command 'talk'", "kmerge-mlx --help")
    assert_one_error(run("convert", "x"), 2, "Missing argument 'DST'", "convert --help")
    assert_one_error(run(*generate("-"), stdin=None), 1, "cannot read stdin: it is closed")
    assert_one_error(run(*generate("p.txt", "--json", k=2)), 1, "--k 2")


def test_a_template_that_is_not_there_cannot_be_applied(base_path, adapter_path, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "a b c d", "completion": "e"}\n')
    named = ("--model", base_path, "--adapter-path", adapter_path, "--apply-chat-template")
    said = "--apply-chat-template: this tokenizer has no chat template: leave it out, or use a base"
    for args in (
        ("generate", "-p", "x", *named),
        ("evaluate", "--data", tmp_path, *named),
        ("serve", "--port", 0, *named),
    ):
        assert_one_error(run(*args), 1, said)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("convert", "lora", "peft"), "choose another folder"),
        (("info", "no"), "no is not a folder"),
    ],
)
def test_convert_and_info_say_what_they_did_not_find(root, monkeypatch, args, said):
    monkeypatch.chdir(root)
    before = sorted(Path().iterdir())
    assert_one_error(run(*args), 1, said)
    assert sorted(Path().iterdir()) == before


@pytest.mark.slow
def test_errors_look_the_same_from_a_shell(generate):
    assert_one_error(run_process(*generate("no.txt"), cwd=Path()), 1, "cannot read no.txt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_message():
    where = {"env": environment(), "stderr": subprocess.PIPE, "timeout": 60}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command("--version"), stdout=full, **where)
    assert done.returncode == 1
    assert done.stderr == b"error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            "the memory ran out ([METAL] Command",
        ),
        ("[metal::malloc] Attempting to allocate 9 bytes which is", "the memory ran out ([metal"),
        ("[malloc_or_wait] Unable to allocate 9 bytes.", "the memory ran out ([malloc"),
        (
            "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
            "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
            "macOS ended a GPU program that took too long ([METAL]",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_one_line_with_what_helps(monkeypatch, generate, said, wanted):
    """The messages are those of MLX's Metal backend, which cannot be had here."""

    def fails(*args, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "generate_step", fails)
    result = run(*generate("p.txt"))
    assert_one_error(result, 1, wanted, "try a smaller --prefill-step-size, a larger --k")
    assert "batch" not in result.err


def test_any_other_error_of_mlx_is_a_bug_and_not_hidden(monkeypatch, generate):
    def fails(*args, **options):
        raise RuntimeError("[matmul] shapes do not fit")

    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "generate_step", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(*generate("p.txt"))
