"""Conversions that are killed: the destination is absent or whole, and the next run cleans up.

Random moments first, spread over the measured duration and dense where files are written; then
every step of the replacement, by an audit hook that kills the process at the n-th one.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kmerge_mlx.adapter import load_adapter
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.checkpoints import make

# Converts, once told to; at the n-th step on the disk near DST it kills itself (0: never). Without
# torch, which the converter does not need and Transformers would spend a second to import.
CHILD = """
import os, signal, sys
from importlib.machinery import PathFinder

class NoTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = NoTorch
from kmerge_mlx.convert.checkpoint import convert_checkpoint

source, destination, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
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
convert_checkpoint(source, destination, force=True)
print(at - left, flush=True)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[int, str]:
    """Two checkpoints, K = 2 and 4; the larger takes some 0.3 s to convert."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {2: {"k": 2, "d": 64}, 4: {"k": 4, "d": 400}}
    made = {k: make(**options, head=False, layers=24) for k, options in sizes.items()}
    return {k: str(m.write(folder / f"k{k}")) for k, m in made.items()}


@pytest.fixture(scope="module")
def contents(sources, tmp_path_factory) -> dict[int, dict[str, bytes]]:
    """What each makes when nobody interferes."""
    folder = tmp_path_factory.mktemp("whole")
    for k, source in sources.items():
        convert_checkpoint(source, folder / f"k{k}")
    return {k: content(folder / f"k{k}") for k in sources}


def content(path: Path) -> dict[str, bytes]:
    """Every tensor of an adapter that loads."""
    adapter = load_adapter(path)
    tensors = adapter.encoder_weights | adapter.tuning_weights
    return {name: np.array(array).tobytes() for name, array in tensors.items()}


def start(source: str, path: Path, step: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, source, str(path), str(step)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(child: subprocess.Popen) -> None:
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()


def finish(child: subprocess.Popen) -> str:
    with child:
        return child.communicate(timeout=60)[0]


def started(source: str, paths: list[Path], steps: list[int]) -> Iterator[subprocess.Popen]:
    """One child for each path; the next two import while the last one is checked."""
    waiting: list[subprocess.Popen] = []
    for i in range(len(paths)):
        while len(waiting) < 3 and i + len(waiting) < len(paths):
            ahead = i + len(waiting)
            waiting.append(start(source, paths[ahead], steps[ahead]))
        yield waiting.pop(0)


def prepared(folder: Path, replace: bool, sources: dict[int, str]) -> Path:
    """A place to convert to; with an adapter of K = 2 there, if it is to be replaced."""
    folder.mkdir()
    if replace:
        convert_checkpoint(sources[2], folder / "dst")
    return folder / "dst"


def check(path: Path, replace: bool, sources, contents) -> str:
    """Absent, the old or the new one, whole; the next run succeeds and leaves nothing else."""
    found = "absent"
    if path.exists():
        k = load_adapter(path).merge.encoder.merge_factor
        assert content(path) == contents[k]
        assert k == 4 or replace
        found = {2: "old", 4: "new"}[k]
    convert_checkpoint(sources[4], path, force=True)
    assert content(path) == contents[4]
    assert [p.name for p in path.parent.iterdir()] == ["dst"]
    return found


def measure(folder: Path, source: str) -> tuple[float, float]:
    """Seconds until the first file is written, and until the end."""
    folder.mkdir()
    child = start(source, folder / "dst")
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


@pytest.mark.parametrize("replace", [False, True], ids=["new", "force"])
def test_killed_at_a_random_moment_the_destination_is_absent_or_whole(
    tmp_path, sources, contents, replace
):
    writes, ends = measure(tmp_path / "measure", sources[4])
    delays = [*moments(writes, ends)]
    paths = [prepared(tmp_path / str(i), replace, sources) for i in range(len(delays))]
    killed, found = 0, []
    children = started(sources[4], paths, [0] * len(paths))
    for path, delay, child in zip(paths, delays, children, strict=True):
        go(child)
        time.sleep(delay)
        child.kill()
        finish(child)
        killed += child.returncode == -9
        found.append(check(path, replace, sources, contents))
    assert killed >= 10  # of each kind; the others had ended
    assert ("old" if replace else "absent") in found


def test_killed_at_any_step_of_a_replacement_the_destination_is_absent_or_whole(
    tmp_path, sources, contents
):
    path = prepared(tmp_path / "count", True, sources)
    child = start(sources[4], path, 10_000)
    go(child)
    steps = int(finish(child))
    # The last: the four files, the two renames, the removal of the old folder.
    chosen = [*range(steps, max(0, steps - 18), -1)]
    paths = [prepared(tmp_path / str(step), True, sources) for step in chosen]
    found = []
    for path, child in zip(paths, started(sources[4], paths, chosen), strict=True):
        go(child)
        finish(child)
        assert child.returncode == -9
        found.append(check(path, True, sources, contents))
    assert set(found) == {"old", "absent", "new"}
    assert found == sorted(found, key=["new", "absent", "old"].index)
