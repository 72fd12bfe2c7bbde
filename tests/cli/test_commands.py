"""The ``kmerge-mlx`` command: what it prints where, and that its options do what mlx-lm's do."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import setup_arg_parser
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from transformers import PreTrainedTokenizerBase
from typer.main import get_command

import kmerge_mlx.generation.stream
from kmerge_mlx import __version__, compress, lay_out, load, stream_generate
from kmerge_mlx.cli import app, texts
from kmerge_mlx.cli.generate import GenerateSettings
from kmerge_mlx.prompts import lay_out as layout
from kmerge_mlx.prompts import tags
from kmerge_mlx.settings import Settings
from tests.cli_runner import (
    CHATML,
    assert_one_error,
    change_json,
    command,
    copy_base,
    environment,
    run,
)
from tests.conftest import UPSTREAM

EXPECTED = json.loads((UPSTREAM / "expected.json").read_text())
TREE = "Tree: JN\n+WO\n++UP\n++JG\n"
KEYS = {
    *("text", "tokens", "prompt_tokens", "compressed_tokens", "compression_ratio"),
    *("time_to_first_token", "prompt_tps", "generation_tokens", "generation_tps"),
    *("peak_memory", "finish_reason"),
}
COMMANDS = (
    *("bench", "cache", "chat", "convert", "data", "evaluate", "export"),
    *("fuse", "generate", "info", "quantize", "serve", "train", "upload"),
)


@pytest.fixture(scope="module")
def endless(base_path, tmp_path_factory):
    """The fixture's base with another end-of-text token, which it never writes of itself."""
    folder = copy_base(base_path, tmp_path_factory.mktemp("bases") / "endless", eos_token_id=2)
    change_json(folder / "generation_config.json", eos_token_id=2)
    change_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    return folder


@pytest.fixture(scope="module")
def llm(endless, adapter_path):
    """The endless base with the fixture's adapter, and its tokenizer."""
    return load(str(endless), adapter_path, 4)


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "tree.txt"
    path.write_text(TREE)
    return path


@pytest.fixture
def ask(endless, adapter_path):
    """Runs ``generate --json`` on the endless base; returns the object."""

    def run_json(*args, **how):
        named = ("generate", "--model", endless, "--adapter-path", adapter_path, "--json")
        result = run(*named, *args, **how)
        assert (result.code, result.out.count("\n")) == (0, 1), result.err
        assert all(line.startswith("note: ") for line in result.err.splitlines()), result.err
        return json.loads(result.out)

    return run_json


def test_every_command_explains_itself_with_examples_and_imports_neither_mlx_nor_transformers():
    code = (
        "import sys\n"
        "from kmerge_mlx.cli import main\n"
        f"for args in {[(), *((name,) for name in COMMANDS)]}:\n"
        "    sys.argv = ['kmerge-mlx', *args, '-h']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'numpy', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    line = [sys.executable, "-c", code]
    out = subprocess.run(line, check=True, capture_output=True, text=True, timeout=60).stdout
    _, *pages = out.split("Usage: ")
    group = get_command(app)
    for name, page in zip(("", *COMMANDS), pages, strict=True):
        assert page.startswith(f"kmerge-mlx {name}")
        examples = page.split("Examples:\n")[1].split("\n\n")[0].splitlines()
        assert len(examples) >= 2
        for example in examples:
            line = example.partition("kmerge-mlx ")[2].partition(" > ")[0]
            named, *args = shlex.split(line)
            group.commands[named].make_context(named, args)  # a line that it takes


def test_the_script_is_installed_and_needs_a_command():
    assert run("--version").out == f"kmerge-mlx {__version__}\n"
    (script,) = entry_points(group="console_scripts", name="kmerge-mlx")
    assert script.value == "kmerge_mlx.cli:main"
    result = run()
    assert (result.code, result.out) == (2, "")
    assert "Commands:" in result.err


def test_the_defaults_are_mlx_lms():
    theirs = vars(setup_arg_parser().parse_args([]))
    ours = {f.name: f.default for f in fields(GenerateSettings)}
    differ = {n for n, value in ours.items() if n in theirs and theirs[n] not in (value, None)}
    assert differ <= {"prompt", "extra_eos_token"}  # mlx-lm's is "hello", and a list
    assert len(set(ours) & set(theirs)) > 18


def test_the_text_is_alone_on_stdout_and_the_statistics_are_on_stderr(adapter_path, tree):
    result = run("generate", "--adapter-path", adapter_path, tree)  # which names its base
    assert (result.code, result.out) == (0, "false\n")
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Model",
        "Prompt",
        "Generation",
        "Peak memory",
    ]
    assert lines[1].startswith("Prompt: 15 tokens in 4 positions (3.75x), ")


@pytest.fixture
def start(endless, adapter_path, tree):
    """Starts ``generate`` on the endless base in a process of its own."""
    named = ("--model", endless, "--adapter-path", adapter_path, tree)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return lambda *args: subprocess.Popen(
        command("generate", *named, *args), env=environment(), **pipes
    )


