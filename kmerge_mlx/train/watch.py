"""Notices when another rank is gone: a TCP connection to each neighbour, beside MLX's own.

Owns the heartbeats, the one-line reason that goes round when a rank fails, and the last resort that
ends a process whose main thread waits inside MLX for a rank that will never come. A connection that
closes is a rank that died, found at once; silence is a machine that sleeps or a cable that is out.
Does not know MLX or training. Lines of JSON, bounded, from peers that know the run's token.

Why: with a rank dead, MLX 0.32.4's ring raises in an operation that waits alone and hangs for ever
in one of several; its JACCL backend never notices (ml-explore/mlx issues 3862 and 4278).
"""

from __future__ import annotations

import hmac
import json
import math
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kmerge_mlx.errors import TrainError

Report = Callable[[str], None]
Gather = Callable[[Any], list[Any]]
"""What every rank says, by rank, given what this one says; JSON values."""

MEET_SECONDS = 20.0
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0  # MLX lets go of Python's lock while it computes: beats come on time
STUCK_SECONDS = 120.0  # for one operation on at most ranks.PIECE_BYTES
GRACE_SECONDS = 5.0  # for the main thread to leave by itself once a rank has failed
CLOSE_SECONDS = 2.0
TICK_SECONDS = 0.2
MAX_LINE = 4096  # bytes
MAX_REASON = 1000  # characters
COORDINATORS = ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")


def end_process(report: Report, line: str) -> None:
    """Says one line and ends the process with exit code 1, whatever its other threads wait for."""
    # A pipe that nobody reads must not keep the process.
    speaker = threading.Thread(target=report, args=(line,), daemon=True)
    speaker.start()
    speaker.join(1.0)
    os._exit(1)


class Link:
    """A connection to a neighbour.

    Args:
        peer: The neighbour's rank.
        connection: A connected socket whose both ends have shown the token.
    """

    def __init__(self, peer: int, connection: socket.socket):
        self.peer, self.connection = peer, connection
        self.heard = time.monotonic()
        self.done = False
        self._rest = b""
        self._lock = threading.Lock()
        connection.settimeout(CLOSE_SECONDS)

    def send(self, **message: Any) -> None:
        """Sends a message; a dead connection is noticed where it is read."""
        with self._lock, suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, or None at the connection's end."""
        try:
            data = self.connection.recv(MAX_LINE)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > MAX_LINE:
            return None
        self.heard = time.monotonic()
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return [message for message in messages if isinstance(message, dict)]

    def close_sending(self) -> None:
        """Ends this side of the connection; what was sent still arrives."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)


class Watch:
    """Watches the neighbours from a thread, from its making until :meth:`leave`.

    Args:
        rank: This process.
        size: How many there are.
        links: From :func:`meet`.
        report: Told why, if the process has to be ended from the thread.

    Attributes:
        verdict: Why the run is over, in one line, or None while every rank is well.
    """

    def __init__(self, rank: int, size: int, links: Sequence[Link], report: Report):
        self.verdict: str | None = None
        self._rank, self._links, self._report = rank, links, report
        self._begun = [0] * size  # operations of all ranks, as far as they are known here
        self._inside = False
        self._standing: tuple[bool, list[int]] = (False, [])
        self._stood_since = self._judged = 0.0
        self._known, self._left = threading.Event(), threading.Event()
        self._deadline = math.inf
        self._open = selectors.DefaultSelector()
        for link in links:
            self._open.register(link.connection, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._run, name="kmerge-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Around each operation that waits for the other ranks."""
        self._begun[self._rank] += 1
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def wait(self, seconds: float) -> str | None:
        """The verdict, for which it waits at most so long."""
        self._known.wait(seconds)
        return self.verdict

    def leave(self, reason: str | None) -> None:
        """Takes this rank out, telling the others.

        Args:
            reason: Why it failed, in one line, or None if its work is done.
        """
        self._left.set()
        for link in self._links:
            if reason is None:
                link.send(done=True)
            else:
                link.send(failed=reason[:MAX_REASON])
            link.close_sending()
        # Closing with words unread would take back what the others have not read yet.
        self._deadline = min(self._deadline, time.monotonic() + CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS + 1.0)

    def _run(self) -> None:
        beat = 0.0
        while self._open.get_map() and time.monotonic() < self._deadline:
            if time.monotonic() >= beat:
                beat = time.monotonic() + BEAT_SECONDS
                for link in self._links:
                    link.send(begun=self._begun)
            for key, _ in self._open.select(TICK_SECONDS):
                self._hear(key.data)
            self._judge(time.monotonic())
        rest = max(0.0, self._deadline - time.monotonic()) if self.verdict else None
        if rest is not None and not self._left.wait(rest):
            end_process(self._report, self.verdict)

    def _hear(self, link: Link) -> None:
        messages = link.receive()
        for message in messages or ():
            match message:
                case {"failed": str(reason)}:
                    self._condemn(reason[:MAX_REASON])
                case {"done": True}:
                    link.done = True
                case {"begun": list(begun)} if len(begun) == len(self._begun):
                    for rank, count in enumerate(begun):
                        if isinstance(count, int) and rank != self._rank:
                            self._begun[rank] = max(self._begun[rank], count)
        if messages is None:
            self._open.unregister(link.connection)
            link.connection.close()
            if not link.done:
                self._condemn(
                    f"rank {link.peer} is gone: its process was killed, or its machine or the "
                    "network went down"
                )

    def _judge(self, now: float) -> None:
        """Finds silence, and operations that stand still."""
        if now - self._judged > SILENCE_SECONDS / 4:
            # This process was stopped itself; what came meanwhile is not read yet.
            self._stood_since = now
            for link in self._links:
                link.heard = now
        self._judged = now
        for key in list(self._open.get_map().values()):
            link = key.data
            if not link.done and now - link.heard > SILENCE_SECONDS:
                self._condemn(
                    f"rank {link.peer} has been silent for {SILENCE_SECONDS:.0f} s: its machine "
                    "sleeps, or the network is down"
                )
        standing = (self._inside, list(self._begun))
        if standing != self._standing:
            self._standing, self._stood_since = standing, now
        all_inside = self._inside and len(set(self._begun)) == 1
        if all_inside and now - self._stood_since > STUCK_SECONDS:
            self._condemn(
                f"every rank has waited {STUCK_SECONDS:.0f} s for the others in one operation of "
                "MLX: its connections are stuck"
            )

    def _condemn(self, line: str) -> None:
        """Ends the run, once: the others are told, and the main thread has a little time."""
        if self.verdict is not None or self._left.is_set():
            return
        self.verdict = line
        self._deadline = time.monotonic() + GRACE_SECONDS
        self._known.set()
        for link in self._links:
            link.send(failed=line)


