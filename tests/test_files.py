"""Reading strangers' files and replacing folders: bounded, strict, atomic.

The safetensors files are put together byte by byte; the safetensors library and ``json`` are the
oracles of what a good one holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kmerge_mlx import files
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.files import (
    alone,
    clear_leftovers,
    digest,
    read_json,
    read_safetensors,
    replacing_file,
    replacing_folder,
    safetensors_shapes,
    settled,
    write_json,
    write_safetensors,
)

ONE, PYTHON = struct.pack("<f", 1.0), sys.executable


def header(content: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file around any header; ``length`` lies about its size."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: list[int], start: int = 0, stop: int = 4, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def message(read, path: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read(path, AdapterError)
    text = str(caught.value)
    assert text.splitlines()[0].strip()
    assert path.name in text.splitlines()[0]
    return text


# ---- JSON ----


def test_numbers_that_json_has_no_place_for_stay_text_and_can_be_written_again(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[NaN, Infinity, -Infinity, 1e999, 12345678901234567890, 1e308]")
    found = read_json(path, AdapterError)
    assert found == ["NaN", "Infinity", "-Infinity", "1e999", "12345678901234567890", 1e308]
    content = {"a": found, "b": [1, -2.5e3, None, True, "é", {}]}
    write_json(path, content)
    assert read_json(path, AdapterError) == content == json.loads(path.read_text())


def test_bad_json_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    for content, why in (
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 33 + b"]" * 33, "nested more than 32 deep"),
        (b"[" * 500_000 + b"]" * 500_000, "not valid JSON"),
        (b"[" + b" " * (1 << 20) + b"]", "larger than 1 MiB"),
    ):
        path.write_bytes(content)
        text = message(read_json, path)
        assert why in text
        assert "\n" not in text
    path.write_bytes(b"[" * 32 + b"]" * 32)
    assert read_json(path, AdapterError)


def test_what_is_not_a_file_is_refused_instead_of_read_forever(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for read in (read_json, read_safetensors):
        for name in ("pipe", "zero"):
            assert "it is not a file" in message(read, tmp_path / name)
        assert "it is not a file" in message(read, tmp_path)
        assert "No such file" in message(read, tmp_path / "absent.json")


# ---- safetensors ----


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    bits = mx.random.randint(0, 2**32, (64, 3), dtype=mx.uint32)
    array = bits.view(dtype)  # every kind of number, NaNs with payloads too
    tensors = {"b.x": array, "a": array.T, "scalar": mx.array(1.5), "none": mx.zeros(0)}
    write_safetensors(path, tensors)
    found = read_safetensors(path, AdapterError)
    assert list(found) == ["a", "b.x", "none", "scalar"]
    assert found["b.x"].dtype == dtype
    assert mx.array_equal(found["b.x"].view(mx.uint8), array.view(mx.uint8))
    assert mx.array_equal(found["a"].T.view(mx.uint16), array.view(mx.uint16))
    if dtype != mx.bfloat16:  # which numpy does not have
        theirs = load_file(path)
        shapes = {name: array.shape for name, array in theirs.items()}
        assert safetensors_shapes(path, AdapterError) == shapes
        save_file(theirs, tmp_path / "b.safetensors")
        again = read_safetensors(tmp_path / "b.safetensors", AdapterError)
        assert theirs["b.x"].tobytes() == np.array(again["b.x"]).tobytes()


BAD = {
    "a_text": b"not a safetensors file at all",
    "a_header_longer_than_memory": header({"a": entry([1])}, ONE, 2**63),
    "data_cut_short": header({"a": entry([2], 0, 8)}, ONE),
    "overlapping_tensors": header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, ONE * 3),
    "a_shape_that_overflows": header({"a": entry([2**62, 4], 0, 0)}),
    "a_negative_side": header({"a": entry([-1])}, ONE),
    "float64": header({"a": entry([1], 0, 8, "F64")}, ONE * 2),
    "a_deep_header": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a_name_of_two_lines": header({"a\nb": entry([1])}, ONE),
    "a_name_that_moves_the_cursor": header({"a\x1b[2J": entry([1])}, ONE),
}


def test_a_bad_safetensors_file_is_one_short_line(tmp_path):
    path = tmp_path / "a.safetensors"
    for name, content in BAD.items():
        path.write_bytes(content)
        text = message(read_safetensors, path)
        assert text.isprintable(), name
        assert len(text) < 300 + len(str(path)), name
    tensors = {"a": entry([1], 0, 8, "F64"), "b": entry([1], 8, 12), "c": entry([1], 12, 20, "I64")}
    path.write_bytes(header(tensors, ONE * 5))
    text = message(read_safetensors, path)  # every tensor is listed
    assert "a has dtype F64, expected one of F32, F16, BF16" in text
    assert "c has dtype I64" in text
    assert " b " not in text


# ---- replacing a folder or a file ----


def fill(path: Path, text: str) -> None:
    with replacing_folder(path) as folder:
        (folder / "a.txt").write_text(text)


def test_a_folder_is_made_with_its_parents_and_replaced_whole(tmp_path):
    path = tmp_path / "x" / "z"
    fill(path, "1")
    assert (path / "a.txt").read_text() == "1"
    (tmp_path / "plain").mkdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (path / "more.txt").write_text("gone")
    fill(path, "2")
    assert [p.name for p in (tmp_path / "x").rglob("*")] == ["z", "a.txt"]
    assert (path / "a.txt").read_text() == "2"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_everything_as_it_was(tmp_path, error):
    fill(tmp_path / "z", "1")
    (tmp_path / "f.txt").write_text("1")

    def fail(replacing, name):
        with replacing(tmp_path / name) as new:
            (new / "a.txt" if new.is_dir() else new).write_text("2")
            raise error

    for replacing, name in ((replacing_folder, "z"), (replacing_file, "f.txt")):
        with pytest.raises(error):
            fail(replacing, name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "f.txt", "z"]
    assert (tmp_path / "z" / "a.txt").read_text() == (tmp_path / "f.txt").read_text() == "1"


def test_an_error_at_the_swap_gives_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "z", "1")
    rename = Path.rename

    def fail_for_the_new(self, target):
        if ".new-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "z", "2")
    assert [p.name for p in tmp_path.rglob("*")] == ["z", "a.txt"]
    assert (tmp_path / "z" / "a.txt").read_text() == "1"


@pytest.fixture(params=["dead", "own"])
def pid(request) -> int:
    """A killed run's number: of a dead process, or, as in a container, that of the next run."""
    dead = int(subprocess.check_output([PYTHON, "-c", "import os; print(os.getpid())"]))
    return os.getpid() if request.param == "own" else dead