@pytest.mark.slow
def test_the_text_streams_and_ctrl_c_ends_it(start):
    with start("-m", -1) as process:
        assert process.stdout.read(len("false<|")) == b"false<|"
        assert process.poll() is None  # it had no end to wait for
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert rest.endswith(b"\n")  # the shell's prompt begins a line


@pytest.mark.slow
@pytest.mark.parametrize("args", [("-m", -1), ("--json", "-m", 9)])
def test_a_reader_that_leaves_early_causes_no_complaint(start, args):
    with start(*args) as process:
        assert "--json" in args or process.stdout.read(1) == b"f"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_json_is_one_object_with_exactly_the_promised_keys(adapter_path, tree):
    result = run("generate", "--adapter-path", adapter_path, tree, "--json")
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    assert set(answer) == KEYS
    assert (answer["text"], answer["finish_reason"]) == ("false", "stop")
    assert answer["tokens"] == [284, 287]  # without the end-of-text token
    assert answer["generation_tokens"] == 3
    assert (answer["prompt_tokens"], answer["compressed_tokens"]) == (15, 4)
    assert answer["compression_ratio"] == 15 / 4
    assert answer["prompt_tps"] == pytest.approx(15 / answer["time_to_first_token"])


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda c: c["prompt"][:12].strip())
def test_greedy_tokens_are_those_of_the_authors_code(ask, tmp_path, case):
    path = tmp_path / "prompt.txt"
    path.write_text(case["prompt"], encoding="utf-8-sig")  # with a byte-order mark
    answer = ask(path, "-m", 16)
    assert answer["tokens"] == case["greedy"]
    assert answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] == len(case["ids"])
    assert answer["compressed_tokens"] == -(-len(case["ids"]) // 4)


A, B = "One two three.\r\n", "Four five."


@pytest.mark.parametrize(
    ("args", "stdin", "context", "prompt"),
    [
        (["a.txt"], b"", A, None),
        (["a.txt", "b.txt"], b"", f"{A}\n\n{B}", None),
        (["a.txt", "b.txt", "--prompt", "Which?"], b"", f"{A}\n\n{B}", "Which?"),
        (["a.txt", "-"], b"Six seven.", f"{A}\n\nSix seven.", None),
        (["a.txt", "-p", "-"], b"Which \\n?", A, "Which \\n?"),
        (["-p", r"Which\nof\tthem?"], b"", None, "Which\nof\tthem?"),
    ],
)
def test_files_are_merged_and_the_prompt_is_not(
    ask, llm, tmp_path, monkeypatch, args, stdin, context, prompt
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(A.encode())
    (tmp_path / "b.txt").write_text(B)
    expected = compress(*llm, lay_out(llm[1], context, prompt))
    answer = ask(*args, "-m", 12, stdin=stdin)
    assert answer["prompt_tokens"] == len(expected.original_ids)
    assert answer["compressed_tokens"] == len(expected.ids)
    assert answer["tokens"] == [r.token for r in stream_generate(*llm, expected, 12)]


@pytest.mark.parametrize(
    ("sampling", "penalties"),
    [
        ({"temp": 0.8, "top_k": 3}, {}),
        ({"temp": 1.5, "top_p": 0.9}, {}),
        ({"temp": 2.0, "min_p": 0.01, "min_tokens_to_keep": 5}, {}),
        ({"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.05}, {}),
        ({}, {"repetition_penalty": 1.7, "repetition_context_size": 9}),
        ({}, {"presence_penalty": 4.0, "presence_context_size": 7}),
        ({}, {"frequency_penalty": 2.0, "frequency_context_size": 11}),
    ],
    ids=str,
)
def test_sampling_options_are_mlx_lms(ask, llm, tree, sampling, penalties):
    options = sampling | penalties
    args = [x for n, v in options.items() for x in (f"--{n.replace('_', '-')}", v)]
    answer = ask(tree, "-m", 24, "--seed", 7, *args)
    model, tokenizer = llm
    special = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
    sampler = make_sampler(**({"temp": 0.0} | sampling), xtc_special_tokens=special)
    mx.random.seed(7)
    responses = stream_generate(
        *(model, tokenizer, lay_out(tokenizer, TREE, None), 24),
        sampler=sampler,
        logits_processors=make_logits_processors(**penalties),
    )
    assert answer["tokens"] == [r.token for r in responses if r.finish_reason != "stop"]
    assert ask(tree, "-m", 24, "--seed", 7, *args)["tokens"] == answer["tokens"]
    assert answer["tokens"][:8] != [284, 287, 0, 287, 0, 287, 0, 287]  # what greedy writes


def test_cache_options_reach_mlx_lm(ask, tree, monkeypatch):
    given, host = [], kmerge_mlx.generation.stream.host_stream_generate
    monkeypatch.setattr(
        kmerge_mlx.generation.stream,
        "host_stream_generate",
        lambda *args, **options: given.append(options) or host(*args, **options),
    )
    ask(tree, "-m", 2)
    ask(tree, "-m", 2, "--max-kv-size", 16, "--prefill-step-size", 7)
    ask(tree, "-m", 2, "--kv-bits", 8, "--kv-group-size", 32, "--quantized-kv-start", 9000)
    names = ("max_kv_size", "prefill_step_size", "kv_bits", "kv_group_size", "quantized_kv_start")
    assert [[options[name] for name in names] for options in given] == [
        [None, 2048, None, 64, 5000],
        [16, 7, None, 64, 5000],
        [None, 2048, 8, 32, 9000],
    ]


def test_an_extra_end_of_text_token_ends_the_text(ask, tree):
    for token in ("<|endoftext|>", "0"):
        more = ("--extra-eos-token", "<|im_start|>", "--extra-eos-token", token)
        answer = ask(tree, "-m", 9, *more)
        assert (answer["tokens"], answer["finish_reason"]) == ([284, 287], "stop")


def test_a_terminal_that_lacks_a_letter_gets_a_question_mark(endless):
    args = ("generate", "--model", endless, "-p", "漢", "--temp", 3, "--seed", 5, "-m", 60)
    text = run(*args).out
    assert not text.isascii()
    narrow = run(*args, encoding="ascii")
    assert narrow.code == 0
    assert narrow.out == text.encode("ascii", "replace").decode()


def test_a_long_prompt_shows_its_progress_on_a_terminal_alone(endless):
    args = ("generate", "--model", endless, "-p", TREE * 20, "-m", 2, "--prefill-step-size", 50)
    shown = run(*args, terminal=True)
    assert shown.code == 0
    assert "Reading:  " in shown.err
    for result in (run(*args), run(*args[:-1], 5000, terminal=True)):
        assert result.code == 0
        assert "Reading" not in result.err


# One ``generate`` reads the adapter's config once, parses the tags once, encodes the text once


CONTEXT, QUESTION = "One <merge>two three</merge> four.", "Which of <raw>them</raw>?"


@pytest.fixture
def counted(monkeypatch):
    """How often each file was opened, and each text parsed or encoded."""
    found = Counter()

    def count(owner, name, what, place):
        inner = getattr(owner, name)

        def counting(*args, **options):
            found[f"{what} {args[place]}"] += 1
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    count(Path, "open", "opened", 0)
    for module in (tags, layout, texts):
        count(module, "parse", "parsed", 0)
    for name in ("__call__", "encode"):
        count(PreTrainedTokenizerBase, name, "encoded", 1)
    return found


@pytest.mark.parametrize("template", [False, True])
def test_everything_is_read_once(counted, base_path, adapter_path, tmp_path, template):
    base = copy_base(base_path, tmp_path / "base", CHATML)
    (tmp_path / "context.txt").write_text(CONTEXT)
    args = ("--model", base, "--adapter-path", adapter_path, "--k", 4, "-m", 2)
    args += ("--apply-chat-template",) * template
    counted.clear()
    done = run("generate", *args, tmp_path / "context.txt", "-p", QUESTION)
    assert done.code == 0, done.err
    configs = (adapter_path / name for name in ("merge_config.json", "adapter_config.json"))
    for name in (*configs, tmp_path / "context.txt"):
        assert counted[f"opened {name}"] == 1
    assert counted[f"parsed {CONTEXT}"] == counted[f"parsed {QUESTION}"] == 1
    assert [n for key, n in counted.items() if key.startswith("encoded ") and "two" in key] == [1]


def test_generate_answers_in_a_schema(endless, adapter_path, tree, tmp_path):
    schema = tmp_path / "schema.json"
    given = ("generate", "--model", endless, "--adapter-path", adapter_path, tree)
    given += ("--json-schema", schema)
    schema.write_text('{"enum": ["one \\u00e9", {"a": [1, null]}]}')
    assert run(*given).out in ('"one \u00e9"\n', *('{"a":[1,null]}\n', '{"a": [1, null]}\n'))
    schema.write_text('{"enum": ["a text of some length"]}')
    done = run(*given, "--json", "-m", 3)
    assert json.loads(done.out)["finish_reason"] == "length"
    assert "--max-tokens" in done.err


def test_generate_says_what_is_wrong_with_a_schema(
    endless, adapter_path, tree, tmp_path, monkeypatch
):
    schema = tmp_path / "schema.json"
    given = ("generate", "--model", endless, "--adapter-path", adapter_path, tree)
    given += ("--json-schema", schema)
    for text, said in (
        ('{"enum": []}', "--json-schema cannot be followed: Unsatisfiable schema"),
        ('{"not": {}}', "--json-schema cannot be followed: Unimplemented keys"),
        ("[]", "expected a JSON schema"),
        ("{", "is not valid JSON"),
    ):
        schema.write_text(text)
        assert_one_error(run(*given), 1, said)
    schema.unlink()
    assert_one_error(run(*given), 1, "cannot read")
    schema.write_text("{}")
    assert_one_error(run(*given, "--prefill-response", "{"), 2, "--prefill-response")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert_one_error(run(*given), 1, "pip install 'kmerge-mlx[structured]'")


def test_an_error_about_settings_names_the_command():
    def names(settings: type[Settings]) -> set[str]:
        return {settings.NAME}.union(*map(names, settings.__subclasses__()))

    assert names(Settings) >= {*COMMANDS}
