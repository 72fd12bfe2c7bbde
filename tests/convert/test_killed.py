"""A convert or export that is killed: what is there is absent, the old folder or the new one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from tests.checkpoints import make

KILLS = 20
WRITERS = {"convert_checkpoint": convert_checkpoint, "export_adapter": export_adapter}

# Kills itself at the n-th step on the disk near DST, and says how many there were.
CHILD = """
import os, signal, sys
sys.modules["torch"] = None  # not needed, and slow to import
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
writer, source, destination, left = *sys.argv[1:4], int(sys.argv[4])
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
globals()[writer](source, destination, force=True)
print(begun - left)
"""


def run(writer: str, source: str, path: Path, step: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD, writer, source, str(path), str(step)]
    return subprocess.run(command, capture_output=True, text=True)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_any_step_of_a_replacement_the_folder_is_absent_or_whole(tmp_path, writer):
    sources, whole, write = {}, {}, WRITERS[writer]
    for name, sizes in {"old": {"k": 2, "d": 64}, "new": {"k": 4, "d": 100}}.items():
        sources[name] = str(make(**sizes, head=False, layers=24).write(tmp_path / f"{name}_src"))
        if writer == "export_adapter":
            convert_checkpoint(sources[name], tmp_path / f"{name}_adapter")
            sources[name] = str(tmp_path / f"{name}_adapter")
        write(sources[name], tmp_path / name)
        whole[name] = content(tmp_path / name)
    path = tmp_path / "here" / "dst"
    write(sources["old"], path)
    steps = int(run(writer, sources["new"], path, 10_000).stdout)
    found = []
    # The last steps: the files, the two renames, the removal of the old folder.
    for step in range(steps, max(0, steps - KILLS), -1):
        write(sources["old"], path, force=True)
        assert run(writer, sources["new"], path, step).returncode == -signal.SIGKILL
        there = content(path) if path.exists() else None
        found.append(next((n for n in whole if whole[n] == there), "torn" if there else "absent"))
        # The next run succeeds, and leaves nothing else.
        write(sources["new"], path, force=True)
        assert content(path) == whole["new"]
        assert [p.name for p in path.parent.iterdir()] == ["dst"]
    assert set(found) == {"old", "absent", "new"}
    assert found == sorted(found, key=["new", "absent", "old"].index)
