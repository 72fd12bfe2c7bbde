"""A run killed 20 times and resumed: weights, optimizer and log equal an unbroken run's.

It kills itself at its n-th step on the disk (tests/kills.py): at every step of a save, when the
folder of the save before is there and when it is not. It has dropout, accumulation, a warm-up and
a curriculum.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.train.checkpoint import read_state
from tests.conftest import UPSTREAM
from tests.kills import Writer

pytestmark = pytest.mark.slow

KILLS, SAVES = 20, 12
OPTIONS = (
    *("--model", UPSTREAM / "base", "--task", "textualized-tree", "--k", 4, "--resume"),
    *("--curriculum", "small,xsmall", "--stage-threshold", 0, "--last-threshold", 1),
    *("--num-trees", 300, "--batch-size", 4, "--iters", 5 * SAVES, "--val-batches", 2),
    *("--grad-accumulation-steps", 3, "--save-every", 5, "--steps-per-eval", 8),
    *("--steps-per-report", 3, "--seed", 3, "--encoder-context", 1, "--encoder-warmup", 10),
    *("--encoder-warmup-loss", "reconstruction", "--learning-rate", 1e-3),
)


def content(path: Path) -> dict[str, object]:
    """Everything a run leaves, but for how fast it was."""
    found: dict[str, object] = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = str(file.relative_to(path))
        if name == "training/state.json":
            state = json.loads(file.read_text())
            del state["state"]["log"]["timing.jsonl"]
            found[name] = state
        elif name != "training/timing.jsonl":
            found[name] = file.read_bytes()
    return found


def test_a_run_that_is_killed_20_times_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    path, unbroken = tmp_path / "killed" / "run", tmp_path / "unbroken" / "run"
    options, wholes = [str(option) for option in OPTIONS], 0
    for place in (path, unbroken):
        place.parent.mkdir()
    with Writer() as write:
        code, steps = write("train", options, unbroken)
        assert code == 0
        for i in range(KILLS):
            # Through a run's first save, before which there may be no folder, and its second.
            step = 1 + i * 2 * steps // (SAVES * KILLS)
            assert write("train", options, path, step)[0] == -9
            if path.exists():
                assert load_adapter(path).merge.merge_factor == 4
                read_state(path)
                wholes += 1
        assert KILLS // 2 <= wholes < KILLS
        assert write("train", options, path)[0] == 0
    assert content(path) == content(unbroken)
    assert [place.name for place in path.parent.iterdir()] == ["run"]
