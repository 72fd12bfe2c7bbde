"""The processes of a data-parallel run: who they are, and what they tell each other through MLX.

Owns joining MLX's group (``mlx.launch``, or ``MLX_RANK`` and ``MLX_HOSTFILE``), the few collective
operations a run needs, and how a run ends on every rank. Does not know data, weights or steps. With
one process everything here does nothing. Every operation is evaluated alone, and after what it
needs: MLX hangs in several at once when a rank dies, and Metal ends a GPU that waits for over 5 s.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from kmerge_mlx.errors import KMergeError, TrainError, first_line, short
from kmerge_mlx.files import read_json
from kmerge_mlx.train.watch import Report, Watch, end_process, meet, own_addresses

START_SECONDS = 30  # as long as MLX itself tries to connect
PIECE_BYTES = 32 << 20
MAX_SHOWN = 5
BACKENDS = ("[ring]", "[jaccl]", "[nccl]", "[mpi]", "[distributed]")


def connect(report: Report) -> Ranks:
    """Joins the other processes of this run, if there are any.

    Args:
        report: Given one line just before the process is ended because a rank is gone and the main
            thread waits inside MLX. Whatever else goes wrong is raised.

    Returns:
        The ranks, to be used in a ``with`` statement: leaving it ends the run on every rank.

    Raises:
        TrainError: What the launcher set is wrong, or the others were not there within 30 s.
    """
    hosts = _ring_hosts()
    if hosts == []:
        return Ranks()
    group = _join(hosts)
    if group.size() == 1:
        if "MLX_RANK" in os.environ and os.environ.get("MLX_WORLD_SIZE") != "1":
            raise TrainError(
                f"MLX_RANK={os.environ['MLX_RANK']} is set and MLX found no other rank: start with "
                "mlx.launch, or set MLX_HOSTFILE too (docs/distributed.md)"
            )
        return Ranks()
    ranks = Ranks(group)
    ranks.begin(own_addresses(hosts, ranks.rank), report)
    return ranks


class Ranks:
    """All processes of a run, seen from one of them.

    Every method but :meth:`check` is collective: each rank must call it, in the same order.

    Args:
        group: MLX's group, or None for a run of one process.

    Attributes:
        group: The same.
        rank: This process, from 0.
        size: How many there are.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self._watch: Watch | None = None
        self._failed = False

    def begin(self, addresses: Sequence[str], report: Report) -> None:
        """Connects the ranks; from then on, one that dies ends the others.

        Args:
            addresses: Where this machine may be reached, the likeliest first.
            report: See :func:`connect`.

        Raises:
            TrainError: They cannot reach each other.
        """
        atexit.register(self._end_interpreter)
        line = f"rank {self.rank} lost the others while starting"
        late = threading.Timer(START_SECONDS, end_process, (report, line))
        late.daemon = True
        late.start()
        try:
            links = meet(self.rank, self.size, addresses, self.gather)
        except BaseException as error:
            self._failed = True
            if isinstance(error, RuntimeError):
                raise TrainError(f"{line}: {first_line(error)}") from error
            raise
        finally:
            late.cancel()
        self._watch = Watch(self.rank, self.size, links, report)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the run: in order once all ranks are here, or with an error on all of them."""
        if self._watch is None:
            return
        ends_well = error is None or (isinstance(error, SystemExit) and not error.code)
        if ends_well:
            try:
                self.barrier()
            except Exception as late:
                error = late
            else:
                self._watch.leave(None)
                return
        self._failed = True
        other = self._told_by_others(error)
        self._watch.leave(str(other) if other else f"rank {self.rank} {_told(error)}")
        if other is not None and other is not error:
            raise other from error
        if ends_well:
            raise error

    def check(self) -> None:
        """Raises if another rank has failed.

        Raises:
            TrainError: In one line, which rank and why.
        """
        if self._watch is not None and self._watch.verdict is not None:
            raise TrainError(self._watch.verdict)

    def sum(self, tree: Any) -> Any:
        """Adds up arrays over the ranks, bit for bit the same on each; returns when it is done.

        Args:
            tree: An array, or a tree of them: the same shapes and dtypes on every rank.
        """
        flat = tree_flatten(tree)
        if self.size == 1 or not flat:
            return tree
        # By name, so that dictionaries may be in any order.
        order = sorted(range(len(flat)), key=lambda i: flat[i][0])
        self.check()
        mx.eval(tree)
        parts: list[list[mx.array]] = [[] for _ in flat]
        with mx.stream(_stream()):
            for bundle in _bundles([(i, flat[i][1]) for i in order]):
                joined = mx.concatenate([piece for _, piece in bundle])
                total = self._run(mx.distributed.all_sum(joined, group=self.group))
                at = 0
                for index, piece in bundle:
                    parts[index].append(total[at : at + piece.size])
                    at += piece.size
            sums = [
                mx.concatenate(pieces).reshape(array.shape) if pieces else array
                for (_, array), pieces in zip(flat, parts, strict=True)
            ]
            mx.eval(sums)
        left = iter(sums)
        return tree_map(lambda _: next(left), tree)

    def share(self, array: mx.array) -> mx.array:
        """Gives every rank the first one's array, bit for bit.

        Args:
            array: On the first rank what is shared; on the others its shape and dtype.
        """
        if self.size == 1 or not array.size:
            return array
        data = array.reshape(-1).view(mx.uint8)
        data = self.sum(mx.zeros_like(data) if self.rank else data)
        return data.view(array.dtype).reshape(array.shape)

    def share_text(self, text: str) -> str:
        """Gives every rank the first one's text."""
        return self.gather(text if self.rank == 0 else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, by rank.

        Args:
            value: Anything that JSON can hold.
        """
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        lengths = self._gather_bytes(len(data).to_bytes(8, "big"))
        sizes = [int.from_bytes(length, "big") for length in lengths]
        texts = self._gather_bytes(data.ljust(max(sizes), b" "))
        return [json.loads(text) for text in texts]

    def same(self, value: Any, what: str) -> None:
        """Makes sure that every rank has the same settings, data or whatever it is.

        Args:
            value: Anything that JSON can hold; of a mapping, the entries that differ are named.
            what: What it is, in the plural: "the settings".

        Raises:
            TrainError: They differ; the same line on every rank.
        """
        everyone = self.gather(value)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise TrainError(
                    f"{what} of rank {rank} are not those of rank 0: "
                    f"{_differences(everyone[0], other, rank)}; every machine needs the same"
                )

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank: how ranks stop at the same step."""
        return bool(self.sum(mx.array(int(flag))).item())

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self.any(False)

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        with mx.stream(_stream()):
            mine = mx.array(np.frombuffer(data, np.uint8))
            everyone = self._run(mx.distributed.all_gather(mine, group=self.group))
        flat = bytes(everyone)
        return [flat[at : at + len(data)] for at in range(0, len(flat), len(data))]

    def _run(self, result: mx.array) -> mx.array:
        """Evaluates one operation that waits for the other ranks."""
        self.check()
        with nullcontext() if self._watch is None else self._watch.operation():
            mx.eval(result)
        return result

    def _told_by_others(self, error: BaseException) -> KMergeError | None:
        """What ends the run if this error is only how another rank's failure looks from here."""
        if isinstance(error, KMergeError) or not isinstance(error, RuntimeError):
            told = isinstance(error, TrainError) and str(error) == self._watch.verdict
            return error if told else None
        # MLX has noticed first: the reason is on its way.
        if verdict := self._watch.wait(2.0):
            return TrainError(verdict)
        if str(error).startswith(BACKENDS):
            return TrainError(f"rank {self.rank} failed: it lost the others: {first_line(error)}")
        return None

    def _end_interpreter(self) -> None:
        """At exit: MLX would wait for ever for operations that a dead rank will not finish."""
        if self._failed:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(1)


def _told(error: BaseException) -> str:
    """How an error of this rank is told to the others."""
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    if isinstance(error, KMergeError):
        return f"failed: {first_line(error)}"
    return f"failed: {type(error).__name__}: {first_line(error)}"


def _differences(first: Any, other: Any, rank: int) -> str:
    if not (isinstance(first, Mapping) and isinstance(other, Mapping)):
        return f"{short(other)} instead of {short(first)}"
    names = [
        n for n in first | other if first.get(n) != other.get(n) or (n in first) != (n in other)
    ]
    shown = [
        f"{n} is {short(other[n]) if n in other else 'missing'} instead of "
        f"{short(first[n]) if n in first else 'missing'}"
        for n in names[:MAX_SHOWN]
    ]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def _bundles(
    arrays: Sequence[tuple[int, mx.array]],
) -> Iterator[list[tuple[int, mx.array]]]:
    """Small arrays together and large ones in pieces: flat pieces under their arrays' numbers."""
    waiting: dict[mx.Dtype, list[tuple[int, mx.array]]] = {}
    held: dict[mx.Dtype, int] = {}
    for index, array in arrays:
        flat, step = array.reshape(-1), PIECE_BYTES // array.itemsize
        for at in range(0, flat.size, step):
            piece = flat[at : at + step]
            if held.get(array.dtype, 0) + piece.nbytes > PIECE_BYTES:
                yield waiting.pop(array.dtype)
                held[array.dtype] = 0
            waiting.setdefault(array.dtype, []).append((index, piece))
            held[array.dtype] = held.get(array.dtype, 0) + piece.nbytes
    yield from waiting.values()


def _stream() -> mx.Stream:
    """Where ranks wait for each other: not on a Mac's GPU, which is ended when it waits for 5 s."""
    return mx.default_stream(mx.cpu if mx.metal.is_available() else mx.default_device())


def _ring_hosts() -> list[list[str]] | None:
    """Checks what MLX's ring would read, which crashes or waits for ever over some mistakes.

    Returns:
        ``ip:port`` of every rank, empty for ``mlx.launch -n 1``, or None without a host file.
    """
    name, rank = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_RANK", "")
    if name is None:
        return None
    path = Path(name)
    if path.is_file() and path.stat().st_size < 3 and not path.read_text().strip():
        return []
    hosts = read_json(path, TrainError)
    if isinstance(hosts, dict) or (isinstance(hosts, list) and any(map(_is_launchers, hosts))):
        raise TrainError(f"MLX_HOSTFILE {path} is one for mlx.launch: give it to --hostfile there")
    lists = isinstance(hosts, list) and all(isinstance(host, list) and host for host in hosts)
    if not lists or len(hosts) < 2 or not all(map(_is_address, chain(*hosts))):
        raise TrainError(
            f'MLX_HOSTFILE {path} must list two ranks or more, each as ["IP:PORT"]: '
            f"found {short(hosts)}"
        )
    if not (rank.isascii() and rank.isdigit() and int(rank) < len(hosts)):
        raise TrainError(f"MLX_RANK must be 0 to {len(hosts) - 1} for {path}, and is {rank!r}")
    return hosts


def _is_launchers(host: Any) -> bool:
    return isinstance(host, dict) and "ssh" in host


def _is_address(text: Any) -> bool:
    return isinstance(text, str) and bool(re.fullmatch(r".+:\d{1,5}", text))


def _join(hosts: list[list[str]] | None) -> mx.distributed.Group:
    """MLX's group; an error says who was expected."""
    begin = time.monotonic()
    try:
        with _interrupted_after(START_SECONDS):
            return mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        rank = os.environ.get("MLX_RANK", "?")
        where = f"; the ranks are {', '.join(host[0] for host in hosts)}" if hosts else ""
        if time.monotonic() - begin >= START_SECONDS:
            problem = f"waited {START_SECONDS} s for the others, which must all be started"
        else:
            number = re.search(r"error: (\d+)", str(error))
            reason = f": {os.strerror(int(number[1]))}" if number else ""
            problem = f"cannot join the others: {first_line(error)}{reason}"
        raise TrainError(f"rank {rank} {problem}{where}") from error


@contextmanager
def _interrupted_after(seconds: int) -> Iterator[None]:
    """MLX waits for the other ranks holding Python's lock: only a signal ends that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous or signal.SIG_DFL)
