"""``kmerge-mlx cache`` and ``generate --prompt-cache-file``: a context read once, asked often."""

from __future__ import annotations

import json
import shutil
from random import Random

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

from kmerge_mlx import stream_generate
from kmerge_mlx.generation.prompt_cache import CacheFile, prefill
from kmerge_mlx.generation.stream import compress
from kmerge_mlx.prompts.segments import Segment
from tests.cli_runner import CHATML, assert_one_error, copy_base, run

CONTEXT = "One two three four five six.\n\nSeven eight nine ten eleven twelve thirteen.\n"
QUESTIONS = ("Which is it?", "0", " \n\nx", "<raw>Nine</raw> or <merge>ten ten ten ten</merge>?")
OPTIONS = ("-m", 8, "--temp", 0, "--json")
EIGHT_BITS = ("--kv-bits", 8, "--quantized-kv-start", 0, "--kv-group-size", 32)


@pytest.fixture(scope="module")
def world(tmp_path_factory, base_path, adapter_path):
    """A context file, and the options that name the fixture's model."""
    root = tmp_path_factory.mktemp("cache")
    (root / "context.txt").write_text(CONTEXT)
    (root / "tree.txt").write_text("Tree: AB\n+CD\n++EF\n+GH")
    base = copy_base(base_path, root / "base", CHATML)
    return root, ("--model", base, "--adapter-path", adapter_path)


@pytest.fixture(scope="module")
def kept(world, tmp_path_factory):
    """A good file, to be spoiled in copies."""
    root, named = world
    file = tmp_path_factory.mktemp("kept") / "context.safetensors"
    assert run("cache", root / "context.txt", *named, "--prompt-cache-file", file).code == 0
    return file


def ask(file, *args):
    return run("generate", "--prompt-cache-file", file, "-p", "Which?", "-m", 2, *args)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        ("--apply-chat-template",),
        ("--apply-chat-template", "--system-prompt", "Be brief.", "--merges", "contexts"),
        ("-p", "The question is: "),
    ],
    ids=" ".join,
)
def test_what_is_asked_of_a_file_is_answered_as_if_all_were_read(world, tmp_path, shape):
    root, named = world
    file = tmp_path / "context.safetensors"
    left = tmp_path / ".context.safetensors.new-4194999.safetensors"
    left.write_bytes(b"what a killed run left")
    done = run("cache", root / "context.txt", *named, *shape, "--prompt-cache-file", file)
    assert (done.code, done.out) == (0, "")
    assert list(tmp_path.iterdir()) == [file]
    begun, rest = (shape[1], ()) if shape[:1] == ("-p",) else ("", shape)
    for question in QUESTIONS:
        prompt = ("-p", begun + question)
        whole = run("generate", root / "context.txt", *prompt, *named, *rest, *OPTIONS)
        asked = run("generate", "--prompt-cache-file", file, "-p", question, *OPTIONS)
        assert asked.code == whole.code == 0, asked.err + whole.err
        found, wanted = json.loads(asked.out), json.loads(whole.out)
        assert found["tokens"] == wanted["tokens"]
        assert found["compressed_tokens"] < wanted["compressed_tokens"] - 5
        assert "Cache: " in asked.err


def test_random_prompts_go_on_alike_from_memory_and_from_disk(tiny, tmp_path):
    model, tokenizer = tiny
    random = Random(0)
    eight_bits = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    for case in range(10):
        segments = [
            Segment(random.choices(range(200), k=random.randint(1, 40)), case % 2 == i % 2)
            for i in range(random.randint(2, 4))
        ]
        held, options = segments[:-1], {3: eight_bits, 4: {"max_kv_size": 16}}.get(case % 5, {})
        start = compress(model, tokenizer, held)
        cache = prefill(model, start, **options)
        path = tmp_path / "held.safetensors"
        CacheFile(path, {"--k": (4,)}, held, {"case": case}).save(cache)
        found = CacheFile.read(path)
        assert found.about == {"case": case}
        assert found.held == held

        def tokens(read, segments=segments, start=start):
            rest = compress(model, tokenizer, segments).after(len(start.ids))
            # A quantized cache stays what it is; a short one forgets as it did.
            return [r.token for r in stream_generate(model, tokenizer, rest, 8, prompt_cache=read)]

        assert tokens(found.load(model, len(start.ids))) == tokens(cache)


def test_a_cache_is_mlx_lms_file(tiny, tmp_path):
    model, tokenizer = tiny
    held = [Segment(range(10, 50))]
    read = prefill(model, compress(model, tokenizer, held))
    CacheFile(tmp_path / "a.safetensors", {}, held, {}).save(read)
    cache = load_prompt_cache(str(tmp_path / "a.safetensors"))
    assert [c.offset for c in cache] == [10] * len(make_prompt_cache(model))
    for ours, theirs in zip(read, cache, strict=True):
        for a, b in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
            assert mx.array_equal(a, b)


