"""Conversions and exports that are killed: what is there is absent, the old one or the new one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from tests.checkpoints import make

WRITERS = {"convert": convert_checkpoint, "export": export_adapter}
KILLS = 20

# Kills itself at the n-th step on the disk near DST, and says how many there were.
CHILD = """
import os, signal, sys
sys.modules["torch"] = None  # not needed, and slow to import
from kmerge_mlx.convert.checkpoint import convert_checkpoint as convert
from kmerge_mlx.convert.export import export_adapter as export
write, source, destination, left = globals()[sys.argv[1]], *sys.argv[2:4], int(sys.argv[4])
steps = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
steps |= {"os.scandir", "os.listdir", "shutil.rmtree"}
begun = left

def count(event, arguments):
    global left
    if event in steps and os.path.dirname(destination) in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
write(source, destination, force=True)
print(begun - left)
"""


def run(writer: str, source: str, path: Path, step: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD, writer, source, str(path), str(step)]
    return subprocess.run(command, capture_output=True, text=True)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict[str, str]]:
    """For each writer, what makes the folder to be replaced, and what replaces it."""
    folder = tmp_path_factory.mktemp("sources")
    found: dict[str, dict[str, str]] = {"convert": {}, "export": {}}
    for name, sizes in {"old": {"k": 2, "d": 64}, "new": {"k": 4, "d": 100}}.items():
        source = str(make(**sizes, head=False, layers=24).write(folder / name / "checkpoint"))
        convert_checkpoint(source, folder / name / "adapter")
        found["convert"][name], found["export"][name] = source, str(folder / name / "adapter")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_any_step_of_a_replacement_the_folder_is_absent_or_whole(
    tmp_path, sources, writer
):
    write, from_ = WRITERS[writer], sources[writer]
    for name in ("old", "new"):
        write(from_[name], tmp_path / name)
    whole = {name: content(tmp_path / name) for name in ("old", "new")}
    path = tmp_path / "here" / "dst"
    write(from_["old"], path)
    steps = int(run(writer, from_["new"], path, 10_000).stdout)
    found = []
    # The last steps: the files, the two renames, the removal of the old folder.
    for step in range(steps, max(0, steps - KILLS), -1):
        write(from_["old"], path, force=True)
        assert run(writer, from_["new"], path, step).returncode == -signal.SIGKILL
        there = content(path) if path.exists() else None
        found.append(next((n for n in whole if whole[n] == there), "torn" if there else "absent"))
        write(from_["new"], path, force=True)  # the next run succeeds, and leaves nothing else
        assert content(path) == whole["new"]
        assert [p.name for p in path.parent.iterdir()] == ["dst"]
    assert set(found) == {"old", "absent", "new"}
    assert found == sorted(found, key=["new", "absent", "old"].index)
