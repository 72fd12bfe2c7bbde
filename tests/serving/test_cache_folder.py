"""``serve --prompt-cache-dir``: a restarted server answers as before, whatever the files are.

The oracle of an answer is a server without a folder, which reads the whole prompt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.errors import ServeError
from kmerge_mlx.generation.prompt_cache import CacheFile, _seal
from kmerge_mlx.serving import cache_folder
from tests.cli_runner import PLAIN_USER, assert_one_error, run, run_process
from tests.servers import FIXTURE_EOS, PATIENCE, Address, eventually, serving, serving_process
from tests.tiny import EXPERTS, qwen2_config, random_adapter, write_base
from tests.tools.test_sizing import GEMMA3, HYBRIDS

EIGHT_BITS = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
TOLERANCE = 1e-4
NO_END = {"logit_bias": {str(FIXTURE_EOS): -100}}
WORDS = "one two three four five six seven eight nine ten and so".split()  # noqa: SIM905


def document(seed: int = 0, words: int = 90) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


def prompt_of(seed: int = 0, question: str = "Which is it?") -> str:
    return f"<merge>{document(seed)}</merge><raw>\n\n{question}</raw>"


def ask(server: Address, prompt: Any, **more: Any) -> tuple[list[float], dict[str, Any]]:
    """The log-probabilities of an answer, and its usage."""
    body = {"prompt": prompt, "max_tokens": 6, "logprobs": 0} | NO_END | more
    answer = server.complete(**body)
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["logprobs"]["token_logprobs"], answer.json["usage"]


def cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def alike(found: list[float], wanted: list[float]) -> bool:
    return found == pytest.approx(wanted, rel=0, abs=TOLERANCE)


def events(server: Address, event: str) -> float:
    return server.metric(f'prompt_cache_files_total{{event="{event}"}}')


@contextmanager
def keeping(folder: Path, *named: Any, **settings: Any) -> Iterator[Address]:
    """A server with a folder, which is written when the block ends."""
    with serving(*named, prompt_cache_dir=str(folder), **settings) as server:
        yield server
        flush(server)


def flush(server: Address) -> None:
    busy = server.server.service.generator.folder.flushing()
    eventually(lambda: not busy())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


@pytest.fixture
def model(base_path, adapter_path):
    return base_path, adapter_path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


def with_adapter(path: Path, config: dict[str, Any], start: str = "mean", context: int = 0) -> Any:
    base = write_base(path / "base", qwen2_config(**config))
    keys = ("self_attn.q_proj",)  # whatever the model is
    adapter = random_adapter(load(str(base))[0], 4, keys, context=context)
    if start != "mean":
        sizes = replace(adapter.merge.encoder, start=start)
        encoder = {n: mx.random.normal(shape) * 0.1 for n, shape in sizes.shapes().items()}
        merge = replace(adapter.merge, encoder=sizes)
        adapter = replace(adapter, merge=merge, encoder_weights=encoder)
    save_adapter(adapter, path / "adapter")
    return base, path / "adapter"


KINDS = {
    "k4": {},
    "information": {"start": "information"},
    "encoder context": {"context": 3},
    "mixture of experts": {"config": EXPERTS},
    "sliding windows": {"config": GEMMA3 | {"sliding_window": 16}},
    "hybrid": {"config": HYBRIDS["qwen3_5"]},
}


def check_restart(folder: Path, named: Any, one: dict[str, Any], **settings: Any) -> None:
    """Two questions about a document, of which a server reads the one and its successor both."""
    questions = [prompt_of(question=q) for q in ("Which is it?", "Nine or ten, and who says so?")]
    with serving(*named, **settings) as server:
        wanted = [ask(server, prompt, **one)[0] for prompt in questions]
    with keeping(folder, *named, **settings) as server:
        found, usage = ask(server, questions[0], **one)
        assert alike(found, wanted[0])
        assert cached(usage) == 0
    whole = any(CacheFile.read(path).about["whole"] for path in files(folder))
    with keeping(folder, *named, **settings) as server:
        for prompt, expected in zip(questions, wanted, strict=True):
            found, usage = ask(server, prompt, **one)
            assert alike(found, expected)
            # Of a state that cannot be trimmed, mlx-lm keeps the document apart only in batches.
            least = 0 if whole and one else usage["merged_tokens"] or 100
            assert cached(usage) >= least - 4
        assert events(server, "read") == 1 or whole


@pytest.mark.parametrize("one", [{}, {"seed": 1}], ids=["batched", "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restarted_server_goes_on_from_the_document_and_answers_the_same(
    folder, tmp_path, kind, one
):
    check_restart(folder, with_adapter(tmp_path, **{"config": {}} | KINDS[kind]), one)


def test_it_does_with_a_quantized_kv_cache_and_without_an_adapter(folder, tmp_path):
    base, adapter = with_adapter(tmp_path, {})
    check_restart(folder / "a", (base, adapter), {}, **EIGHT_BITS)
    check_restart(folder / "b", (base, None), {})


def test_another_quantization_or_adapter_is_another_model(folder, tmp_path, caplog):
    model = with_adapter(tmp_path, {})
    caplog.set_level("INFO")
    for named, settings in ((model, {}), (model, EIGHT_BITS), ((model[0], None), {})):
        caplog.clear()
        for expected in (False, True):
            with keeping(folder, *named, **settings) as server:
                assert bool(cached(ask(server, prompt_of(), merge=True)[1])) == expected
    assert "2 files of another model are ignored" in caplog.text
    assert len(files(folder)) == 3


def test_what_is_raw_is_not_taken_for_what_is_merged(folder, model):
    ids = list(range(10, 90))
    with keeping(folder, *model) as server:
        ask(server, ids, merge=True)
    with keeping(folder, *model) as server:
        assert cached(ask(server, ids, merge=False)[1]) == 0
        assert cached(ask(server, ids, merge=True)[1]) == 76
        assert cached(ask(server, [*ids[:40], 9, *ids[41:]], merge=True)[1]) == 40


def test_a_long_conversation_goes_on_after_a_restart(folder, model):
    """Each turn's prompt is the whole of the last one, its answer, and a question."""
    with keeping(folder, *model) as server:
        ids = list(range(10, 130))
        answer = server.complete(prompt=ids, merge=False, max_tokens=30, logprobs=0, **NO_END)
        assert answer.status == 200
    (file,) = files(folder)
    held = [i for segment in CacheFile.read(file).held for i in segment.ids]
    assert held[:120] == ids
    assert len(held) == 150
    with keeping(folder, *model) as server:
        assert cached(ask(server, [*held, 7, 8, 9], merge=False)[1]) == 150


