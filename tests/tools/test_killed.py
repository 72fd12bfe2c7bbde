"""Commands that write a folder, killed at 20 steps each: the destination is old, absent or whole.

One process imports everything and forks for each run. A run kills itself at its n-th step on the
disk near the destination, so that neither the clock nor the load decides where.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.checkpoints import make
from tests.tools.models import made

pytestmark = pytest.mark.slow

# Reads lines [COMMAND, SOURCES, DESTINATION, STEP]: does it in a fork that kills itself at that
# step (0: never), and says how it ended and how many steps it took.
FORKING = """
import json, os, signal, sys
sys.modules["torch"] = None  # not needed, and slow to import
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from kmerge_mlx.source import Source
from kmerge_mlx.tools.fuse import fuse
from kmerge_mlx.tools.quantize import quantize

WRITERS = {
    "convert": lambda source, to: convert_checkpoint(source, to, force=True),
    "export": lambda source, to: export_adapter(source, to, force=True),
    "fuse": lambda *named: fuse(Source.find(*named[:2]), named[2], text="One", force=True),
    "quantize": lambda *named: quantize(Source.find(*named[:2]), named[2], text="One", force=True),
}
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
    command, sources, destination, step = json.loads(line)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        around, at = os.path.dirname(destination), step
        try:
            WRITERS[command](*sources, destination)
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


@pytest.fixture(scope="module")
def write() -> Iterator[Callable[..., tuple[int, int]]]:
    """Writes in a fork: gives an exit code, and the steps that it took."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FORKING], text=True, **pipes) as process:

        def run(command: str, sources: list[str], path: Path, step: int = 0) -> tuple[int, int]:
            process.stdin.write(json.dumps([command, sources, str(path), step]) + "\n")
            process.stdin.flush()
            code, taken = process.stdout.readline().split()
            return int(code), int(taken)

        yield run
        process.stdin.close()


def sources_of(command: str, folder: Path, k: int) -> list[str]:
    """What a command reads."""
    if command in ("fuse", "quantize"):
        return [str(path) for path in made(folder, k)]
    source = make(k=k, head=False).write(folder / "checkpoint")
    if command == "convert":
        return [str(source)]
    convert_checkpoint(str(source), folder / "adapter")
    return [str(folder / "adapter")]


def content(path: Path) -> dict[str, bytes] | None:
    """Every tensor below a folder, and the bytes of the other files."""
    found = {}
    for file in (file for file in path.rglob("*") if file.is_file()):
        name = str(file.relative_to(path))
        if file.suffix == ".safetensors":
            tensors = mx.load(str(file))
            found |= {f"{name}: {n}": np.array(a).tobytes() for n, a in tensors.items()}
        else:
            found[name] = file.read_bytes()
    return found if path.exists() else None


@pytest.mark.parametrize("command", ["convert", "export", "fuse", "quantize"])
def test_killed_at_20_steps_the_destination_is_never_torn(tmp_path, write, command):
    old, new = (sources_of(command, tmp_path / f"source {k}", k) for k in (2, 4))
    assert write(command, old, tmp_path / "old" / "dst")[0] == 0
    shutil.copytree(tmp_path / "old", tmp_path / "replaced")
    counts = [write(command, new, tmp_path / name / "dst") for name in ("new", "replaced")]
    assert [code for code, _ in counts] == [0, 0]
    known = {"absent": None} | {name: content(tmp_path / name / "dst") for name in ("old", "new")}
    found: tuple[list[str], list[str]] = ([], [])
    for i in range(KILLS):
        home, replaces = tmp_path / str(i), i % 2
        home.mkdir()
        step = 1 + i * counts[0][1] // KILLS  # spread over all of them
        if replaces:
            # The last ones: the files, the two renames, the removal of the old folder.
            shutil.copytree(tmp_path / "old" / "dst", home / "dst")
            step = counts[1][1] - i // 2
        assert write(command, new, home / "dst", step)[0] == -9
        after = content(home / "dst")
        found[replaces].append(next((name for name in known if known[name] == after), "torn"))
        # The next run gives back what was to be replaced, or goes through, and cleans up.
        assert write(command, new, home / "dst")[0] == 0
        assert content(home / "dst") == known["new"]
        assert [path.name for path in home.iterdir()] == ["dst"]
    assert set(found[0]) <= {"absent", "new"}
    assert set(found[1]) == {"old", "absent", "new"}
    assert found[1] == sorted(found[1], key=["new", "absent", "old"].index)
