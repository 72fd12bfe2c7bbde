"""Killed and resumed runs: every weight, the optimizer and the log equal an unbroken run's.

Eight kills at random moments in one run, and then kills at the steps of a save, by an audit hook
that kills the process at the n-th one. Every run has dropout, accumulation and a curriculum.
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

# Trains, once told to; at the n-th step on the disk in the run's folder it kills itself (0: never).
CHILD = """
import os, signal, sys
import kmerge_mlx.train.loop
from kmerge_mlx.cli import main

folder, at = sys.argv[1], int(sys.argv[2])
steps = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link"}
left = at

def count(event, arguments):
    global left
    if event in steps and folder in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

print("ready", flush=True)
sys.stdin.readline()
if at:
    sys.addaudithook(count)
sys.argv = ["kmerge-mlx", *sys.argv[3:]]
main()
"""
ITERS, KILLS = 24, 8
OPTIONS = (
    *("--model", UPSTREAM / "base", "--task", "textualized-tree", "--k", 4),
    *("--curriculum", "small,xsmall", "--stage-threshold", 0, "--last-threshold", 1),
    *("--num-trees", 300, "--batch-size", 4, "--iters", ITERS, "--val-batches", 2),
    *("--grad-accumulation-steps", 3, "--save-every", 5, "--steps-per-eval", 8),
    *("--steps-per-report", 3, "--seed", 3, "--encoder-context", 1, "--encoder-warmup", 10),
    *("--encoder-warmup-loss", "reconstruction", "--learning-rate", 1e-3),
)


class Child:
    """A training process that has imported everything and waits to be told to begin."""

    def __init__(self, path: Path, at: int = 0):
        command = [sys.executable, "-c", CHILD, str(path.parent), str(at), "train"]
        command += [*map(str, OPTIONS), "--adapter-path", str(path), "--resume"]
        # Bit for bit takes one thread: sums in another order are other sums.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip

    def go(self) -> None:
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> int:
        with self.process:
            _, self.errors = self.process.communicate(timeout=120)
        return self.process.returncode


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run that nobody interferes with."""
    path = tmp_path_factory.mktemp("unbroken") / "run"
    child = Child(path)
    child.go()
    assert child.finish() == 0, child.errors
    return path


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


def test_kills_at_random_moments_change_nothing(tmp_path, unbroken):
    path, draw, kills = tmp_path / "run", random.Random(5), 0
    waiting = Child(path)
    while True:
        child, waiting = waiting, Child(path)
        before, more = logged(path), draw.choice([1, 2, 3, 4])
        child.go()
        # On the way to some iteration, and then at a moment of its own.
        while kills < KILLS and child.process.poll() is None:
            if logged(path) >= min(before + more, ITERS - KILLS + kills):
                time.sleep(draw.uniform(0, 0.1))
                child.process.kill()
                break
            time.sleep(0.002)
        code = child.finish()
        assert code in (0, -9), child.errors
        if code == 0:
            break
        kills += 1
        if path.exists():
            assert load_adapter(path).merge.merge_factor == 4
            read_state(path)
    waiting.process.kill()
    waiting.finish()
    assert kills == KILLS
    assert content(path) == content(unbroken)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# Before the first save is there; while the second is written; between its two renames; before the
# old folder is removed.
@pytest.mark.parametrize("step", [12, 36, 40, 42])
def test_killed_at_a_step_of_a_save_the_run_goes_on_to_the_same_bits(tmp_path, unbroken, step):
    path = tmp_path / "run"
    for child, code in ((Child(path, step), -9), (Child(path), 0)):
        child.go()
        assert child.finish() == code, child.errors
    assert content(path) == content(unbroken)