def test_many_at_once_go_on_from_one_file(folder, model):
    prompts = [prompt_of(question=f"Is it {word}?") for word in WORDS[:8]]
    with serving(*model) as server:
        wanted = [ask(server, prompt)[0] for prompt in prompts]
    with keeping(folder, *model) as server:
        ask(server, prompts[0])
    with keeping(folder, *model) as server, ThreadPoolExecutor(8) as pool:
        for (found, usage), expected in zip(
            pool.map(lambda prompt: ask(server, prompt), prompts * 3), wanted * 3, strict=True
        ):
            assert alike(found, expected)
            assert cached(usage) >= usage["merged_tokens"] - 4
        assert events(server, "read") == 1
        flush(server)
        assert events(server, "written") == 0  # nine tenths of each are there


def test_what_a_file_holds_is_encoded_only_when_it_is_read_again(folder, model, monkeypatch):
    real, encoded = MergeEncoder.merge, []

    def merge(self: MergeEncoder, table: Any, runs: Any, wanted: Any) -> Any:
        encoded.append(len(wanted))
        return real(self, table, runs, wanted)

    monkeypatch.setattr(MergeEncoder, "merge", merge)
    with keeping(folder, *model) as server:
        wanted = ask(server, prompt_of())[0]
    blocks = sum(encoded)
    assert blocks > 50
    encoded.clear()
    with keeping(folder, *model, prompt_cache_size=1) as server:
        assert alike(ask(server, prompt_of())[0], wanted)
        assert sum(encoded) == 0
        for path in files(folder):
            path.unlink()
        ask(server, "x" * 50)  # takes the one place in memory
        encoded.clear()
        found, usage = ask(server, prompt_of())
        assert alike(found, wanted)
        assert cached(usage) == 0
        assert sum(encoded) == blocks


