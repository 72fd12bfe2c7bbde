"""Ranks are real processes over MLX's ring on this machine; what ends one ends all, within 30 s."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from kmerge_mlx.train import watch
from tests.rank_processes import LIMIT, SHORT, Run

GONE = "rank 1 is gone: its process was killed, or its machine or the network went down"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """What three ranks told each other in a run that ends well."""
    body = """
mx.random.seed(rank)
tree = {"w": mx.random.normal((300, 70)), "b": [mx.array(True), mx.arange(5) * rank]}
tree["half"] = mx.random.normal((3, 1000)).astype(mx.bfloat16)
sums = ranks.sum(tree)
names = ["layers.0.a", "layers.0.b"][:: 1 - 2 * (rank % 2)]
named = ranks.sum({name: mx.array(float(name[-1] == "a")) for name in names})
secret = [1.5, -0.0, float("nan")] if rank == 0 else [0.0, 0.0, 0.0]
say({
    "mine": tree["w"].tolist(),
    "sum": sums["w"].tolist(),
    "half": sums["half"].view(mx.uint16).tolist(),
    "count": sums["b"][0].item(),
    "range": sums["b"][1].tolist(),
    "named": {name: array.item() for name, array in named.items()},
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


def test_sum_goes_by_names_and_keeps_them(spoken):
    """A dot in a name makes no tree of it, and ranks may hold the names in any order."""
    assert [one["named"] for one in spoken[0]] == [{"layers.0.a": 3.0, "layers.0.b": 0.0}] * 3


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
    run = Run(
        size, "wait_for_the_end() if rank == 1 else say('ready') or ranks.barrier()", tmp_path
    )
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


def test_a_rank_that_is_stopped_counts_as_gone_and_ends_when_it_wakes(tmp_path):
    run = Run(2, "print('ready', flush=True)\ntime.sleep(60)", tmp_path, SHORT)
    run.wait_until_ready()
    run.processes[1].send_signal(signal.SIGSTOP)
    run.processes[0].wait(LIMIT)
    run.processes[1].send_signal(signal.SIGCONT)
    codes, _, errors = run.end()
    assert codes == [1, 1]
    line = "rank 1 has been silent for 3 s: its machine sleeps, or the network is down"
    assert errors == [f"last resort: {line}\n"] * 2


def test_long_computing_is_not_silence(tmp_path):
    body = """
if rank == 1:
    begin, x = time.monotonic(), mx.ones((200, 200))
    while time.monotonic() - begin < 5:
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


def test_the_constants_keep_the_promise_of_30_seconds():
    assert watch.SILENCE_SECONDS + watch.GRACE_SECONDS + watch.BEAT_SECONDS < LIMIT
