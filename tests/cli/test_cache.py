"""``kmerge-mlx cache`` and ``generate --prompt-cache-file``: a context read once, asked often."""

from __future__ import annotations

import hashlib
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
from tests.cli_runner import CHATML, assert_one_error, change_json, copy_base, run

CONTEXT = "One two three at 4:56 and 7 a_b six.\n\nSeven eight nine ten eleven twelve thirteen.\n"
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
        ("--apply-chat-template", "--keep", "numbers,code", "--merges", "all"),
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
        plain = data[8:].replace(rb"\"seal\"", rb"\"none\"", 1)  # as a stranger may write it
        torn.write_bytes(length.to_bytes(8, "little") + plain.replace(good, bad, 1))
        assert_one_error(ask(torn), 1, said)
    mx.save_safetensors(str(torn), {"a": mx.zeros(2)})
    assert_one_error(ask(torn), 1, "does not record which tokens it holds", "kmerge-mlx cache")
    assert_one_error(ask(tmp_path / "none.safetensors"), 1, "none.safetensors")


def changed(kept, path, change, honest=False):
    """A copy of a file whose arrays and metadata a function has changed.

    Unless it is ``honest``, it has no digest, as files of 0.1.0, or of a stranger, have none.
    """
    arrays, metadata = mx.load(str(kept), return_metadata=True)
    metadata = {name: text for name, text in metadata.items() if name != "format"}
    entry = json.loads(metadata["0.kmerge_mlx"])
    if not honest:
        entry.pop("digest", None)
        entry.pop("seal", None)
    change(arrays, metadata, entry)
    mx.save_safetensors(
        str(path),
        arrays,
        {"0.kmerge_mlx": json.dumps(entry)}
        | {name: text for name, text in metadata.items() if name != "0.kmerge_mlx"},
    )
    return path


def put(name, value):
    """A change of one array: another one, none, or what a function makes of it."""

    def change(arrays, metadata, entry):
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value(arrays[name]) if callable(value) else mx.array(value)

    return change


STRANGE = {
    "a missing array": put("0.1", None),
    "one too many": put("999999999.0", 1.0),
    "a missing layer": lambda a, m, e: [a.pop(f"1.{i}") for i in range(3)] and m.pop("1.1"),
    "a layer far away": lambda a, m, e: m.update({"1.999999999": "KVCache"}),
    "other kinds": lambda a, m, e: m.update({"1.0": "BatchKVCache"}),
    "what is no kind": lambda a, m, e: m.update({"1.0": "deque"}),
    "rotating, but is not": lambda a, m, e: m.update({"1.0": "RotatingKVCache"}),
    "quantized, but is not": lambda a, m, e: m.update({"1.0": "QuantizedKVCache"}),
    "more positions": put("0.2", lambda a: a + 1),
    "fewer positions": put("0.2", lambda a: a - 1),
    "positions past the end": put("0.2", 999_999_999),
    "negative positions": put("0.2", -1),
    "half a position": put("0.2", 8.5),
    "many numbers of positions": put("0.2", [1, 2]),
    "another dtype": put("0.0", lambda a: a.astype(mx.float16)),
    "bytes": put("0.0", lambda a: a.astype(mx.uint8)),
    "another width": put("0.0", lambda a: a[..., :-1]),
    "fewer heads": put("0.0", lambda a: a[:, :1]),
    "two prompts": put("0.0", lambda a: mx.concatenate([a, a])),
    "too short": put("0.0", lambda a: a[..., :4, :]),
    "values of another length": put("0.1", lambda a: a[..., :100, :]),
    "far too long": put("0.0", lambda a: mx.concatenate([a] * 4, axis=2)),
    "what is not a number": put("1.1", lambda a: a * float("nan")),
    "no identity": lambda a, m, e: e.update(identity={}),
    "an identity of another shape": lambda a, m, e: e.update(identity={"--k": [4]}),
    "no tokens": lambda a, m, e: e.update(held=[]),
    "other tokens": lambda a, m, e: e["held"][0].__setitem__(3, 7),
    "tokens past the vocabulary": lambda a, m, e: e["held"][0].__setitem__(3, 999_999_999),
    "negative tokens": lambda a, m, e: e["held"][0].__setitem__(3, -1),
    "a layout of another shape": lambda a, m, e: e["about"].update(layout={"merges": 3}),
    "a device for a model": lambda a, m, e: e["about"].update(model="/dev/zero"),
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
def test_a_strangers_file_is_refused_in_one_line(kept, tmp_path, change):
    assert_one_error(ask(changed(kept, tmp_path / "a.safetensors", change)), 1)


def test_a_file_of_0_1_0_is_read_and_a_damaged_one_of_today_is_not(world, kept, tmp_path):
    """0.1.0 wrote no digest of the KV caches, and other ones of base and adapter."""
    file, whole = tmp_path / "a.safetensors", ask(kept)
    assert whole.code == 0
    assert ask(changed(kept, file, lambda a, m, e: None)).out == whole.out
    parts = ("adapter_config.json", "adapters.safetensors", "merge_encoder.safetensors")
    adapter = b"".join((world[1][3] / name).read_bytes() for name in parts)
    was = {
        "the base model": "5f4ba6278daadd9b25d169424490ba8e85b408366812c4fc8663230fefbd183f",
        "the adapter": hashlib.sha256(adapter).hexdigest(),
    }
    found = changed(kept, file, lambda a, m, e: e["identity"].update(was))
    assert ask(found).out == whole.out
    for name in ("0.0", "1.1"):
        swapped = changed(kept, file, put(name, lambda a: -a), honest=True)
        assert_one_error(ask(swapped), 1, f"{file} is damaged: make it again")
    other = changed(kept, file, lambda a, m, e: e["held"][-1].append(7), honest=True)
    assert_one_error(ask(other), 1, f"{file} is damaged: make it again")


def test_a_changed_config_of_base_or_adapter_is_noticed(world, kept, base_path, tmp_path):
    """0.1.0 sampled the weights, and answered with a file of another model."""
    named = world[1]
    scaled = {"type": "linear", "factor": 2.0}
    base = copy_base(base_path, tmp_path / "base", CHATML, rope_scaling=scaled)
    said = "the base model is not the one that the file was made with"
    assert_one_error(ask(kept, "--model", base, *named[2:]), 1, said)
    adapter = shutil.copytree(named[3], tmp_path / "adapter")
    change_json(adapter / "merge_config.json", pad_token_id=5)
    said = "the adapter is not the one that the file was made with"
    assert_one_error(ask(kept, *named[:2], "--adapter-path", adapter), 1, said)


def test_what_a_file_holds_is_not_given_again(kept):
    given = ("x.txt", "--max-kv-size", 9, "--merges", "all", "--system-prompt", "x")
    said = "leave FILE, --system-prompt, --merges, --max-kv-size out"
    assert_one_error(ask(kept, *given), 2, said)
    assert_one_error(run("generate", "--prompt-cache-file", kept), 2, "needs a --prompt")


def test_faults_of_the_cache_command_are_one_message(world, tmp_path):
    root, named = world
    file = tmp_path / "a.safetensors"
    args = ("cache", root / "context.txt", *named, "--prompt-cache-file")
    assert_one_error(
        run(*args, tmp_path / "no" / "a.safetensors"), 1, f"there is no folder {tmp_path / 'no'}"
    )
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