def test_what_memory_holds_is_not_read(folder, model):
    with keeping(folder, *model) as server:
        for seed in (0, 1):
            ask(server, prompt_of(seed))
            flush(server)
            assert cached(ask(server, prompt_of(seed))[1]) > 50
        assert (events(server, "read"), events(server, "written")) == (0, 2)
        # Nor what memory may not hold, or is too little of a file.
    size = min(path.stat().st_size for path in files(folder))
    with keeping(folder, *model, prompt_cache_bytes=size // 2) as server:
        assert cached(ask(server, prompt_of())[1]) == 0
    with keeping(folder, *model) as server:
        start = " ".join(document().split()[:3])
        assert cached(ask(server, f"<merge>{start}</merge>")[1]) == 0
        ask(server, prompt_of())
        assert events(server, "read") == 1


def test_the_least_recently_used_files_go_first(folder, model):
    with keeping(folder, *model) as server:
        ask(server, prompt_of())
    (first,) = files(folder)
    limit = int(first.stat().st_size * 2.5)
    (folder / "mine.txt").write_text("x" * limit)
    with keeping(folder, *model, prompt_cache_dir_bytes=limit) as server:
        ask(server, prompt_of(1))
        flush(server)
        (second,) = {*files(folder)} - {first}
    with keeping(folder, *model, prompt_cache_dir_bytes=limit) as server:
        ask(server, prompt_of())  # the second is now the older one
        ask(server, prompt_of(2))
        flush(server)
        assert first in files(folder)
        assert second not in files(folder)
        ask(server, prompt_of(3))
        flush(server)
        assert first not in files(folder)
        assert sum(path.stat().st_size for path in files(folder)) <= limit
    assert (folder / "mine.txt").exists()


def test_a_longer_beginning_takes_the_place_of_a_shorter_one(folder, model):
    ids = list(range(10, 50))
    with keeping(folder, *model) as server:
        for more, count in ((0, 1), (30, 2), (2, 2), (50, 3)):
            ask(server, [*ids, *range(100, 100 + more)], merge=False, max_tokens=1)
            flush(server)
            (file,) = files(folder)
            ids = [i for segment in CacheFile.read(file).held for i in segment.ids]
            assert events(server, "written") == count


def test_a_flipped_byte_is_noticed_and_the_file_is_made_again(folder, model, caplog):
    with keeping(folder, *model) as server:
        wanted = ask(server, prompt_of())[0]
    (file,) = files(folder)
    good, draw = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for at in (header, len(good) - 1, *(draw.randrange(header, len(good)) for _ in range(6))):
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        asked = ("--prompt-cache-file", file, "-p", "x", "--model", model[0])
        done = run("generate", *asked, "--adapter-path", model[1])
        assert_one_error(done, 1, str(file))
        caplog.clear()
        with keeping(folder, *model) as server:
            found, usage = ask(server, prompt_of())
            assert alike(found, wanted)
            assert cached(usage) == 0
            assert caplog.text.count(file.name) == 1
        assert file.read_bytes() == good


def test_a_changed_token_in_a_files_record_is_noticed(folder, model, caplog):
    """The KV caches are whole then, and those of another prompt."""
    prompt, other = [*range(20, 120)], [*range(20, 70), 7, *range(71, 120)]
    with serving(*model) as server:
        wanted = ask(server, other, merge=True)[0]
    with keeping(folder, *model) as server:
        ask(server, prompt, merge=True)
    (file,) = files(folder)
    good = file.read_bytes()
    file.write_bytes(bad := good.replace(b" 69, 70, 71,", b" 69,  7, 71,"))
    assert bad != good
    caplog.clear()
    with keeping(folder, *model) as server:
        found, usage = ask(server, other, merge=True)
        assert alike(found, wanted)
        assert cached(usage) < 50
    assert "is damaged" in caplog.text


def test_torn_and_foreign_files_are_ignored_and_said_once(folder, model, caplog):
    with keeping(folder, *model) as server:
        wanted = ask(server, prompt_of())[0]
    (file,) = files(folder)
    good = file.read_bytes()
    names = [folder / f"{digit * 64}.safetensors" for digit in "abcdef"]
    for name, size in zip(names, (0, 4, 200, len(good) // 2, len(good) - 1), strict=False):
        name.write_bytes(good[:size])
    os.mkfifo(names[5])
    mx.save_safetensors(str(names[4]), {"x": mx.zeros(3)})
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    with keeping(folder, *model) as server:
        found, usage = ask(server, prompt_of())
        assert alike(found, wanted)
        assert cached(usage) > 100
        ask(server, prompt_of(1))
    for name in (*names[:5], folder / "notes.txt", folder / "sub"):
        assert caplog.text.count(name.name) == 1, name
        assert name.exists()
    assert "make it" not in caplog.text


def claims(file: Path, at: Path, **changes: Any) -> Path:
    """A copy of a file that says other things of itself."""
    arrays, metadata = mx.load(str(file), return_metadata=True)
    entry = json.loads(metadata["0.kmerge_mlx"])
    for name, value in changes.items():
        entry[name] = value(entry[name])
    entry["seal"] = _seal({name: value for name, value in entry.items() if name != "seal"})
    mx.save_safetensors(str(at), arrays, metadata | {"0.kmerge_mlx": json.dumps(entry)})
    return at


STRANGE = {
    "another document": {"held": lambda h: [[h[0][0], *[9] * len(h[0][1:])], *h[1:]]},
    "a longer document": {"held": lambda h: [*h, [False, *[5] * 50]]},
    "a shorter document": {"held": lambda h: h[:1]},
    "no tokens": {"held": lambda h: []},
    "tokens past the vocabulary": {"held": lambda h: [[h[0][0], *h[0][1:-1], 10**9], *h[1:]]},
    "tokens past every number": {"held": lambda h: [[h[0][0], *h[0][1:-1], 10**99], *h[1:]]},
    "negative tokens": {"held": lambda h: [[h[0][0], *h[0][1:-1], -5], *h[1:]]},
    "no digest": {"digest": lambda d: None},
    "another digest": {"digest": lambda d: "0" * 64},
    "a version to come": {"version": lambda v: 9},
    "more merged": {"held": lambda h: [[True, *ids] for _, *ids in h]},
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
def test_a_strangers_file_changes_no_answer(folder, tmp_path, model, change):
    with keeping(tmp_path / "good", *model) as server:
        wanted = ask(server, prompt_of())[0]
    folder.mkdir()
    claims(*files(tmp_path / "good"), folder / f"{'a' * 64}.safetensors", **change)
    with keeping(folder, *model) as server:
        assert alike(ask(server, prompt_of())[0], wanted)
        server.assert_alive()


def test_other_kinds_of_caches_than_the_servers_are_not_taken(folder, tmp_path):
    """Such a cache would end mlx-lm's loop, which makes batches of one kind."""
    model = with_adapter(tmp_path, {})
    with keeping(folder, *model, **EIGHT_BITS) as server:
        ask(server, prompt_of())
    (file,) = files(folder)
    claims(file, file, identity=lambda i: i | {cache_folder._KV: None})
    with keeping(folder, *model) as server:
        assert cached(ask(server, prompt_of())[1]) == 0
        server.assert_alive()


def test_generate_reads_a_servers_file_and_says_that_it_cannot_go_on_from_it(folder, model):
    with keeping(folder, *model) as server:
        ask(server, prompt_of())
    (file,) = files(folder)
    CacheFile.read(file).load(load(str(model[0]), model[1])[0], len(server_positions(file)))
    asked = ("--prompt-cache-file", file, "-p", "Who?", "--model", model[0])
    assert_one_error(run("generate", *asked, "--adapter-path", model[1]), 1, str(file))


def server_positions(file: Path) -> list[int]:
    held = CacheFile.read(file).held
    return [0] * sum(segment.positions(4) for segment in held)


def test_one_server_at_a_time_has_a_folder(folder, model):
    with keeping(folder, *model) as server:
        with pytest.raises(ServeError, match="in use by another server: name another"):
            serving(*model, prompt_cache_dir=str(folder)).__enter__()
        server.assert_alive()
    with keeping(folder, *model) as server:
        server.assert_alive()


def test_a_full_disk_is_said_once_and_serving_goes_on(folder, model, monkeypatch, caplog):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheFile, "write", full)
    with keeping(folder, *model) as server:
        for seed in range(3):
            ask(server, prompt_of(seed))
            flush(server)
        assert cached(ask(server, prompt_of(2))[1]) > 0
    said = f"cannot write to `prompt_cache_dir` {folder}: No space left on device"
    assert caplog.text.count(said) == 1


def test_a_folder_that_cannot_be_written_is_read(folder, model, monkeypatch, caplog):
    with keeping(folder, *model) as server:
        ask(server, prompt_of())
    before = files(folder)
    monkeypatch.setattr(cache_folder.os, "access", lambda *args: False)
    with keeping(folder, *model) as server:
        assert cached(ask(server, prompt_of())[1]) > 100
        ask(server, prompt_of(1))
    assert files(folder) == before
    assert caplog.text.count("cannot be written: it is only read") == 1


def test_a_prefix_larger_than_the_folder_may_be_is_not_kept(folder, model, caplog):
    with keeping(folder, *model, prompt_cache_dir_bytes=1000) as server:
        ask(server, prompt_of())
    assert files(folder) == []
    assert "`prompt_cache_dir_bytes` 1,000 holds no prefix of" in caplog.text


def test_slots_that_another_text_has_by_now_are_not_taken_for_the_first(folder, model):
    """With few slots, the ids of a prompt soon stand for another one."""
    texts = [list(range(start, start + 60)) for start in (10, 80, 150, 220)]
    with serving(*model) as server:
        wanted = [ask(server, ids, merge=True)[0] for ids in texts]
    for _ in range(2):
        with keeping(folder, *model, max_blocks=20, prompt_cache_size=2) as server:
            for _ in range(3):
                for ids, expected in zip(texts, wanted, strict=True):
                    assert alike(ask(server, ids, merge=True)[0], expected)


KILLED = """
import os, signal, sys
from kmerge_mlx.generation import kv_cache
from tests.serving.test_cache_folder import ask, flush, keeping, prompt_of

at, folder, base, adapter = int(sys.argv[1]), *sys.argv[2:]
real = kv_cache.write

def write(*args):
    for number, _ in enumerate(real(*args)):
        args[0].flush()
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield

kv_cache.write = write
from pathlib import Path
with keeping(Path(folder), base, adapter) as server:
    ask(server, prompt_of())
    flush(server)
    ask(server, prompt_of(1))
    flush(server)
"""


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_server_killed_while_it_writes_leaves_nothing_torn(folder, model, at, caplog):
    command = [sys.executable, "-c", KILLED, str(at), str(folder), *map(str, model)]
    paths = os.pathsep.join((str(Path(__file__).parents[2]), str(PLAIN_USER)))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL
    assert files(folder)  # the name of the temporary file ends so too
    assert not [path for path in folder.iterdir() if path.name[0] != "."]
    with serving(*model) as server:
        wanted = ask(server, prompt_of())[0]
    for expected in (False, True):
        with keeping(folder, *model) as server:
            found, usage = ask(server, prompt_of())
            assert alike(found, wanted)
            assert bool(cached(usage)) == expected
    assert len(files(folder)) == 1
    assert "ignored" not in caplog.text


@pytest.mark.slow
def test_sigterm_writes_what_is_in_memory_and_a_second_server_is_one_clear_line(folder, model):
    named = ("--model", model[0], "--adapter-path", model[1], "--prompt-cache-dir", folder)
    with serving_process(*named) as server:
        refused = run_process("serve", "--port", 0, "--log-level", "ERROR", *named)
        said = f"--prompt-cache-dir {folder} is in use by another server: name another"
        assert_one_error(refused, 1, said)
        ask(server.address, prompt_of())
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    with serving_process(*named) as server:
        assert cached(ask(server.address, prompt_of())[1]) > 100


def test_bytes_without_a_folder_are_refused():
    done = run("serve", "--prompt-cache-dir-bytes", "1GB")
    assert_one_error(done, 2, "--prompt-cache-dir-bytes needs a --prompt-cache-dir")
    done = run("serve", "--prompt-cache-dir", "kept", "--prompt-cache-dir-bytes", "0")
    assert_one_error(done, 2, "--prompt-cache-dir-bytes is 0, expected room for prefixes")
    done = run("serve", "--prompt-cache-dir", "")
    assert_one_error(done, 2, "--prompt-cache-dir is empty, expected a folder")


def test_a_folder_that_cannot_be_one_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("serve", "--prompt-cache-dir", tmp_path / "file")
    assert_one_error(done, 1, f"--prompt-cache-dir {tmp_path / 'file'}: File exists: name a folder")


def test_a_prompt_too_long_for_a_files_header_is_not_kept(folder, model, monkeypatch, caplog):
    monkeypatch.setattr("kmerge_mlx.generation.prompt_cache.MAX_HEADER_BYTES", 100)
    with keeping(folder, *model) as server:
        ask(server, prompt_of())
        server.assert_alive()
    assert files(folder) == []
    assert "the prompt is too long for a prompt cache file" in caplog.text