@pytest.mark.parametrize("name", ["z", "a[1]*", "z.new-1"])
def test_what_killed_runs_left_is_cleared(tmp_path, pid, name):
    for kind in ("new", "old"):
        (tmp_path / f".{name}.{kind}-{pid}-abc").mkdir()
    (tmp_path / f".{name}.new-{pid}-abc" / "half.txt").write_text("half")
    fill(tmp_path / name, "1")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    (tmp_path / f".f.txt.new-{pid}.txt").write_text("half")
    with replacing_file(tmp_path / "f.txt") as new:
        new.write_text("1")
    assert {p.name for p in tmp_path.iterdir()} == {name, "f.txt"}


def test_a_half_replaced_folder_is_given_back(tmp_path, pid):
    (tmp_path / f".z.new-{pid}-abc").mkdir()
    for text in ("the old one", "an older one"):
        fill(tmp_path / f".z.old-{pid}-abc", text)
        clear_leftovers(tmp_path / "z")
        assert [p.name for p in tmp_path.iterdir()] == ["z"]
        assert (tmp_path / "z" / "a.txt").read_text() == "the old one"
    clear_leftovers(tmp_path / "absent" / "z")


def test_what_is_of_a_living_run_or_of_somebody_else_stays(tmp_path):
    names = [
        ".y.new-1-abc",
        ".z.new-",
        ".z.new-x-abc",
        ".z.new-²-abc",
        ".z.other-1-abc",
        "z.new-1-a",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".z.old-4194999-link").symlink_to(tmp_path / names[0])
    with subprocess.Popen([PYTHON, "-c", "input()"], stdin=subprocess.PIPE) as other:
        names += [f".z.new-{other.pid}-abc", ".z.old-4194999-link"]
        (tmp_path / f".z.new-{other.pid}-abc").mkdir()
        fill(tmp_path / "z", "1")
        other.stdin.close()
    assert {p.name for p in tmp_path.iterdir()} == {*names, "z"}
    assert not (tmp_path / "z").is_symlink()


