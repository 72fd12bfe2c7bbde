"""Exports that are killed: the destination is absent, the old one or the new one, and whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from tests.checkpoints import make
from tests.killed_writers import (
    EXPORT,
    count_steps,
    finish,
    go,
    kill_at,
    measure,
    moments,
    started,
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """What is to be replaced, and what takes some 0.3 s to export."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, sizes in {"old": {"k": 2, "d": 64}, "new": {"k": 4, "d": 400}}.items():
        source = make(**sizes, head=False, layers=24).write(folder / f"{name}_checkpoint")
        convert_checkpoint(str(source), folder / name)
    return {name: str(folder / name) for name in ("old", "new")}


@pytest.fixture(scope="module")
def contents(adapters, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of each when nobody interferes."""
    folder = tmp_path_factory.mktemp("whole")
    for name, adapter in adapters.items():
        export_adapter(adapter, folder / name)
    return {name: content(folder / name) for name in adapters}


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def prepared(folder: Path, adapters: dict[str, str]) -> Path:
    """A place with an exported adapter that is to be replaced."""
    folder.mkdir()
    export_adapter(adapters["old"], folder / "dst")
    return folder / "dst"


def check(path: Path, adapters, contents) -> str:
    """Says what is there, byte for byte; the next run succeeds and leaves nothing else."""
    found = "absent"
    if path.exists():
        (found,) = [name for name, files in contents.items() if content(path) == files]
    export_adapter(adapters["new"], path, force=True)
    assert content(path) == contents["new"]
    assert [p.name for p in path.parent.iterdir()] == ["dst"]
    return found


def test_killed_at_a_random_moment_the_folder_is_absent_or_whole(tmp_path, adapters, contents):
    delays = [*moments(*measure(EXPORT, tmp_path / "measure", adapters["new"]))]
    replaces = [i % 2 == 1 for i in range(len(delays))]
    paths = [tmp_path / str(i) / "dst" for i in range(len(delays))]
    for path, replace in zip(paths, replaces, strict=True):
        if replace:
            prepared(path.parent, adapters)
        else:
            path.parent.mkdir()
    killed, found = 0, set()
    children = started(EXPORT, adapters["new"], paths, [0] * len(paths))
    for path, replace, delay, child in zip(paths, replaces, delays, children, strict=True):
        killed += kill_at(child, delay)
        found.add((replace, check(path, adapters, contents)))
    assert killed >= 8  # and 16 below; the others had ended
    assert {(False, "absent"), (True, "old")} <= found
    assert (False, "old") not in found


def test_killed_at_any_step_of_a_replacement_the_folder_is_absent_or_whole(
    tmp_path, adapters, contents
):
    steps = count_steps(EXPORT, adapters["new"], prepared(tmp_path / "count", adapters))
    # The last: the files, the two renames, the removal of the old folder.
    chosen = [*range(steps, max(0, steps - 16), -1)]
    paths = [prepared(tmp_path / str(step), adapters) for step in chosen]
    found = []
    for path, child in zip(paths, started(EXPORT, adapters["new"], paths, chosen), strict=True):
        go(child)
        finish(child)
        assert child.returncode == -9
        found.append(check(path, adapters, contents))
    assert set(found) == {"old", "absent", "new"}
    assert found == sorted(found, key=["new", "absent", "old"].index)
