"""Several machines, here processes over MLX's ring: the same training, and one end for all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.errors import TrainError
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.settings import TrainSettings
from kmerge_mlx.train.prepare import prepare
from tests.conftest import UPSTREAM

OPTIONS = (
    *("--model", UPSTREAM / "base", "--task", "textualized-tree", "--stage", "small", "--k", 4),
    *("--num-trees", 500, "--batch-size", 8, "--val-batches", 3, "--steps-per-report", 10),
)


def start(
    path: Path, folder: Path, ranks: int, *options: object, each: Sequence[tuple] = ((), ())
) -> list[subprocess.Popen]:
    """The processes of a run; rank 1 has a folder of its own to write to, in vain.

    Args:
        path: The folder of rank 0.
        folder: For the host file.
        ranks: How many.
        options: Of all of them.
        each: Further options of each.
    """
    ports = []
    for _ in range(ranks):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    hosts = folder / f"hosts{ports[0]}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    # Dropout draws other masks for other batches: without it, both ways compute the same.
    config = folder / "config.yaml"
    config.write_text("lora_parameters: {dropout: 0.0}\n")
    processes = []
    for rank in range(ranks):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        where = path if rank == 0 else path.with_name(f"{path.name}-rank{rank}")
        command = [sys.executable, "-m", "kmerge_mlx", "train", "-c", config, *OPTIONS, *options]
        command += each[rank]
        processes.append(
            subprocess.Popen(
                [*map(str, command), "--adapter-path", str(where)],
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str]]:
    ends = []
    for process in processes:
        with process:
            _, errors = process.communicate(timeout=timeout)
            ends.append((process.returncode, errors))
    return ends


def weights(path: Path) -> dict[str, mx.array]:
    adapter = load_adapter(path)
    named = adapter.encoder_weights | adapter.tuning_weights
    return named | {f"head.{name}": array for name, array in adapter.head_weights.items()}


def test_two_ranks_with_half_the_rows_each_train_as_one_does(tmp_path):
    """By SGD: Adam divides by a gradient's size, and where that is rounding, by rounding."""
    more = ("--iters", 50, "--steps-per-eval", 25, "--save-every", 50)
    more = (*more, "--optimizer", "sgd", "--learning-rate", 0.1)
    one, two = tmp_path / "one", tmp_path / "two"
    alone, pair = start(one, tmp_path, 1, *more), start(two, tmp_path, 2, *more)
    for code, errors in finish(alone + pair):
        assert code == 0, errors
    ours, theirs = weights(two), weights(one)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert mx.abs(array - ours[name]).max().item() < 1e-5, name
    logs = [
        [json.loads(line) for line in (path / "training" / "log.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    losses = [record["val_loss"] for record in logs[0] if "val_loss" in record]
    assert losses[-1] < losses[0] - 0.5
    for single, double in zip(*logs, strict=True):
        for name, value in single.items():
            near = value if name == "stage" else pytest.approx(value, rel=1e-4, abs=1e-5)
            assert double[name] == near, name
    assert not (tmp_path / "two-rank1").exists()


def test_a_killed_run_of_two_ranks_is_resumed_by_the_first_ones_folder(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    shared = (
        "--optimizer",
        "sgd",
        "--steps-per-eval",
        10,
        "--save-every",
        5,
        "--grad-accumulation-steps",
        2,
    )
    assert finish(start(one, tmp_path, 2, *shared, "--iters", 12))[0][0] == 0
    pair = start(two, tmp_path, 2, *shared, "--iters", 12)
    wait_for(two, 5, pair)
    pair[1].kill()
    begun = time.monotonic()
    (code, errors), _ = finish(pair, 30)
    assert time.monotonic() - begun < 30
    assert code == 1
    assert "rank 1" in errors
    assert "Traceback" not in errors
    ends = finish(start(two, tmp_path, 2, "--resume"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert "Resuming at iteration" in ends[0][1]
    ours, theirs = weights(two), weights(one)
    for name, array in theirs.items():
        assert mx.abs(array - ours[name]).max().item() < 1e-6, name


def test_ranks_with_other_settings_do_not_begin(tmp_path):
    seeds = [("--seed", rank) for rank in range(2)]
    for code, errors in finish(start(tmp_path / "run", tmp_path, 2, "--iters", 5, each=seeds)):
        assert code == 1
        assert "--seed is 1 instead of 0" in errors
    assert not list(tmp_path.glob("run*"))


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    ranks = Ranks()
    ranks.size = 2
    settings = {"model": str(UPSTREAM / "base"), "batch_size": 3, "adapter_path": f"{tmp_path}/run"}
    with pytest.raises(TrainError, match="--batch-size 3 is not divisible by 2 machines"):
        prepare(TrainSettings.of(settings), ranks=ranks)


def wait_for(path: Path, iteration: int, processes: list[subprocess.Popen]) -> None:
    """Until a run's log or saves tell of an iteration."""
    state = path / "training" / "state.json"
    while True:
        assert all(process.poll() is None for process in processes)
        try:
            done = json.loads(state.read_text())["state"]["iteration"]
        except (OSError, ValueError):
            done = 0
        if done >= iteration:
            return
        time.sleep(0.01)