def test_another_base_adapter_or_k_is_refused_by_name(world, kept, base_path, tmp_path):
    _, named = world
    other, adapter = copy_base(base_path, tmp_path / "other"), tmp_path / "adapter"
    shutil.copytree(named[3], adapter)
    for file in (other / "model.safetensors", adapter / "merge_encoder.safetensors"):
        changed = {name: array * 1.5 for name, array in mx.load(str(file)).items()}
        mx.save_safetensors(str(file), changed, {"format": "mlx"})
    said = "the base model is not the one that the file was made with"
    assert_one_error(ask(kept, "--model", other, *named[2:]), 1, str(kept), said)
    said = "the adapter is not the one that the file was made with"
    assert_one_error(ask(kept, *named[:2], "--adapter-path", adapter), 1, said)
    found = ask(kept, *named[:2], "--k", 1)
    assert_one_error(found, 1, "--k is 1, the file was made with 4")


def test_a_torn_file_is_refused(kept, tmp_path):
    data = kept.read_bytes()
    torn = tmp_path / "torn.safetensors"
    for size in (0, 4, 200, len(data) // 2, len(data) - 1):
        torn.write_bytes(data[:size])
        assert_one_error(ask(torn), 1, "torn")
    for good, bad, said in (
        (rb"\"version\": 1", rb"\"version\": 7", "its version is 7, expected 1"),
        (rb"\"held\"", rb"\"hold\"", "its record of its tokens is torn"),
        (rb"\"about\": {", rb"\"about\": 5, \"x\": {", "its record of its tokens is torn"),
        (rb"\"templated\": false", rb"\"templated\": 0", "its record of its prompt is torn"),
    ):
        pad = len(bad) - len(good)
        length = int.from_bytes(data[:8], "little") + pad
        torn.write_bytes(length.to_bytes(8, "little") + data[8:].replace(good, bad, 1))
        assert_one_error(ask(torn), 1, said)
    mx.save_safetensors(str(torn), {"a": mx.zeros(2)})
    assert_one_error(ask(torn), 1, "does not record which tokens it holds", "kmerge-mlx cache")
    assert_one_error(ask(tmp_path / "none.safetensors"), 1, "none.safetensors")


def test_what_a_file_holds_is_not_given_again(kept):
    given = ("x.txt", "--max-kv-size", 9, "--merges", "all", "--system-prompt", "x")
    said = "leave FILE, --system-prompt, --merges, --max-kv-size out"
    assert_one_error(ask(kept, *given), 2, said)
    assert_one_error(run("generate", "--prompt-cache-file", kept), 2, "needs a --prompt")


def test_faults_of_the_cache_command_are_one_message(world, tmp_path):
    root, named = world
    file = tmp_path / "a.safetensors"
    args = ("cache", root / "context.txt", *named, "--prompt-cache-file")
    assert_one_error(run(*args, tmp_path / "no" / "a.safetensors"), 1, "no such folder")
    assert_one_error(run(*args, tmp_path / "a"), 2, "its name must end in .safetensors")
    assert_one_error(run("cache", *named, "--prompt-cache-file", file), 1, "the prompt is empty")
    both = ("--kv-bits", 8, "--max-kv-size", 9)
    assert_one_error(run(*args, file, *both), 2, "mlx-lm cannot quantize")
    said = "mlx-lm refused these options: --kv-bits and --kv-group-size"
    assert_one_error(run(*args, file, *EIGHT_BITS), 1, said)
    assert list(tmp_path.iterdir()) == []
    torn = tmp_path / "torn.txt"
    torn.write_text("<raw>")
    found = run("cache", root / "tree.txt", torn, *named, "--prompt-cache-file", file)
    assert_one_error(found, 1, "the FILEs, one after the other: <raw> at line 6, column 1")
    found = run("cache", torn, *named, "--prompt-cache-file", file)
    assert_one_error(found, 1, f"{torn}: <raw> at line 1, column 1 is never closed")


def test_a_quantized_cache_stays_what_it_is(world, tmp_path):
    file = tmp_path / "a.safetensors"
    args = ("cache", world[0] / "tree.txt", "--k", 4, "--prompt-cache-file", file)
    said = "note: not quantized: the 6 positions are no more than --quantized-kv-start"
    for options, noted in ((("--kv-bits", 8), True), (EIGHT_BITS, False)):
        done = run(*args, *options)
        assert done.code == 0, done.err
        assert (said in done.err) == noted
    asked = ask(file)
    assert asked.code == 0, asked.err
    assert_one_error(ask(file, "--kv-bits", 4), 1, "--kv-bits is 4", "was made with 8")
    assert ask(file, "--kv-bits", 8, "--kv-group-size", 32).out == asked.out
