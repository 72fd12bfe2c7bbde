"""``kmerge-mlx cache`` and ``generate --prompt-cache-file``: a context read once, asked often."""

from __future__ import annotations

import json
import shutil
from random import Random

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

from kmerge_mlx import stream_generate
from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation import prompt_cache
from kmerge_mlx.generation.stream import compress
from kmerge_mlx.prompts.segments import Segment
from tests.cli_runner import CHATML, assert_one_error, copy_base, run

CONTEXT = "One two three four five six.\n\nSeven eight nine ten eleven twelve thirteen.\n"
QUESTIONS = ("Which is it?", "0", " \n\nx", "<raw>Nine</raw> or <merge>ten ten ten ten</merge>?")
OPTIONS = ("-m", 8, "--temp", 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory, base_path, adapter_path):
    """A context file, and the options that name the fixture's model."""
    root = tmp_path_factory.mktemp("cache")
    (root / "context.txt").write_text(CONTEXT)
    base = copy_base(base_path, root / "base", CHATML)
    return root, ("--model", base, "--adapter-path", adapter_path)


def answer(*args):
    done = run("generate", *args, *OPTIONS, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        ("--apply-chat-template",),
        ("--apply-chat-template", "--system-prompt", "Be brief.", "--merges", "contexts"),
        (
            "-p",
            "The question is: ",
        ),
    ],
    ids=lambda shape: " ".join(map(str, shape)),
)
@pytest.mark.parametrize("question", QUESTIONS, ids=repr)
def test_what_is_asked_of_a_file_is_answered_as_if_all_were_read(world, tmp_path, shape, question):
    root, named = world
    file = tmp_path / "context.safetensors"
    done = run("cache", root / "context.txt", *named, *shape, "--prompt-cache-file", file)
    assert (done.code, done.out) == (0, "")
    begun = shape[1] if shape[:1] == ("-p",) else ""
    rest = shape[2:] if begun else shape
    whole = answer(root / "context.txt", "-p", begun + question, *named, *rest)
    asked = run("generate", "--prompt-cache-file", file, "-p", question, *OPTIONS, "--json")
    assert asked.code == 0, asked.err
    found = json.loads(asked.out)
    assert found["tokens"] == whole["tokens"]
    assert found["compressed_tokens"] < whole["compressed_tokens"] - 5
    assert "Cache: " in asked.err


def test_fifty_random_prompts_go_on_alike_from_memory_and_from_disk(tiny, tmp_path):
    model, tokenizer = tiny
    random = Random(0)
    for case in range(50):
        segments = [
            Segment(
                [random.randrange(200) for _ in range(random.randint(1, 40))], case % 2 == i % 2
            )
            for i in range(random.randint(2, 4))
        ]
        held, options = segments[:-1], {}
        if case % 5 == 3:
            options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
        if case % 5 == 4:
            options = {"max_kv_size": 16}
        start = compress(model, tokenizer, held)
        cache = prompt_cache.prefill(model, start, **options)
        path = tmp_path / "held.safetensors"
        prompt_cache.save(path, cache, held, {"--k": 4}, {"case": case})
        found = prompt_cache.load(path, {"--k": 4})
        assert found.about == {"case": case}
        assert prompt_cache.begins_with(segments, found.held)

        def tokens(read, segments=segments, start=start):
            rest = compress(model, tokenizer, segments).after(len(start.ids))
            # A quantized cache stays what it is; a short one forgets as it did.
            return [r.token for r in stream_generate(model, tokenizer, rest, 8, prompt_cache=read)]

        assert tokens(found.cache) == tokens(cache)


def test_a_cache_is_mlx_lms_file(tiny, tmp_path):
    model, tokenizer = tiny
    held = [Segment(range(10, 50))]
    read = prompt_cache.prefill(model, compress(model, tokenizer, held))
    prompt_cache.save(tmp_path / "a.safetensors", read, held, {}, {})
    cache = load_prompt_cache(str(tmp_path / "a.safetensors"))
    assert [c.offset for c in cache] == [10] * len(make_prompt_cache(model))
    for ours, theirs in zip(read, cache, strict=True):
        for a, b in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
            assert mx.array_equal(a, b)


