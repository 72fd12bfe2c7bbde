"""Commands that write a folder, killed at 20 steps each: the destination is old, absent or whole.

A run kills itself at its n-th step on the disk (tests/kills.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.checkpoints import make
from tests.kills import Writer
from tests.tools.models import made

pytestmark = pytest.mark.slow

KILLS = 20


def sources_of(command: str, folder: Path, k: int) -> list[str]:
    """What a command reads."""
    if command in ("fuse", "quantize"):
        return [str(path) for path in made(folder, k)]
    if command == "window":  # K is the seed: another checkpoint
        from tests.reference import lclm

        return [str(lclm.make(folder / "checkpoint", lclm.Sizes(4, 16), seed=k))]
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


@pytest.fixture(scope="module")
def write():
    with Writer() as writer:
        yield writer


@pytest.mark.parametrize("command", ["convert", "window", "export", "fuse", "quantize"])
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
