"""Functions that write a folder, run in processes of their own and killed while they do.

A writer is named as ``module:function``, and called with source, destination and ``force=True``.
Killed at a random moment, spread over the measured duration and dense where files are written; or
at the n-th step on the disk, by an audit hook that kills the process there.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CONVERT = "kmerge_mlx.convert.checkpoint:convert_checkpoint"
EXPORT = "kmerge_mlx.convert.export:export_adapter"

# Writes, once told to; at the n-th step on the disk near DST it kills itself (0: never). Without
# torch, which the converter does not need and Transformers would spend a second to import.
_CHILD = """
import importlib, os, signal, sys
from importlib.machinery import PathFinder

class NoTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = NoTorch
writer, source, destination, at = *sys.argv[1:4], int(sys.argv[4])
module, _, name = writer.partition(":")
write = getattr(importlib.import_module(module), name)
steps = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
left = at

def count(event, arguments):
    global left
    if event in steps and os.path.dirname(destination) in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

print("ready", flush=True)
sys.stdin.readline()
if at:
    sys.addaudithook(count)
write(source, destination, force=True)
print(at - left, flush=True)
"""


def start(writer: str, source: str, path: Path, step: int = 0) -> subprocess.Popen:
    """A child that waits for :func:`go`; with a step, it kills itself there."""
    command = [sys.executable, "-c", _CHILD, writer, source, str(path), str(step)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(child: subprocess.Popen) -> None:
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()


def finish(child: subprocess.Popen) -> str:
    with child:
        return child.communicate(timeout=60)[0]


def started(
    writer: str, source: str, paths: list[Path], steps: list[int]
) -> Iterator[subprocess.Popen]:
    """One child for each path; the next two import while the last one is checked."""
    waiting: list[subprocess.Popen] = []
    for i in range(len(paths)):
        while len(waiting) < 3 and i + len(waiting) < len(paths):
            ahead = i + len(waiting)
            waiting.append(start(writer, source, paths[ahead], steps[ahead]))
        yield waiting.pop(0)


def count_steps(writer: str, source: str, path: Path) -> int:
    """Steps on the disk that a run takes when nobody interferes."""
    child = start(writer, source, path, 10_000)
    go(child)
    return int(finish(child))


def measure(writer: str, folder: Path, source: str) -> tuple[float, float]:
    """Seconds until the first file is written, and until the end."""
    folder.mkdir()
    child = start(writer, source, folder / "dst")
    go(child)
    begun = time.perf_counter()
    while not any(folder.iterdir()):
        assert child.poll() is None
    writes = time.perf_counter() - begun
    child.stdout.readline()
    ends = time.perf_counter() - begun
    finish(child)
    return writes, ends


def moments(writes: float, ends: float) -> Iterator[float]:
    """Seconds: a few before the writing, many while it goes on, some about its end."""
    draw = random.Random(17)
    spans = [(0.0, writes)] * 3 + [(writes, ends)] * 8 + [(0.85 * ends, ends)] * 4
    yield from (draw.uniform(*span) for span in spans)


def kill_at(child: subprocess.Popen, delay: float) -> bool:
    """Lets a child run for so many seconds; returns whether that was before its end."""
    go(child)
    time.sleep(delay)
    child.kill()
    finish(child)
    return child.returncode == -9