def own_addresses(hosts: Sequence[Sequence[str]] | None, rank: int) -> list[str]:
    """Where other machines may reach this one, the likeliest first.

    Args:
        hosts: ``ip:port`` of every rank, from the ring's host file, or None for another backend.
        rank: This process.
    """
    if hosts:
        return list(dict.fromkeys(text.rpartition(":")[0] for text in hosts[rank]))
    found = []
    for name in COORDINATORS:
        host = os.environ.get(name, "").partition(":")[0]
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            if host:
                probe.connect((host, 9))  # sends nothing: it only chooses the way
                found.append(probe.getsockname()[0])
    with suppress(OSError):
        infos = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        found += [info[4][0] for info in infos]
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def meet(rank: int, size: int, addresses: Sequence[str], gather: Gather) -> list[Link]:
    """Connects each rank to the next one, as MLX's ring does, and so to the one before it.

    Args:
        rank: This process.
        size: How many there are, at least two.
        addresses: Where this machine may be reached, the likeliest first.
        gather: Spreads where everyone is, and the token.

    Returns:
        Links to the rank before and the rank after, which may be the same one.

    Raises:
        TrainError: Some rank could not reach the next one; raised by all of them.
    """
    host = addresses[0] if len(addresses) == 1 else ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem, accepted, reached = None, [], None
    with socket.create_server((host, 0), family=family) as listener:
        mine = {"at": list(addresses), "port": listener.getsockname()[1]}
        everyone = gather(mine | {"token": secrets.token_hex(16)})
        token, deadline = everyone[0]["token"], time.monotonic() + MEET_SECONDS
        before, after = (rank - 1) % size, (rank + 1) % size
        arguments = (listener, before, token, deadline, accepted)
        accepting = threading.Thread(target=_accept, args=arguments, daemon=True)
        accepting.start()
        where = [(address, everyone[after]["port"]) for address in everyone[after]["at"]]
        reached = _reach(where, rank, token)
        if reached is None:
            places = ", ".join(f"{address}:{port}" for address, port in where)
            problem = f"rank {rank} cannot reach rank {after} at {places}"
        accepting.join()
        if problem is None and not accepted:
            problem = f"rank {before} did not reach rank {rank}"
    if problems := [found for found in gather(problem) if found]:
        raise TrainError(f"{problems[0]}: let the machines connect to each other on any TCP port")
    return [Link(before, accepted[0]), Link(after, reached)]


def _reach(where: Sequence[tuple[str, int]], rank: int, token: str) -> socket.socket | None:
    """The first address that answers as a rank of this run does."""
    for address in where:
        with suppress(OSError):
            connection = socket.create_connection(address, timeout=5.0)
            connection.sendall(f"{rank} {token}\n".encode())
            if hmac.compare_digest(_line(connection), _welcome(token)):
                return connection
            connection.close()
    return None


def _accept(
    listener: socket.socket, rank: int, token: str, deadline: float, found: list[socket.socket]
) -> None:
    """Waits for one rank; whoever does not know the token is turned away."""
    while not found and (left := deadline - time.monotonic()) > 0:
        with suppress(OSError):
            listener.settimeout(left)
            connection, _ = listener.accept()
            connection.settimeout(min(left, 5.0))
            if hmac.compare_digest(_line(connection), f"{rank} {token}".encode()):
                connection.sendall(_welcome(token) + b"\n")
                found.append(connection)
            else:
                connection.close()


def _welcome(token: str) -> bytes:
    return f"welcome {token}".encode()


def _line(connection: socket.socket) -> bytes:
    """One short line; what is not one ends early."""
    data = b""
    while b"\n" not in data and len(data) < 256:
        if not (more := connection.recv(256)):
            break
        data += more
    return data.partition(b"\n")[0]