def test_what_prompts_begin_with_alike():
    def prompt(*parts):
        return [Segment(list(ids), merge) for ids, merge in parts]

    a = prompt(((1, 2), False), ((3, 4, 5), True), ((6, 7, 8), False))
    b = prompt(((1, 2), False), ((3, 4, 5), True), ((6, 9), False), ((3,), True))
    assert prompt_cache.common_start([a, b]) == prompt(
        ((1, 2), False), ((3, 4, 5), True), ((6,), False)
    )
    longer = prompt(((1, 2), False), ((3, 4, 5, 5), True))
    assert prompt_cache.common_start([a, longer]) == a[:1]
    assert prompt_cache.common_start([a, prompt(((1, 2), True))]) == []
    assert prompt_cache.begins_with(b, prompt_cache.common_start([a, b]))
    assert not prompt_cache.begins_with(longer, a[:2])
    assert not prompt_cache.begins_with(a[:1], a[:2])


@pytest.fixture(scope="module")
def kept(world, tmp_path_factory):
    """A good file, to be spoiled in copies."""
    root, named = world
    file = tmp_path_factory.mktemp("kept") / "context.safetensors"
    assert run("cache", root / "context.txt", *named, "--prompt-cache-file", file).code == 0
    return file


def ask(file, *args):
    return run("generate", "--prompt-cache-file", file, "-p", "Which?", "-m", 2, *args)


def test_another_base_adapter_or_k_is_refused_by_name(world, kept, base_path, tmp_path):
    _, named = world
    other = copy_base(base_path, tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    name = next(iter(weights))
    mx.save_safetensors(
        str(other / "model.safetensors"), weights | {name: weights[name] * 1.5}, {"format": "mlx"}
    )
    assert_one_error(
        ask(kept, "--model", other, *named[2:]),
        1,
        str(kept),
        "the base model is another than the one that the file was made with",
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(named[3], adapter)
    weights = mx.load(str(adapter / "merge_encoder.safetensors"))
    mx.save_safetensors(
        str(adapter / "merge_encoder.safetensors"),
        {name: array * 1.5 for name, array in weights.items()},
        {"format": "mlx"},
    )
    said = ask(kept, *named[:2], "--adapter-path", adapter)
    assert_one_error(said, 1, "the adapter is another than the one that the file was made with")
    said = ask(kept, *named[:2])
    assert_one_error(said, 1, "--k")


def test_a_file_that_goes_with_another_k_is_refused(tmp_path, tiny):
    model, tokenizer = tiny
    held = [Segment(range(8))]
    path = tmp_path / "a.safetensors"
    read = prompt_cache.prefill(model, compress(model, tokenizer, held))
    prompt_cache.save(path, read, held, {"the base model": "x", "--k": 4}, {})
    with pytest.raises(PromptError, match="--k is 2, the file was made with 4"):
        prompt_cache.load(path, {"the base model": "x", "--k": 2})


def test_a_torn_file_is_refused(world, kept, tmp_path):
    data = kept.read_bytes()
    torn = tmp_path / "torn.safetensors"
    for size in (0, 4, 200, len(data) // 2, len(data) - 1):
        torn.write_bytes(data[:size])
        assert_one_error(ask(torn), 1, "torn")
    torn.write_bytes(data.replace(b'\\"version\\": 1', b'\\"version\\": 7', 1))
    assert_one_error(ask(torn), 1, "its version is 7, expected 1")
    torn.write_bytes(data.replace(b'\\"held\\"', b'\\"hold\\"', 1))
    assert_one_error(ask(torn), 1, "what it says of its tokens is torn")
    mx.save_safetensors(str(torn), {"a": mx.zeros(2)})
    assert_one_error(ask(torn), 1, "does not say which tokens it holds", "kmerge-mlx cache")
    assert_one_error(ask(tmp_path / "none.safetensors"), 1, "none.safetensors")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("context.txt",), "leave FILEs"),
        (("--max-kv-size", 9), "--max-kv-size out"),
        (("--merges", "all"), "--merges"),
        (("--system-prompt", "x"), "--system-prompt"),
    ],
)
def test_what_belongs_to_a_file_is_not_given_again(kept, args, said):
    assert_one_error(ask(kept, *args), 1, said)


