"""``fuse`` and ``quantize``, killed 20 times each: the destination is as it was, absent or whole.

One process imports everything and forks at each kill, so that a kill costs no imports: random
moments spread over the measured duration, dense where files are written.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.tools.fuse import fuse
from tests.tools.test_fuse import made

# Reads lines "DESTINATION SECONDS": does it in a fork, which is killed after so many seconds (0:
# never), and says whether it was, how long it took, and how long until something was written.
FORKING = """
import os, signal, sys, time
from pathlib import Path
import kmerge_mlx.tools.fuse, kmerge_mlx.tools.quantize

how, base, adapter = sys.argv[1:]
TEXT = "One two three"  # little to measure: most moments are those of writing

def work(destination):
    if how == "fuse":
        kmerge_mlx.tools.fuse.fuse(base, adapter, destination, text=TEXT, force=True)
    else:
        kmerge_mlx.tools.quantize.quantize(base, destination, None, adapter, text=TEXT, force=True)

for line in sys.stdin:
    destination, seconds = line.rsplit(" ", 1)
    around = Path(destination).parent
    there, begun, wrote = len(list(around.iterdir())), time.monotonic(), 0.0
    child = os.fork()
    if not child:
        try:
            work(destination)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - begun
        if pid:
            break
        if not wrote and len(list(around.iterdir())) > there:
            wrote = passed
        if float(seconds) and passed >= float(seconds):
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    print(os.waitstatus_to_exitcode(status), wrote, passed, flush=True)
"""
KILLS = 20


class Forks:
    """The process that forks."""

    def __init__(self, *args: object):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, destination: Path, seconds: float = 0.0) -> tuple[int, float, float]:
        """Exit code, seconds until something was written, seconds in all."""
        self.process.stdin.write(f"{destination} {seconds}\n")
        self.process.stdin.flush()
        code, wrote, passed = self.process.stdout.readline().split()
        return int(code), float(wrote), float(passed)


def content(path: Path) -> dict[str, bytes]:
    """Every tensor of a model and its adapter that load, and the bytes of the other files."""
    model, _ = load(str(path), path)
    adapter = load_adapter(path)
    tensors = dict(tree_flatten(model.parameters())) | adapter.tuning_weights
    found = {name: np.array(array).tobytes() for name, array in tensors.items()}
    for file in path.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            found[str(file.relative_to(path))] = file.read_bytes()
    return found


def moments(wrote: float, ends: float) -> Iterator[float]:
    """Seconds, without an end: of five, one before the writing, one about its end."""
    draw = random.Random(5)
    for span in itertools.cycle([(0.01, wrote), *[(wrote, ends)] * 3, (0.85 * ends, ends)]):
        yield draw.uniform(*span)


@pytest.mark.parametrize("how", ["fuse", "quantize"])
def test_killed_at_20_moments_the_destination_is_never_torn(tmp_path, how):
    base, adapter = made(tmp_path / "made", hidden_size=256, intermediate_size=1024)
    other = made(tmp_path / "other")
    fuse(str(other[0]), other[1], tmp_path / "old", text="One")
    old = content(tmp_path / "old")
    forks = Forks(how, base, adapter)
    with forks.process:
        for folder in ("whole", "timed"):
            (tmp_path / folder).mkdir()
            code, wrote, ends = forks.run(tmp_path / folder / "dst")
            assert code == 0
        new, found, killed = content(tmp_path / "whole" / "dst"), [], 0
        for i, seconds in enumerate(moments(wrote, ends)):
            if killed == KILLS:
                break
            assert i < 3 * KILLS  # some end before they are killed
            home = tmp_path / str(i)
            home.mkdir()
            replace = i % 2
            if replace:
                shutil.copytree(tmp_path / "old", home / "dst")
            code, _, _ = forks.run(home / "dst", seconds)
            assert code in (0, -9)
            killed += code == -9
            if (home / "dst").exists():
                after = content(home / "dst")
                found.append("new" if after == new else "old" if replace and after == old else "?")
            else:
                found.append("absent")
            # The next run gives back what was to be replaced, or goes through, and cleans up.
            assert forks.run(home / "dst")[0] == 0
            assert content(home / "dst") == new
            assert [path.name for path in home.iterdir()] == ["dst"]
        forks.process.stdin.close()
    assert "?" not in found
    assert {"absent", "old"} <= set(found)
