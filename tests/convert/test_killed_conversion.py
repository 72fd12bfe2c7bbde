"""Conversions that are killed: the destination is absent or whole, and the next run cleans up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.checkpoints import make
from tests.killed_writers import (
    CONVERT,
    count_steps,
    finish,
    go,
    kill_at,
    measure,
    moments,
    started,
)


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


@pytest.mark.parametrize("replace", [False, True], ids=["new", "force"])
def test_killed_at_a_random_moment_the_destination_is_absent_or_whole(
    tmp_path, sources, contents, replace
):
    writes, ends = measure(CONVERT, tmp_path / "measure", sources[4])
    delays = [*moments(writes, ends)]
    paths = [prepared(tmp_path / str(i), replace, sources) for i in range(len(delays))]
    killed, found = 0, []
    children = started(CONVERT, sources[4], paths, [0] * len(paths))
    for path, delay, child in zip(paths, delays, children, strict=True):
        killed += kill_at(child, delay)
        found.append(check(path, replace, sources, contents))
    assert killed >= 10  # of each kind; the others had ended
    assert ("old" if replace else "absent") in found


def test_killed_at_any_step_of_a_replacement_the_destination_is_absent_or_whole(
    tmp_path, sources, contents
):
    steps = count_steps(CONVERT, sources[4], prepared(tmp_path / "count", True, sources))
    # The last: the four files, the two renames, the removal of the old folder.
    chosen = [*range(steps, max(0, steps - 18), -1)]
    paths = [prepared(tmp_path / str(step), True, sources) for step in chosen]
    found = []
    for path, child in zip(paths, started(CONVERT, sources[4], paths, chosen), strict=True):
        go(child)
        finish(child)
        assert child.returncode == -9
        found.append(check(path, True, sources, contents))
    assert set(found) == {"old", "absent", "new"}
    assert found == sorted(found, key=["new", "absent", "old"].index)
