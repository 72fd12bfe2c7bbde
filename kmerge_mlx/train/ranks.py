"""Adds up gradients over the machines of a distributed run, through ``mx.distributed`` alone.

With one process everything here does nothing. Each collective operation is evaluated alone: MLX
hangs in several at once when a rank dies.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from kmerge_mlx.errors import TrainError, findings, first_line, short

START_SECONDS = 30  # how long the ranks wait for each other at the start, as in MLX itself
BUNDLE_BYTES = 32 << 20  # what is sent at once, as in mlx.nn.average_gradients


def connect() -> Ranks:
    """Joins the other processes of this run (``mlx.launch`` starts them), if there are any."""
    hosts, rank = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_RANK")
    if hosts and Path(hosts).is_file() and not Path(hosts).read_text().strip():
        return Ranks()  # `mlx.launch -n 1` writes an empty file
    # MLX waits for the other ranks holding Python's lock: only a signal ends that.
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(START_SECONDS)
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        problem = f"cannot join the other ranks ({first_line(error)})"
        if not signal.alarm(0):
            problem = f"waited {START_SECONDS} s for the other ranks: start all of them"
        raise TrainError(
            f"rank {rank} {problem}, and check MLX_RANK and MLX_HOSTFILE (docs/distributed.md)"
        ) from error
    finally:
        signal.alarm(0)
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
        if self.size == 1:
            return tree
        flat, sums = dict(tree_flatten(tree)), {}
        mx.eval(tree)
        # By name, because the ranks may hold a dictionary's entries in any order.
        order = sorted(flat, key=lambda name: (str(flat[name].dtype), name))
        sent = np.cumsum([flat[name].nbytes for name in order]) // BUNDLE_BYTES
        number = dict(zip(order, sent.tolist(), strict=True))
        with mx.stream(_stream()):
            for _, bundle in groupby(order, lambda name: (str(flat[name].dtype), number[name])):
                names = list(bundle)
                joined = mx.concatenate([flat[name].reshape(-1) for name in names])
                total = self._run(mx.distributed.all_sum(joined, group=self._group))
                ends = np.cumsum([flat[name].size for name in names])[:-1].tolist()
                for name, part in zip(names, mx.split(total, ends), strict=True):
                    sums[name] = part.reshape(flat[name].shape)
            mx.eval(sums)
        return tree_map_with_path(lambda name, _: sums[name or ""], tree)

    def share(self, array: mx.array) -> mx.array:
        """Gives every rank the first one's array; the others call it with one of that shape."""
        if self.size == 1:
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
        longest = int(self._gather(np.array([len(data)])).max())
        texts = self._gather(np.frombuffer(data.ljust(longest), np.uint8))
        return [json.loads(bytes(text)) for text in texts]

    def same(self, values: Mapping[str, Any], what: str) -> None:
        """Raises the same TrainError on every rank if values differ, naming them as ``what``."""
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

    def _gather(self, mine: np.ndarray) -> np.ndarray:
        with mx.stream(_stream()):
            found = mx.distributed.all_gather(mx.array(mine)[None], group=self._group)
            return np.array(self._run(found))

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


def _stream() -> mx.Stream:
    """Where ranks wait for each other. macOS ends a GPU program that waits for over 5 s."""
    return mx.default_stream(mx.cpu if mx.metal.is_available() else mx.default_device())
