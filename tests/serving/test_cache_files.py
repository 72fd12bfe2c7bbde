"""``serve --prompt-cache-dir`` with files that are damaged, torn, false or left by a killed server.

The oracle of an answer is a server that made the file, or one without a folder.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kmerge_mlx.generation.prompt_cache import CacheFile
from tests.cli_runner import PLAIN_USER, assert_one_error, run
from tests.servers import PATIENCE, serving
from tests.serving.kept import alike, ask, cached, claims, files, flush, keeping, prompt_of


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


KILLED = """
import os, signal, sys
from kmerge_mlx.generation import kv_cache
from tests.serving.kept import ask, flush, keeping, prompt_of

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
