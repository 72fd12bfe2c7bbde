"""A killed and resumed run: every weight, the optimizer and the log equal an unbroken run's.

It is killed at the steps of a save, by an audit hook, and then at random moments. It has dropout,
accumulation, a warm-up and a curriculum.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.train.checkpoint import read_state
from tests.conftest import UPSTREAM

pytestmark = pytest.mark.slow

# Trains, and kills itself at the n-th event of a kind on the disk in the run's folder.
CHILD = """
import os, signal, sys
from kmerge_mlx.cli import main
from kmerge_mlx.train import dataset

folder, kind, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
dataset.HELD_OUT_TREES = 20

def count(event, arguments):
    global left
    if event == kind and folder in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
sys.argv = ["kmerge-mlx", *sys.argv[4:]]
main()
"""
ITERS, RANDOM_KILLS = 30, 4
OPTIONS = (
    *("--model", UPSTREAM / "base", "--task", "textualized-tree", "--k", 4),
    *("--curriculum", "small,xsmall", "--stage-threshold", 0, "--last-threshold", 1),
    *("--num-trees", 300, "--batch-size", 4, "--iters", ITERS, "--val-batches", 2),
    *("--grad-accumulation-steps", 3, "--save-every", 5, "--steps-per-eval", 8),
    *("--steps-per-report", 3, "--seed", 3, "--encoder-context", 1, "--encoder-warmup", 10),
    *("--encoder-warmup-loss", "reconstruction", "--learning-rate", 1e-3),
)
STEPS = [
    ("os.rename", 1),  # the first save is written, and not yet there
    ("open", 30),  # the second is being written
    ("os.rename", 1),  # it is written, and the first is there
    ("os.rename", 2),  # between its two renames
    ("shutil.rmtree", 3),  # the first was given back, a second is there, the old one as well
]


def start(path: Path, kind: str = "", number: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, path.parent, kind, number, "train"]
    command += [*OPTIONS, "--adapter-path", path, "--resume"]
    # Bit for bit takes one thread: sums in another order are other sums.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    with process:
        _, errors = process.communicate(timeout=120)
    return process.returncode, errors


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


def logged(path: Path) -> int:
    """The last iteration that the log of a run, whole or being replaced, tells of."""
    try:
        lines = (path / "training" / "log.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return json.loads(lines[-1])["iteration"] if lines else 0


def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    path, unbroken, draw = tmp_path / "run", tmp_path / "unbroken" / "run", random.Random(5)
    unbroken.parent.mkdir()
    whole = start(unbroken)
    for kind, number in STEPS:
        code, errors = finish(start(path, kind, number))
        assert code == -9, errors
    for _ in range(RANDOM_KILLS):
        # On the way to some iteration, and then at a moment of its own.
        child, goal = start(path), min(logged(path) + draw.choice([1, 3, 6]), ITERS - 3)
        while logged(path) < goal and child.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        child.kill()
        code, errors = finish(child)
        assert code in (0, -9), errors
        assert load_adapter(path).merge.merge_factor == 4
        read_state(path)
    for child in (start(path), whole):
        code, errors = finish(child)
        assert code == 0, errors
    assert content(path) == content(unbroken)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "unbroken"}
