"""``fuse`` and ``quantize``, killed at 20 steps each: the destination is old, absent or whole.

One process imports everything and forks for each run. A run kills itself at its n-th step on the
disk near the destination, so that neither the clock nor the load decides where.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import load_adapter
from tests.tools.models import fuse_folders, made

# Reads lines "DESTINATION STEP": does it in a fork that kills itself at that step (0: never), and
# says how it ended and how many steps it took.
FORKING = """
import os, signal, sys
from pathlib import Path
from kmerge_mlx.source import Source
from kmerge_mlx.tools.fuse import fuse
from kmerge_mlx.tools.quantize import quantize

write = {"fuse": fuse, "quantize": quantize}[sys.argv[1]]
source = Source.find(*sys.argv[2:])
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
around, at, taken = "", 0, 0

def count(event, arguments):
    global taken
    if around and event in STEPS and around in str(arguments[0]):
        taken += 1
        if taken == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
for line in sys.stdin:
    destination, step = line.rsplit(" ", 1)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        around, at = str(Path(destination).parent), int(step)
        try:
            write(source, destination, text="One two three", force=True)
            os.write(theirs, str(taken).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    os.close(theirs)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), os.read(ours, 20).decode() or 0, flush=True)
    os.close(ours)
"""
KILLS = 20


@contextmanager
def forks(*args: object) -> Iterator[Callable[[Path, int], tuple[int, int]]]:
    """The process that forks; what it yields gives an exit code, and the steps that it took."""
    command = [sys.executable, "-c", FORKING, *map(str, args)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:

        def run(destination: Path, step: int = 0) -> tuple[int, int]:
            process.stdin.write(f"{destination} {step}\n")
            process.stdin.flush()
            code, taken = process.stdout.readline().split()
            return int(code), int(taken)

        yield run
        process.stdin.close()


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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fuse", "quantize"])
def test_killed_at_20_steps_the_destination_is_never_torn(tmp_path, how):
    base, adapter = made(tmp_path / "made")
    other = made(tmp_path / "other", k=2)
    fuse_folders(*other, tmp_path / "old", text="One")
    old, found = content(tmp_path / "old"), []
    homes = [tmp_path / name for name in ("first", "replacing", *map(str, range(KILLS)))]
    for i, home in enumerate(homes):
        home.mkdir()
        if i % 2:
            shutil.copytree(tmp_path / "old", home / "dst")
    with forks(how, base, adapter) as write:
        counts = [write(home / "dst") for home in homes[:2]]
        assert [code for code, _ in counts] == [0, 0]
        new = content(homes[0] / "dst")
        for i, home in enumerate(homes[2:]):
            # Spread over all steps, the last ones (where folders change places) included.
            steps = counts[i % 2][1]
            step = steps - i // 2 if i < KILLS // 2 else 1 + i * steps // KILLS
            assert write(home / "dst", max(1, step))[0] == -9
            after = content(home / "dst") if (home / "dst").exists() else None
            known = {"absent": None, "new": new} | ({"old": old} if i % 2 else {})
            found += [name for name, wanted in known.items() if after == wanted]
            # The next run gives back what was to be replaced, or goes through, and cleans up.
            assert write(home / "dst")[0] == 0
            assert content(home / "dst") == new
            assert [path.name for path in home.iterdir()] == ["dst"]
    assert len(found) == KILLS
    assert {"absent", "old", "new"} == set(found)
