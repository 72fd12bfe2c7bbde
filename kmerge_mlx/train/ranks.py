"""Adds up gradients over the machines of a distributed run, through ``mx.distributed`` alone.

With one process everything here does nothing. Each collective operation is evaluated alone: MLX
hangs in several at once when a rank dies.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from kmerge_mlx.errors import TrainError, findings, first_line, short

START_SECONDS = 30
"""How long the ranks wait for each other at the start, as in MLX itself."""
BUNDLE_BYTES = 32 << 20
"""Arrays are sent together up to this size, as in ``mlx.nn.average_gradients``."""


def connect() -> Ranks:
    """Joins the other processes of this run (``mlx.launch`` starts them), if there are any.

    Raises:
        TrainError: The launcher's settings are wrong, or the others were not there within 30 s.
    """
    hosts, rank = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_RANK")
    if hosts and Path(hosts).is_file() and not Path(hosts).read_text().strip():
        return Ranks()  # `mlx.launch -n 1` writes an empty file
    begin = time.monotonic()
    try:
        with _interrupted_after(START_SECONDS):
            group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        if time.monotonic() - begin >= START_SECONDS:
            problem = f"waited {START_SECONDS} s for the other ranks: start all of them"
        else:
            problem = f"cannot join the other ranks ({first_line(error)})"
        raise TrainError(
            f"rank {rank} {problem}, and check MLX_RANK and MLX_HOSTFILE (docs/distributed.md)"
        ) from error
    if group.size() > 1:
        return Ranks(group)
    if rank is not None and os.environ.get("MLX_WORLD_SIZE") != "1":
        raise TrainError(
            f"MLX_RANK={rank} is set and MLX found no other rank: start with mlx.launch, or set "
            "MLX_HOSTFILE too (docs/distributed.md)"
        )
    return Ranks()


class Ranks:
    """All processes of a run, seen from one of them.

    Every method is collective: each rank must call it, in the same order. It raises TrainError
    when another rank is gone. ``rank`` is this process, from 0, and ``size`` how many there are.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    def sum(self, tree: Any) -> Any:
        """Adds up an array, or a tree of them, over the ranks; all get the same bits."""
        flat = tree_flatten(tree)
        if self.size == 1 or not flat:
            return tree
        mx.eval(tree)
        sums: dict[int, mx.array] = {}
        with mx.stream(_stream()):
            for bundle in _bundles(flat):
                arrays = [flat[i][1] for i in bundle]
                joined = mx.concatenate([array.reshape(-1) for array in arrays])
                total = self._run(mx.distributed.all_sum(joined, group=self._group))
                parts = mx.split(total, np.cumsum([array.size for array in arrays])[:-1].tolist())
                sums |= {
                    i: part.reshape(array.shape)
                    for i, array, part in zip(bundle, arrays, parts, strict=True)
                }
            mx.eval(sums)
        left = iter(range(len(flat)))
        return tree_map(lambda _: sums[next(left)], tree)

    def share(self, array: mx.array) -> mx.array:
        """Gives every rank the first one's array; the others call it with one of that shape."""
        if self.size == 1 or not array.size:
            return array
        data = array.reshape(-1).view(mx.uint8)
        data = self.sum(mx.zeros_like(data) if self.rank else data)
        return data.view(array.dtype).reshape(array.shape)

    def share_json(self, value: Any) -> Any:
        """Gives every rank the first one's value, which JSON can hold."""
        return self.gather(value if self.rank == 0 else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. JSON must be able to hold them."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        sizes = [int.from_bytes(size, "big") for size in self._gather(len(data).to_bytes(8, "big"))]
        return [json.loads(text) for text in self._gather(data.ljust(max(sizes), b" "))]

    def same(self, values: Mapping[str, Any], what: str) -> None:
        """Makes sure that every rank has the same values, by name; ``what`` is what they are.

        Raises:
            TrainError: Names what differs; the same text on every rank.
        """
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, 1):
            wrong = [
                f"`{n}` is {short(other.get(n))} instead of {short(first.get(n))}"
                for n in {**first, **other}
                if first.get(n) != other.get(n)
            ]
            if wrong:
                where = f"{what} of rank {rank} are not those of rank 0"
                raise TrainError(findings(where, wrong))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Returns when every rank has called it."""
        return bool(self.sum(mx.array(int(flag))).item())

    def _gather(self, data: bytes) -> list[bytes]:
        with mx.stream(_stream()):
            mine = mx.array(np.frombuffer(data, np.uint8))
            everyone = bytes(self._run(mx.distributed.all_gather(mine, group=self._group)))
        return [everyone[at : at + len(data)] for at in range(0, len(everyone), len(data))]

    def _run(self, result: mx.array) -> mx.array:
        """Evaluates one operation that waits for the other ranks."""
        try:
            mx.eval(result)
        except RuntimeError as error:
            raise TrainError(
                f"rank {self.rank} lost another rank ({first_line(error)}): see the error of that "
                "one, and go on with `resume`"
            ) from error
        return result


def _bundles(flat: Sequence[tuple[str, mx.array]]) -> list[list[int]]:
    """Groups the indices of arrays of one dtype, so that small ones travel together."""
    # By name, because the ranks may hold a dictionary's entries in any order.
    order = sorted(range(len(flat)), key=lambda i: (str(flat[i][1].dtype), flat[i][0]))
    sent = np.cumsum([flat[i][1].nbytes for i in order]) // BUNDLE_BYTES
    keys = {i: (str(flat[i][1].dtype), n) for i, n in zip(order, sent.tolist(), strict=True)}
    return [list(bundle) for _, bundle in groupby(order, keys.get)]


def _stream() -> mx.Stream:
    """Where ranks wait for each other. macOS ends a GPU program that waits for over 5 s."""
    return mx.default_stream(mx.cpu if mx.metal.is_available() else mx.default_device())


@contextmanager
def _interrupted_after(seconds: int) -> Iterator[None]:
    """MLX waits for the other ranks holding Python's lock: only a signal ends that."""
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous or signal.SIG_DFL)
