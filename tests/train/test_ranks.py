"""Ranks as processes over MLX's ring on this machine: the same training, and one end for all."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.errors import TrainError
from kmerge_mlx.train.prepare import prepare
from kmerge_mlx.train.ranks import Ranks, connect
from kmerge_mlx.train.settings import TrainSettings
from tests.train_runs import BASE, NO_DROPOUT, kmerge, rows_of, tensors_of, write_data

pytestmark = pytest.mark.slow


# Joins, runs its first argument, and ends as the command line does.
CHILD = """
import json, os, signal, sys, time
import mlx.core as mx
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.train import ranks as ranks_module
from kmerge_mlx.train.ranks import connect

def say(value):
    print(json.dumps(value), flush=True)

try:
    {before}
    ranks = connect()
    rank = ranks.rank
    exec(sys.argv[1])
except KMergeError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
"""


def free_ports() -> int:
    """The first of eight free ports, below those that systems give to connections."""
    while True:
        first = random.randrange(20_000, 30_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + 8):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def start(
    commands: Sequence[Sequence[object]], folder: Path, **more: str
) -> list[subprocess.Popen]:
    """Starts one process a rank, each with its own command."""
    first = free_ports()
    hosts = [[f"127.0.0.1:{first + rank}"] for rank in range(len(commands))]
    file = folder / f"hosts{time.monotonic_ns()}.json"
    file.write_text(json.dumps(hosts))
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | more
    return [
        subprocess.Popen(
            [*map(str, command)],
            env=environment
            | ({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)} if len(commands) > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def start_ranks(size: int, body: str, folder: Path, before: str = "pass") -> list[subprocess.Popen]:
    """Starts ranks that run Python code with ``ranks`` and ``rank``; ``before`` they join."""
    code = CHILD.replace("{before}", before)
    return start([[sys.executable, "-c", code, body]] * size, folder)


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, without the lines that MLX's ring writes."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        # The ring's thread ends its lines with a second write: ours can come between the two.
        (process.returncode, out, re.sub(r"(?m)^\[ring\].*?(?=error: |$)\n?", "", err))
        for process, (out, err) in zip(processes, texts, strict=True)
    ]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """What three ranks say after each operation."""
    body = """
