"""A conversion that is killed: what is there is absent, the old adapter or the new one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.checkpoints import make

KILLS = 20

# Kills itself at the n-th step on the disk near DST, and says how many there were.
CHILD = """
import os, signal, sys
sys.modules["torch"] = None  # not needed, and slow to import
from kmerge_mlx.convert.checkpoint import convert_checkpoint
source, destination, left = *sys.argv[1:3], int(sys.argv[3])
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
convert_checkpoint(source, destination, force=True)
print(begun - left)
"""


def run(source: str, path: Path, step: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD, source, str(path), str(step)]
    return subprocess.run(command, capture_output=True, text=True)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.slow
def test_killed_at_any_step_of_a_replacement_the_folder_is_absent_or_whole(tmp_path):
    sources, whole = {}, {}
    for name, sizes in {"old": {"k": 2, "d": 64}, "new": {"k": 4, "d": 100}}.items():
        sources[name] = str(make(**sizes, head=False, layers=24).write(tmp_path / f"{name}_src"))
        convert_checkpoint(sources[name], tmp_path / name)
        whole[name] = content(tmp_path / name)
    path = tmp_path / "here" / "dst"
    convert_checkpoint(sources["old"], path)
    steps = int(run(sources["new"], path, 10_000).stdout)
    found = []
    # The last steps: the files, the two renames, the removal of the old folder.
    for step in range(steps, max(0, steps - KILLS), -1):
        convert_checkpoint(sources["old"], path, force=True)
        assert run(sources["new"], path, step).returncode == -signal.SIGKILL
        there = content(path) if path.exists() else None
        found.append(next((n for n in whole if whole[n] == there), "torn" if there else "absent"))
        # The next run succeeds, and leaves nothing else.
        convert_checkpoint(sources["new"], path, force=True)
        assert content(path) == whole["new"]
        assert [p.name for p in path.parent.iterdir()] == ["dst"]
    assert set(found) == {"old", "absent", "new"}
    assert found == sorted(found, key=["new", "absent", "old"].index)
