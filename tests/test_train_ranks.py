"""Ranks are real processes over MLX's ring on this machine; what ends one ends all, within 30 s."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.errors import KMergeError
from kmerge_mlx.train import ranks as ranks_module
from kmerge_mlx.train import watch
from kmerge_mlx.train.ranks import connect

LIMIT = 30.0
GONE = "rank 1 is gone: its process was killed, or its machine or the network went down"

# Joins, does what the first argument says, and ends as the command line does.
CHILD = """
import json, os, signal, sys, time
import mlx.core as mx
from kmerge_mlx.errors import DataError, KMergeError
from kmerge_mlx.train import ranks as ranks_module, watch
from kmerge_mlx.train.ranks import connect

def end_when_told():
    print("ready", flush=True)
    sys.stdin.readline()

def say(value):
    print(json.dumps(value), flush=True)

def run(body):
    with connect(lambda line: print("last resort:", line, file=sys.stderr, flush=True)) as ranks:
        exec(body, globals() | {"ranks": ranks, "rank": ranks.rank})

try:
    run(sys.argv[1])
except KMergeError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
"""


# Real times would make the tests long.
SHORT = "watch.SILENCE_SECONDS, watch.BEAT_SECONDS, watch.GRACE_SECONDS = 2.0, 0.2, 1.0\n"


class Run:
    """Processes of one run, their output, and how they ended.

    Args:
        size: How many ranks.
        body: What each does with ``ranks`` and ``rank``.
        folder: For the host file.
        before: Runs before the ranks join.
    """

    def __init__(self, size: int, body: str, folder: Path, before: str = ""):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
        hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
        for s in sockets:
            s.close()
        file = folder / f"hosts{time.monotonic_ns()}.json"
        file.write_text(json.dumps(hosts))
        code = CHILD.replace("def run(body)", before + "\ndef run(body)")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, body],
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def wait_until_ready(self) -> None:
        for process in self.processes:
            while process.stdout.readline() not in ("ready\n", ""):
                pass

    def end(self, but: int | None = None) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, outputs and errors, without what MLX itself says."""
        left = [process for rank, process in enumerate(self.processes) if rank != but]
        try:
            with ThreadPoolExecutor(len(left)) as pool:
                texts = list(pool.map(lambda p: p.communicate(timeout=LIMIT), left))
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()
        errors = [
            "".join(line for line in err.splitlines(keepends=True) if not line.startswith("[ring]"))
            for _, err in texts
        ]
        return [process.returncode for process in left], [out for out, _ in texts], errors


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """What three ranks told each other in a run that ends well."""
    body = """
mx.random.seed(rank)
tree = {"w": mx.random.normal((300, 70)), "b": [mx.array(True), mx.arange(5) * rank]}
tree["half"] = mx.random.normal((3, 1000)).astype(mx.bfloat16)
sums = ranks.sum(tree)
secret = [1.5, -0.0, float("nan")] if rank == 0 else [0.0, 0.0, 0.0]
say({
    "mine": tree["w"].tolist(),
    "sum": sums["w"].tolist(),
    "half": sums["half"].view(mx.uint16).tolist(),
    "count": sums["b"][0].item(),
    "range": sums["b"][1].tolist(),
    "shared": ranks.share(mx.array(secret)).view(mx.uint32).tolist(),
    "text": ranks.share_text("a text that not all can read: é" if rank == 0 else "mine"),
    "gathered": ranks.gather({"rank": rank, "text": "x" * rank}),
    "any": [ranks.any(rank == 1), ranks.any(False)],
})
ranks.same({"k": 4, "data": "abc"}, "the settings")
"""
    folder = tmp_path_factory.mktemp("ranks")
    codes, outputs, errors = Run(
        3, body, folder, "ranks_module.PIECE_BYTES = 4096  # smaller than the arrays"
    ).end()
    assert codes == [0, 0, 0], errors
    return [json.loads(out) for out in outputs], errors


def test_sum_adds_up_over_ranks(spoken):
    said, _ = spoken
    expected = np.sum([np.array(one["mine"], np.float32) for one in said], axis=0)
    np.testing.assert_allclose(said[0]["sum"], expected, atol=1e-6)  # the order of adding
    assert said[0]["range"] == [0, 3, 6, 9, 12]


def test_every_rank_holds_the_same_bits_after_a_sum(spoken):
    first, *others = spoken[0]
    for other in others:
        assert (other["sum"], other["half"]) == (first["sum"], first["half"])


def test_share_gives_the_first_ranks_bits(spoken):
    expected = np.array([1.5, -0.0, np.nan], np.float32).view(np.uint32).tolist()
    assert [one["shared"] for one in spoken[0]] == [expected] * 3
    assert {one["text"] for one in spoken[0]} == {"a text that not all can read: é"}


def test_gather_returns_what_every_rank_says_by_rank(spoken):
    expected = [{"rank": rank, "text": "x" * rank} for rank in range(3)]
    assert [one["gathered"] for one in spoken[0]] == [expected] * 3


