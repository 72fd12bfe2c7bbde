"""``kmerge-mlx generate`` under chat templates: the ids are those ``mlx_lm.generate`` reads."""

from __future__ import annotations

import json
import sys

import pytest

import kmerge_mlx.generation.stream
from tests.cli_runner import CHATML, assert_one_error, copy_base, run

NOTE = "note: this adapter was trained without a chat template\n"
CONTEXT = "  One two three.\n\n"
QUESTION = "Which of them?\n"

TEMPLATES = {
    "chatml": CHATML,
    "trims": CHATML.replace("message.content", "message.content | trim"),
    "wraps": CHATML.replace("message.content", "message.content | wordwrap(9)"),
    "no_system": "{%- if messages[0].role == 'system' -%}"
    "{{ raise_exception('System role not supported') }}{%- endif -%}" + CHATML,
}


@pytest.fixture(scope="module")
def bases(base_path, tmp_path_factory):
    """The fixture's base under several chat templates."""
    root = tmp_path_factory.mktemp("chat")
    return {name: copy_base(base_path, root / name, text) for name, text in TEMPLATES.items()}


@pytest.fixture
def path(tmp_path):
    """A file with the context."""
    (tmp_path / "context.txt").write_text(CONTEXT)
    return tmp_path / "context.txt"


@pytest.fixture
def read(monkeypatch, adapter_path):
    """Runs ``generate``; returns what the model was given, and the result."""
    given = []
    stream_generate = kmerge_mlx.generation.stream.stream_generate

    def spy(model, tokenizer, prompt, *args, **options):
        given.append(prompt)
        return stream_generate(model, tokenizer, prompt, *args, **options)

    monkeypatch.setattr(kmerge_mlx.generation.stream, "stream_generate", spy)

    def run_and_look(base, *args):
        given.clear()
        result = run(*("generate", "--model", base, "--adapter-path", adapter_path, "-m", 3, *args))
        assert result.code == 0, result.err
        return given[0], result

    return run_and_look


@pytest.fixture
def mlx_lm_reads(monkeypatch):
    """Runs mlx-lm's own ``generate`` command up to its model; returns the ids it would read."""
    host = sys.modules["mlx_lm.generate"]

    def ids(base, text, *args):
        found = []
        argv = ["mlx_lm.generate", "--model", str(base), "--prompt", text, *args]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(host, "generate", lambda model, tok, prompt, **_: found.extend(prompt))
        host.main()
        return found

    return ids


def ids_of(segments):
    return [i for segment in segments for i in segment.ids]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--system-prompt", "Be brief."],
        ["--prefill-response", "The answer is"],
        ["--chat-template-config", '{"think": false}'],
        ["--system-prompt", "S", "--prefill-response", "P", "--chat-template-config", "{}"],
        ["--ignore-chat-template"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("template", ["chatml", "trims"])
def test_the_ids_are_those_mlx_lm_reads(read, mlx_lm_reads, bases, path, template, options):
    base = bases[template]
    applied = "--ignore-chat-template" not in options
    ours = [*options, "--apply-chat-template"] if applied else options
    segments, result = read(base, "-p", QUESTION, *ours)
    assert ids_of(segments) == mlx_lm_reads(base, QUESTION, *options)
    assert not any(segment.merge for segment in segments)
    assert result.err.count("note: ") == result.err.count(NOTE) == applied

    segments, _ = read(base, path, *ours)
    assert ids_of(segments) == mlx_lm_reads(base, CONTEXT, *options)
    assert all(segment.merge for segment in segments)  # the template too, as in the paper

    segments, _ = read(base, path, "-p", QUESTION, *ours)
    assert ids_of(segments) == mlx_lm_reads(base, f"{CONTEXT}\n\n{QUESTION}", *options)
    assert [segment.merge for segment in segments] == [False, True, False][not applied :]


def test_prompts_are_laid_out_as_in_training_unless_another_way_is_asked_for(read, bases, path):
    segments, result = read(bases["chatml"], path)
    assert [segment.merge for segment in segments] == [True]
    assert ids_of(segments) == ids_of(read(bases["chatml"], path, "--ignore-chat-template")[0])
    assert "note: " not in result.err
    contexts = ("--merges", "contexts", "--apply-chat-template")
    segments, result = read(bases["chatml"], path, *contexts)
    assert [segment.merge for segment in segments] == [False, True, False]
    said = "note: this adapter was trained without a chat template and with --merges all\n"
    assert said in result.err
    without = run("generate", "--model", bases["chatml"], "-p", QUESTION, "-m", 2)
    assert without.code == 0
    assert "note: " not in without.err


def test_what_a_template_does_to_the_text_or_refuses_is_one_message(bases, adapter_path, path):
    args = ("generate", "--model", bases["wraps"], "--adapter-path", adapter_path, path, "-m", 2)
    assert run(*args, "--apply-chat-template").code == 0
    said = "the chat template rewrites the text", "leave it out (--ignore-chat-template)"
    assert_one_error(run(*args, "-p", QUESTION, "--apply-chat-template"), 1, *said)
    assert run(*args, "-p", QUESTION).code == 0
    args = ("generate", "--model", bases["no_system"], "-p", QUESTION, "-m", 2)
    assert run(*args).code == 0
    assert_one_error(run(*args, "--system-prompt", "S"), 1, "System role not supported")
    for name in ("tokenize", "messages", "add_generation_prompt"):  # they are not the user's
        found = run(*args, "--chat-template-config", json.dumps({name: True}))
        assert_one_error(found, 1, name)
