"""Several machines, here processes over MLX's ring: the same training, and one end for all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from kmerge_mlx.errors import TrainError
from kmerge_mlx.train.prepare import prepare
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.settings import TrainSettings
from tests.rank_processes import finish, start
from tests.train_runs import BASE, NO_DROPOUT, kmerge, rows_of, tensors_of, write_data

pytestmark = pytest.mark.slow

OPTIONS = (
    *("--model", BASE, "--k", 4, "--batch-size", 8, "--val-batches", 3, "--steps-per-report", 10),
    # By SGD: Adam divides by a gradient's size, and where that is rounding, by rounding.
    *("--optimizer", "sgd", "--learning-rate", 0.1),
)


@pytest.fixture
def more(tmp_path) -> list[object]:
    """The other options of a run: its data, and no dropout, which draws a mask for each batch."""
    (tmp_path / "config.yaml").write_text(NO_DROPOUT)
    data = write_data(tmp_path / "data", rows_of(200), rows_of(24, 200))
    return ["-c", tmp_path / "config.yaml", "--data", data, *OPTIONS]


def train_alone(path: Path, *options: object) -> None:
    result = kmerge("train", "--adapter-path", path, *options)
    assert result.code == 0, result.err


def train(path: Path, *options: object) -> list[subprocess.Popen]:
    """The two processes of a run; rank 1 has a folder of its own to write to, in vain."""
    command = [sys.executable, "-m", "kmerge_mlx", "train", *options, "--adapter-path"]
    return start([[*command, path], [*command, path.with_name("rank1")]], path.parent)


def assert_near(one: Path, two: Path) -> None:
    ours, theirs = tensors_of(two), tensors_of(one)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert mx.abs(array - ours[name]).max().item() < 1e-5, name


def test_two_ranks_with_half_the_rows_each_train_as_one_does(tmp_path, more):
    more += ["--iters", 16, "--steps-per-eval", 8, "--save-every", 16]
    one, two = tmp_path / "one", tmp_path / "two"
    pair = train(two, *more)
    train_alone(one, *more)
    for code, _, errors in finish(pair):
        assert code == 0, errors
    assert_near(one, two)
    logs = [
        [json.loads(line) for line in (path / "training" / "log.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    for single, double in zip(*logs, strict=True):
        for name, value in single.items():
            near = value if name == "stage" else pytest.approx(value, rel=1e-4, abs=1e-5)
            assert double[name] == near, name
    assert not (tmp_path / "rank1").exists()


def test_a_killed_run_of_two_ranks_is_resumed_by_the_first_ones_folder(tmp_path, more):
    one, two = tmp_path / "one", tmp_path / "two"
    more += ["--steps-per-eval", 10, "--save-every", 5, "--grad-accumulation-steps", 2]
    more += ["--learning-rate", 0.01]  # near to one process, whenever it is killed
    pair = train(two, *more, "--iters", 100_000)
    while saved_iteration(two) < 5 and pair[0].poll() is None:
        time.sleep(0.01)
    pair[1].kill()
    code, _, errors = finish(pair)[0]
    assert code == 1
    assert "error: rank 0 lost another rank (" in errors
    assert "Traceback" not in errors
    iters = saved_iteration(two) + 3
    pair = train(two, "--resume", "--iters", iters)
    train_alone(one, *more, "--iters", iters)
    ends = finish(pair)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "Resuming at iteration" in ends[0][2]
    assert_near(one, two)


def test_ranks_with_other_settings_or_a_batch_that_they_cannot_share_do_not_begin(tmp_path):
    """As the other rank tells it: it has another seed, base and data."""
    ranks = Ranks()
    ranks.size, ranks.gather = 2, lambda mine: [mine, dict.fromkeys(mine, "other")]
    data = str(write_data(tmp_path / "data", rows_of(8)))
    settings = {"model": str(BASE), "data": data, "adapter_path": f"{tmp_path}/run"}
    with pytest.raises(TrainError, match="settings of rank 1 are not those of rank 0") as caught:
        prepare(TrainSettings.of(settings), ranks=ranks)
    for name in ("seed", "model", "data"):
        assert f"`{name}` is 'other' instead of " in str(caught.value)
    with pytest.raises(TrainError, match="`batch_size` 3 is not divisible by 2 machines"):
        prepare(TrainSettings.of(settings | {"batch_size": 3}), ranks=ranks)
    assert not list(tmp_path.glob("run*"))


def saved_iteration(path: Path) -> int:
    try:
        return json.loads((path / "training" / "state.json").read_text())["state"]["iteration"]
    except OSError:  # the folder is being replaced
        return 0