# ---- at the same time ----


def test_a_path_is_written_by_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from kmerge_mlx.files import alone\n"
        "with alone(Path(sys.argv[1]), Exception):\n    print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [PYTHON, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(AdapterError, match="is being written by another run"):
            alone(path, AdapterError).__enter__()
        other.kill()
    with alone(path, AdapterError), alone(tmp_path / "other", AdapterError):
        pass
    assert [*tmp_path.iterdir()] == []
    (tmp_path / ".run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(AdapterError, match="cannot write"):
        alone(path, AdapterError).__enter__()
    assert not (tmp_path / "precious").exists()


def test_a_folder_is_read_from_one_version_while_it_is_replaced(tmp_path):
    """Without ``settled`` some readings are of two versions, and some find nothing."""
    path, versions, done = tmp_path / "z", set(), threading.Event()

    def write(number: int) -> None:
        with replacing_folder(path) as new:
            for name in "ab":
                (new / name).write_text(str(number))

    def write_on() -> None:
        number = 1
        while not done.is_set():
            write(number := number + 1)
            time.sleep(0.004)

    def read() -> tuple[str, str]:
        try:
            first = (path / "a").read_text()
            time.sleep(0.001)
            return first, (path / "b").read_text()
        except OSError as error:
            raise AdapterError("gone") from error

    write(0)
    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        for _ in range(30):
            one, two = settled(path, read)
            assert one == two
            versions.add(one)
    finally:
        done.set()
        writer.join()
    assert len(versions) > 1
    with pytest.raises(AdapterError, match="gone"):
        settled(tmp_path / "absent", lambda: (_ for _ in ()).throw(AdapterError("gone")))


def test_the_digest_of_a_file_is_that_of_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 10)
    path = tmp_path / "a"
    for content in (b"", b"0123456789", b"0123456789abc"):
        path.write_bytes(content)
        pieces = [hashlib.sha256(content[i : i + 10]).digest() for i in range(0, len(content), 10)]
        whole = hashlib.sha256(str(len(content)).encode() + b"".join(pieces))
        assert digest(path) == whole.hexdigest()


def test_tensors_that_no_memory_holds_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    content = header({"a": entry([1 << 20, 1 << 18], 0, 1 << 40)})
    path.write_bytes(content)
    os.truncate(path, len(content) + (1 << 40))
    assert "is of 1,100 GB of tensors, expected at most this machine's" in message(
        read_safetensors, path
    )


def test_macos_is_asked_to_write_what_the_disk_holds_back(tmp_path, monkeypatch):
    asked = []

    def full(descriptor, command):
        asked.append((os.fstat(descriptor).st_ino, command))
        if len(asked) == 2:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", full)
    path = tmp_path / "a.json"
    with files.replacing_file(path) as new:
        files.write_json(new, {})
    inodes = [path.stat().st_ino, path.stat().st_ino, tmp_path.stat().st_ino]
    assert asked == [(inode, 51) for inode in inodes]