mx.random.seed(rank)
tree = {"w": mx.random.normal((300, 70)), "b": [mx.array(True), mx.arange(5) * rank]}
tree["half"] = mx.random.normal((3, 1000)).astype(mx.bfloat16)
tree["none"] = mx.zeros((0, 3))
sums = ranks.sum(tree)
names = ["layers.0.a", "layers.0.b"][:: 1 - 2 * (rank % 2)]
named = ranks.sum({name: mx.array(float(name[-1] == "a")) for name in names})
secret = [1.5, -0.0, float("nan")] if rank == 0 else [0.0, 0.0, 0.0]
ranks.same({"k": 4, "data": "abc"}, "the settings")
try: ranks.same({"k": rank}, "the settings")
except KMergeError as error: refused = str(error)
say({
    "refused": refused,
    "mine": tree["w"].tolist(),
    "sum": sums["w"].tolist(),
    "half": sums["half"].view(mx.uint16).tolist(),
    "range": sums["b"][1].tolist(),
    "none": sums["none"].shape,
    "named": {name: array.item() for name, array in named.items()},
    "shared": ranks.share(mx.array(secret)).view(mx.uint32).tolist(),
    "text": ranks.share_json("a text that not all can read: é" if rank == 0 else "mine"),
    "gathered": ranks.gather({"rank": rank, "text": "x" * rank}),
    "any": [ranks.any(rank == 1), ranks.any(False)],
})
"""
    small = "ranks_module.BUNDLE_BYTES = 4096  # smaller than the arrays"
    ends = finish(start_ranks(3, body, tmp_path_factory.mktemp("ranks"), small))
    assert [(code, err) for code, _, err in ends] == [(0, "")] * 3
    return [json.loads(out) for _, out, _ in ends]


def test_sum_adds_up_by_name_to_the_same_bits_on_every_rank(spoken):
    expected = np.sum([np.array(one["mine"], np.float32) for one in spoken], axis=0)
    np.testing.assert_allclose(spoken[0]["sum"], expected, atol=1e-6)  # the order of adding
    for one in spoken:
        assert (one["sum"], one["half"]) == (spoken[0]["sum"], spoken[0]["half"])
        assert (one["range"], one["none"]) == ([0, 3, 6, 9, 12], [0, 3])
        assert one["named"] == {"layers.0.a": 3.0, "layers.0.b": 0.0}


def test_values_are_shared_and_gathered_and_any_is_any(spoken):
    bits = np.array([1.5, -0.0, np.nan], np.float32).view(np.uint32).tolist()
    for one in spoken:
        assert one["shared"] == bits
        assert one["text"] == "a text that not all can read: é"
        assert one["gathered"] == [{"rank": rank, "text": "x" * rank} for rank in range(3)]
        assert one["any"] == [True, False]
        assert (
            one["refused"]
            == "the settings of rank 1 are not those of rank 0: `k` is 1 instead of 0"
        )


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "1 / 0"])
def test_a_rank_that_ends_ends_the_others_with_an_error(tmp_path, end):
    body = f"if rank == 1: {end}\nfor _ in range(9): ranks.sum(mx.ones(10_000))"
    ends = finish(start_ranks(3, body, tmp_path))
    for rank in (0, 2):
        assert ends[rank][0] == 1
        assert "Traceback" not in ends[rank][2]
        error = ends[rank][2].splitlines()[-1]  # a thread of MLX may have written before it
        assert error.startswith(f"error: rank {rank} lost another rank ([ring]")


def test_mlx_launch_runs_ranks_and_one_rank_is_a_run_of_one_process():
    program = Path(sysconfig.get_path("scripts")) / "mlx.launch"
    if not program.exists():
        program = Path(os.path.realpath(mx.__file__)).parents[4] / "bin" / "mlx.launch"
    code = CHILD.replace("{before}", "pass")
    for count, said in ((2, ["[0, 2, 3]", "[1, 2, 3]"]), (1, ["[0, 1, 1]"])):
        port = free_ports()
        command = [sys.executable, program, "-n", count, "--backend", "ring"]
        command += ["--starting-port", port, "--", sys.executable, "-c", code]
        command += ["say([rank, ranks.size, ranks.sum(mx.array(rank + 1)).item()])"]
        read, write = os.pipe()  # it reads its stdin for ever when that is at its end
        try:
            done = subprocess.run(
                [*map(str, command)], stdin=read, capture_output=True, text=True, check=True
            )
        finally:
            os.close(read)
            os.close(write)
        assert sorted(done.stdout.splitlines()) == said, done.stderr


def test_a_rank_that_never_comes_is_an_error(tmp_path):
    first, second = start_ranks(2, "", tmp_path, "ranks_module.START_SECONDS = 2")
    second.kill()
    code, _, err = finish([first, second])[0]
    assert code == 1
    assert err.startswith("error: rank 0 waited 2 s for the other ranks: start all of them")


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (None, "MLX_RANK=1 is set and MLX found no other rank"),
        ('[{"ssh": "a", "ips": ["127.0.0.1"]}]', "rank 1 cannot join the other ranks"),
        ('[["127.0.0.1:5', "rank 1 cannot join the other ranks"),
    ],
)
def test_a_wrong_environment_is_an_error_and_not_a_run_of_one(tmp_path, monkeypatch, hosts, said):
    monkeypatch.setenv("MLX_RANK", "1")
    if hosts is not None:
        (tmp_path / "hosts.json").write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    with pytest.raises(TrainError) as caught:
        connect()
    assert said in str(caught.value)


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
    ranks.size, ranks.gather = 2, lambda mine: [mine, dict.fromkeys(mine or (), "other")]
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
