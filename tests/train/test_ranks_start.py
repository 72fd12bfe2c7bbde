"""How ranks come together: mlx.launch, host files, ports, strangers; and a run of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from kmerge_mlx.errors import KMergeError
from kmerge_mlx.train import watch
from kmerge_mlx.train.ranks import connect
from tests.rank_processes import CHILD, LIMIT, Run


def launch(count: int, body: str) -> subprocess.CompletedProcess:
    """Under ``mlx.launch``, whose ports a run before may still hold for a moment."""
    program = Path(sysconfig.get_path("scripts")) / "mlx.launch"
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = min(s.getsockname()[1], 65000)
    options = ["-n", str(count), "--backend", "ring", "--starting-port", str(port)]
    command = [sys.executable, str(program), *options, "--", sys.executable, "-c", CHILD, body]
    read, write = os.pipe()  # it reads its stdin for ever when that is at its end
    try:
        return subprocess.run(
            command, stdin=read, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    finally:
        os.close(read)
        os.close(write)


def test_mlx_launch_runs_ranks():
    done = launch(2, "say([rank, ranks.size, ranks.sum(mx.array(rank + 1)).item()])")
    assert sorted(done.stdout.splitlines()) == ["[0, 2, 3]", "[1, 2, 3]"]
    assert (done.returncode, done.stderr) == (0, "")


def test_mlx_launch_shows_the_error_of_a_rank_and_exits_0_all_the_same():
    """Its exit code is its own: docs/distributed.md says to look at what it writes."""
    done = launch(2, "1 / 0 if rank else ranks.barrier()")
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "Node with rank 1 exited with code 1" in done.stderr
    assert done.returncode == 0


def test_mlx_launch_of_one_rank_is_a_run_of_one_process():
    done = launch(1, "say([rank, ranks.size])")
    assert (done.stdout, done.stderr) == ("[0, 1]\n", "")


def test_one_process_needs_neither_threads_nor_mlxs_group():
    threads = threading.active_count()
    with connect(pytest.fail) as alone:
        tree = {"a": mx.ones(3)}
        assert alone.sum(tree) is tree
        assert alone.share(tree["a"]) is tree["a"]
        assert (alone.rank, alone.size, alone.group) == (0, 1, None)
        assert (alone.share_text("x"), alone.gather(1), alone.any(True)) == ("x", [1], True)
        alone.same({"k": 4}, "the settings")
        alone.barrier()
        alone.check()
        assert threading.active_count() == threads


TWO = '[["127.0.0.1:5000"], ["127.0.0.1:5001"]]'


@pytest.mark.parametrize(
    ("rank", "hosts", "expected"),
    [
        ("2", TWO, "MLX_RANK must be 0 to 1"),
        ("-1", TWO, "MLX_RANK must be 0 to 1"),
        ("x", TWO, "and is 'x'"),
        (None, TWO, "and is ''"),
        ("0", "[]", "must list two ranks or more"),
        ("0", '[["127.0.0.1:5000"]]', "must list two ranks or more"),
        ("0", '[["127.0.0.1"], ["127.0.0.1"]]', 'each as ["IP:PORT"]'),
        ("0", '[{"ssh": "a", "ips": ["127.0.0.1"]}]', "give it to --hostfile"),
        ("0", '{"hosts": []}', "give it to --hostfile"),
        ("0", '[["127.0.0.1:5', "is not valid JSON"),
        ("1", None, "MLX_RANK=1 is set and MLX found no other rank"),
    ],
)
def test_a_wrong_environment_is_an_error_and_no_run_of_one(
    tmp_path, monkeypatch, rank, hosts, expected
):
    """MLX itself crashes, waits for ever or trains alone over most of these."""
    monkeypatch.delenv("MLX_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("MLX_RANK", rank)
    if hosts is not None:
        (tmp_path / "hosts.json").write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    with pytest.raises(KMergeError) as caught:
        connect(pytest.fail)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_taken_port_and_a_rank_that_never_comes_are_errors(tmp_path):
    run = Run(2, "", tmp_path, "ranks_module.START_SECONDS = 2")
    run.processes[1].kill()
    codes, _, errors = run.end(but=1)
    assert codes == [1]
    assert errors[0].startswith(
        "error: rank 0 waited 2 s for the others, which must all be started"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        hosts = [[f"127.0.0.1:{taken.getsockname()[1]}"], ["127.0.0.1:1"]]
        (tmp_path / "hosts.json").write_text(json.dumps(hosts))
        variables = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, ""],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: rank 0 cannot join the others: [ring]")
    assert "Address already in use" in done.stderr


def test_a_stranger_without_the_token_is_turned_away(monkeypatch):
    """Two ranks meet in threads; a stranger connects to the first one before the second does."""
    said: dict[int, object] = {}
    turn = threading.Barrier(2)
    strangers = []

    def gather_of(rank):
        def gather(value):
            said[rank] = value
            turn.wait(10)
            values = [said[0], said[1]]
            if rank == 1 and isinstance(value, dict):
                stranger = socket.create_connection(("127.0.0.1", values[0]["port"]))
                stranger.sendall(b"1 0123456789abcdef\n" + b"x" * 1000)
                strangers.append(stranger)
            turn.wait(10)
            return values

        return gather

    met = {}

    def meet(rank):
        met[rank] = watch.meet(rank, 2, ["127.0.0.1"], gather_of(rank))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    (stranger,) = strangers
    with stranger:
        stranger.settimeout(5)
        assert not answer_to(stranger)
    links = [link for rank in (0, 1) for link in met[rank]]
    assert [link.peer for link in links] == [1, 1, 0, 0]
    for link in links:
        link.connection.close()


def answer_to(connection: socket.socket) -> bytes:
    try:
        return connection.recv(100)
    except ConnectionError:
        return b""


def test_other_backends_meet_at_the_address_that_faces_their_coordinator(monkeypatch):
    monkeypatch.setenv("NCCL_HOST_IP", "127.0.0.1")
    assert watch.own_addresses(None, 1)[0] == "127.0.0.1"
    ring = [["10.0.0.1:5000"], ["10.0.1.2:5000", "10.0.2.2:5001"]]
    assert watch.own_addresses(ring, 1) == ["10.0.1.2", "10.0.2.2"]


def test_a_message_without_end_closes_the_connection():
    ours, theirs = socket.socketpair()
    link = watch.Link(1, ours)
    theirs.sendall(b'{"done": true}\n')
    assert link.receive() == [{"done": True}]
    theirs.sendall(b"[" * watch.MAX_LINE)
    assert link.receive() in ([], None)
    theirs.sendall(b"[" * watch.MAX_LINE + b"\n")
    assert link.receive() is None
    ours.close()
    theirs.close()
