"""``serve --prompt-cache-dir``: a restarted server goes on from the files, and answers as before.

The oracle of an answer is a server without a folder, which reads the whole prompt.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.errors import ServeError
from kmerge_mlx.generation.prompt_cache import CacheFile
from kmerge_mlx.serving import cache_folder
from tests.cli_runner import assert_one_error, run, run_process
from tests.servers import serving, serving_process
from tests.serving.kept import (
    NO_END,
    WORDS,
    alike,
    ask,
    cached,
    claims,
    document,
    events,
    files,
    flush,
    keeping,
    prompt_of,
)
from tests.tiny import EXPERTS, qwen2_config, random_adapter, write_base
from tests.tools.test_sizing import GEMMA3, HYBRIDS

EIGHT_BITS = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


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
