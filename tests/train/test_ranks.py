"""Ranks as real processes over MLX's ring on this machine, and a run of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.errors import TrainError
from kmerge_mlx.train.ranks import connect
from tests.rank_processes import CHILD, finish, start_ranks

pytestmark = pytest.mark.slow


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
        assert ends[rank][2].startswith(f"error: rank {rank} lost another rank ([ring]")


def test_mlx_launch_runs_ranks_and_one_rank_is_a_run_of_one_process():
    program = Path(sysconfig.get_path("scripts")) / "mlx.launch"
    if not program.exists():
        program = Path(os.path.realpath(mx.__file__)).parents[4] / "bin" / "mlx.launch"
    code = CHILD.replace("{before}", "pass")
    for count, said in ((2, ["[0, 2, 3]", "[1, 2, 3]"]), (1, ["[0, 1, 1]"])):
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = min(s.getsockname()[1], 65000)
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