def test_faults_of_the_cache_command_are_one_message(world, tmp_path):
    root, named = world
    file = tmp_path / "a.safetensors"
    args = ("cache", root / "context.txt", *named, "--prompt-cache-file")
    assert_one_error(run(*args, tmp_path / "no" / "a.safetensors"), 1, "no such folder")
    assert_one_error(run(*args, tmp_path / "a"), 1, "its name must end in .safetensors")
    assert_one_error(run("cache", *named, "--prompt-cache-file", file), 1, "the prompt is empty")
    both = ("--kv-bits", 8, "--max-kv-size", 9)
    assert_one_error(run(*args, file, *both), 2, "mlx-lm cannot quantize")
    assert list(tmp_path.iterdir()) == []
    assert_one_error(run("generate", "--prompt-cache-file", file), 1, "needs a --prompt")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "two.txt").write_text("<raw>")
    names = (tmp_path / "one.txt", tmp_path / "two.txt")
    said = run("cache", *names, *named, "--prompt-cache-file", file)
    assert_one_error(said, 1, "the FILEs, one after the other: <raw> at line 3, column 1")
    said = run("cache", names[1], *named, "--prompt-cache-file", file)
    assert_one_error(said, 1, f"{names[1]}: <raw> at line 1, column 1 is never closed")


def test_a_quantized_cache_stays_what_it_is(tmp_path):
    tree = tmp_path / "tree.txt"
    tree.write_text("Tree: AB\n+CD\n++EF\n+GH")
    file = tmp_path / "a.safetensors"
    bits = ("--kv-bits", 8, "--quantized-kv-start", 0, "--kv-group-size", 32)
    done = run("cache", tree, "--k", 4, *bits, "--prompt-cache-file", file)
    assert done.code == 0, done.err
    assert "not quantized" not in done.err
    asked = ask(file)
    assert asked.code == 0, asked.err
    assert_one_error(ask(file, "--kv-bits", 4), 1, "--kv-bits is 4", "was made with 8")
    assert ask(file, "--kv-bits", 8, "--kv-group-size", 32).out == asked.out


def test_what_mlx_lm_cannot_quantize_is_one_message(world, tmp_path):
    root, named = world
    bits = ("--kv-bits", 8, "--quantized-kv-start", 0, "--kv-group-size", 32)
    file = tmp_path / "a.safetensors"
    done = run("cache", root / "context.txt", *named, *bits, "--prompt-cache-file", file)
    assert_one_error(done, 1, "mlx-lm refused these options: --kv-bits and --kv-group-size")
    assert list(tmp_path.iterdir()) == []


def test_it_says_when_the_context_is_too_short_to_be_quantized(tmp_path):
    tree, file = tmp_path / "tree.txt", tmp_path / "a.safetensors"
    tree.write_text("Tree: AB\n+CD\n++EF\n+GH")
    done = run("cache", tree, "--kv-bits", 8, "--prompt-cache-file", file)
    assert done.code == 0, done.err
    assert "note: not quantized: the 6 positions are no more than --quantized-kv-start" in done.err


def test_what_a_killed_run_left_is_cleared(world, tmp_path):
    root, named = world
    file, left = tmp_path / "a.safetensors", tmp_path / ".a.safetensors.new-4194999.safetensors"
    left.write_bytes(b"half of it")
    done = run("cache", root / "context.txt", *named, "--prompt-cache-file", file)
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == [file]