def test_any_is_true_everywhere_if_it_is_true_somewhere(spoken):
    assert [one["any"] for one in spoken[0]] == [[True, False]] * 3


def test_a_run_that_ends_well_says_nothing(spoken):
    assert spoken[1] == ["", "", ""]


def test_settings_that_differ_are_named_by_every_rank(tmp_path):
    body = 'ranks.same({"k": 4, "learning_rate": 1e-4 * (rank + 1)}, "the settings")'
    codes, _, errors = Run(2, body, tmp_path).end()
    assert codes == [1, 1]
    assert set(errors) == {
        "error: the settings of rank 1 are not those of rank 0: learning_rate is 0.0002 instead of "
        "0.0001; every machine needs the same\n"
    }


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_killed_while_the_others_wait_for_it_ends_them(tmp_path, size):
    run = Run(size, "end_when_told() if rank == 1 else say('ready') or ranks.barrier()", tmp_path)
    run.processes[1].stdout.readline()
    run.processes[1].kill()
    codes, _, errors = run.end(but=1)
    assert codes == [1] * (size - 1)
    assert set(errors) == {f"error: {GONE}\n"}


def test_a_rank_killed_while_the_others_compute_ends_them(tmp_path):
    body = """
print("ready", flush=True)
while True:
    mx.eval(mx.ones((300, 300)) @ mx.ones((300, 300)))
    ranks.check()
"""
    run = Run(3, body, tmp_path)
    run.wait_until_ready()
    run.processes[1].kill()
    codes, _, errors = run.end(but=1)
    assert codes == [1, 1]
    assert set(errors) == {f"error: {GONE}\n"}


def test_a_rank_that_hangs_in_mlx_is_ended_from_outside(tmp_path):
    """Of several operations evaluated at once MLX 0.32.4 never returns when a rank is dead."""
    body = """
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
mx.eval([mx.distributed.all_sum(mx.ones(1000 * (i + 1))) for i in range(40)])
"""
    codes, _, errors = Run(2, body, tmp_path, SHORT).end(but=1)
    assert codes == [1]
    assert errors == [f"last resort: {GONE}\n"]


def test_a_rank_that_fails_tells_all_the_others_why(tmp_path):
    """Of four ranks one is no neighbour of the one that fails."""
    body = """
if rank == 1:
    raise DataError("valid.jsonl line 3: completion is empty")
ranks.barrier()
"""
    codes, _, errors = Run(4, body, tmp_path).end()
    assert codes == [1, 1, 1, 1]
    reason = "valid.jsonl line 3: completion is empty"
    assert errors.pop(1) == f"error: {reason}\n"
    assert set(errors) == {f"error: rank 1 failed: {reason}\n"}


def test_a_bug_in_one_rank_ends_the_others_by_name(tmp_path):
    codes, _, errors = Run(2, "1 / 0 if rank else ranks.barrier()", tmp_path).end()
    assert codes == [1, 1]
    assert errors[0] == "error: rank 1 failed: ZeroDivisionError: division by zero\n"
    assert errors[1].endswith("ZeroDivisionError: division by zero\n")


def test_a_rank_that_is_stopped_counts_as_gone(tmp_path):
    run = Run(2, "print('ready', flush=True)\ntime.sleep(60)", tmp_path, SHORT)
    run.wait_until_ready()
    run.processes[1].send_signal(signal.SIGSTOP)
    codes, _, errors = run.end(but=1)
    assert codes == [1]
    assert errors[0].startswith("last resort: rank 1 has been silent for 2 s: its machine sleeps")


def test_long_computing_is_not_silence(tmp_path):
    body = """
if rank == 1:
    begin, x = time.monotonic(), mx.ones((200, 200))
    while time.monotonic() - begin < 4:
        mx.eval(x @ x @ x)
ranks.barrier()
"""
    codes, _, errors = Run(2, body, tmp_path, SHORT).end()
    assert (codes, errors) == ([0, 0], ["", ""])


def test_ranks_that_wait_for_each_other_for_ever_are_ended(tmp_path):
    """As in MLX's issue 4475: everyone is in the same operation, and nothing moves."""
    body = """
if rank == 1:
    mx.distributed.all_sum = lambda *_, **__: time.sleep(60)
    ranks._run = lambda _: None
    with ranks._watch.operation():
        time.sleep(60)
ranks.barrier()
"""
    codes, _, errors = Run(2, body, tmp_path, SHORT + "watch.STUCK_SECONDS = 2.0").end()
    assert codes == [1, 1]
    assert all("every rank has waited 2 s for the others" in error for error in errors)


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


def test_the_constants_keep_the_promise_of_30_seconds():
    assert watch.SILENCE_SECONDS + watch.GRACE_SECONDS + watch.BEAT_SECONDS < LIMIT
    assert ranks_module.START_SECONDS > watch.MEET_SECONDS
